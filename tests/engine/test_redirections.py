"""Calls on a cluster whose servers move partitions, refuse scripts, hang up and send nonsense, in any order."""

import asyncio
import functools
import gc
import itertools
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import example, given
from redis.backoff import EqualJitterBackoff

from rss import SessionError, SessionStore, StoreUnavailable
from rss.engine import cluster, coalesce, lane
from rss.engine.scripts import pack
from rss.keys import tags
from rss.testing import free_port
from tests.conftest import LOOPS
from tests.engine.callers import outcomes
from tests.secrecy import Secrecy
from tests.servers import Fake, serving

PARTITIONS, HOST = 2, "127.0.0.1"

# The steps of a server, one with each script. These errors are for the callers. Redis quotes keys in the last one.
LASTING = ["OOM command not allowed", "ERR trouble", "RSSNOTFOUND", "ERR unknown command 'EVALSHA', with args {}"]
# After these replies the client drops the connection.
NONSENSE = ["MOVED", *(f"ran, but: {reply}" for reply in (":1", "+OK", "*0", "$-1", "!bad", "one too many"))]
NON_LOCAL = "ran, but: -ERR Script attempted to access a non local key in a cluster node"
STEPS = ["answer"] * 6 + ["answer the first half", "fail one", "the partition moves", "NOSCRIPT No matching script."]
STEPS += [f"{code} {where}" for code in ("MOVED", "ASK") for where in ("itself", "the next", "no host")]
STEPS += [f"{code} later" for code in ("TRYAGAIN", "RSSLATER", "CLUSTERDOWN", "LOADING", "READONLY", "MASTERDOWN")]
STEPS += ["MOVED nowhere", "cut", "ran, but: cut", "ran, but: cut in the middle", NON_LOCAL, *LASTING, *NONSENSE]
# After these steps a call waits until its deadline.
SILENT = ["silence", "ran, but: silence", "the server stops", "ASK nowhere"]

# Replies to CLUSTER SLOTS, and to the write of the meta key that follows the first one. "": hang up.
UNREADABLE = [":1", "$-1", "+OK", "*1\r\n:5", "*1\r\n*2\r\n:0\r\n:16383", "*1\r\n*3\r\n:0\r\n:16383\r\n*1\r\n$1\r\nx"]
LOOKS = ["right", "swapped", "one owner", "one range", "no host", "null host", "nowhere", "*0", *UNREADABLE]
LOOKS += ["-LOADING", "-CLUSTERDOWN", ""]
CHECKS = [":1", "-TRYAGAIN", "-CLUSTERDOWN", "-LOADING", "-READONLY", "-MASTERDOWN", ""]
CHECKS += [f"-MOVED 42 {HOST}:1", f"-ASK 42 {HOST}:1"]


class Plan(NamedTuple):
    """The answers of the servers until they are well, step by step. *forever*: the first step follows the last."""

    steps: Sequence[str] = ()
    looks: Sequence[str] = ()
    checks: Sequence[str] = ()
    forever: bool = False


class Stop(Exception):
    """Raised while a server answers: it sends the rest, and then it hangs up, or it is silent."""

    def __init__(self, rest: bytes = b"", *, silent: bool = False) -> None:
        self.rest = rest
        self.silent = silent


class Server(Fake):
    """A server of a cluster."""

    def __init__(self, servers: "Servers") -> None:
        super().__init__(lambda command: servers.answer(self, command))
        self.servers = servers
        self.port = 0
        self.stopped = False
        self.flushed = False  # The scripts must be loaded again.
        self.asking = set[asyncio.Task[None] | None]()  # The tasks that serve connections whose last command is ASKING.

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await super().answer(reader, writer)
        except Stop as stop:
            writer.write(stop.rest)
            if stop.silent:
                await reader.read()

    def _reply(self, command: list[bytes]) -> bytes | None:
        if self.stopped:
            raise Stop(silent=True)
        match command:
            case [b"CLUSTER", *_]:
                reply = self.servers.look()
            case [b"HSETNX", *_]:
                reply = next(self.servers.checks, ":1")
            case [b"HGET", _, name]:
                reply = f"$1\r\n{PARTITIONS}" if name == b"partitions" else "$0\r\n"
            case _:
                self.flushed &= command[0] != b"SCRIPT" or len(command[2]) < 100  # The greeting is a short script.
                answer = super()._reply(command)
                (self.asking.add if command[0] == b"ASKING" else self.asking.discard)(asyncio.current_task())
                return answer
        return f"{reply}\r\n".encode() if reply else None


class Servers:
    """The servers of a cluster.

    Each call has a name, such as "secret7". It is the id of the session, or a value of a session that is made.
    """

    def __init__(self, plan: Plan) -> None:
        self.forever = plan.forever
        self.steps = itertools.cycle(plan.steps) if plan.forever else iter(plan.steps)
        self.looks, self.checks = iter(plan.looks), iter(plan.checks)
        self.all = [Server(self) for _ in range(3)]
        self.owners = self.all[:PARTITIONS]
        self.nowhere = free_port()
        self.scripts: dict[str, str] = {}  # The names, by their digests.
        #: How often each call was sent, how often it ran, and the ids of the sessions that it made.
        self.sent, self.runs, self.made = Counter[str](), Counter[str](), defaultdict[str, set[str]](set)
        #: The calls that got an error. Whether an increment may have got lost.
        self.failed, self.lossy = set[str](), False
        #: The server to which ASK sent a call, until that answers. The tasks that serve connections without a reader.
        self.asked, self.unread = dict[str, Server](), set[asyncio.Task[None] | None]()
        self.mistakes = set[str]()

    def recover(self) -> None:
        """Be right from now on."""
        self.steps, self.looks, self.checks = iter(()), iter(()), iter(())
        for server in self.all:
            server.stopped = False

    def look(self) -> str:
        """Return the reply to CLUSTER SLOTS."""
        look = next(self.looks, "right")
        if not look or look[0] in "*:$+-":
            return look
        ports = [self.nowhere if look == "nowhere" else owner.port for owner in self.owners]
        ports = {"swapped": ports[::-1], "one owner": ports[:1] * 2, "one range": ports[:1]}.get(look, ports)
        host = {"no host": "$0\r\n", "null host": "$-1"}.get(look, f"$9\r\n{HOST}")
        ranges = (f"*3\r\n:{n * 8192}\r\n:{n * 8192 + 8191}\r\n*2\r\n{host}\r\n:{port}" for n, port in enumerate(ports))
        return "\r\n".join([f"*{len(ports)}", *ranges])

    def answer(self, server: Server, command: list[bytes]) -> bytes:
        """Return the reply to an EVALSHA."""
        if server.flushed:
            return b"-NOSCRIPT No matching script.\r\n"
        step, script = next(self.steps, "answer"), self.scripts[command[1].decode()]
        keys, words = command[3:][: int(command[2])], b" ".join(command[3:]).decode()
        names, asking = re.findall(r"secret\d+", words), asyncio.current_task() in server.asking
        following = self.all[self.all.index(server) - 1]
        self.sent.update(names)
        self.lossy |= step in NONSENSE or step.startswith(("ran", "cut"))
        self.check(names, server, asking=asking, asked=script.endswith(", asked"))
        self.expect(step, names, server if step == "ASK itself" else following, asking=asking)
        if step.split()[0].isupper():
            return self.refuse(step, names, server, following).format(words).encode() + b"\r\n"
        if step in ("cut", "silence", "the server stops"):
            server.stopped = step == "the server stops"
            raise Stop(silent=step != "cut")
        if step.startswith("ran"):
            return self.spoil(self.run(script, names, keys), step.partition(": ")[2])
        partition = tags(PARTITIONS).index(words.partition("{")[2].partition("}")[0])
        if step == "the partition moves":
            self.owners[partition] = following
        if not asking and self.owners[partition] is not server:
            return f"-MOVED 42 {HOST}:{self.owners[partition].port}\r\n".encode()
        if step == "fail one":
            self.failed.add(names[0])
            return b"*%d\r\n-RSSNOTFOUND\r\n" % len(keys) + self.run(script, names[1:], keys[1:]).partition(b"\n")[2]
        enough = -(-len(keys) // 2) if step == "answer the first half" else len(keys)
        return self.run(script, names[:enough], keys[:enough])

    def check(self, names: list[str], server: Server, *, asking: bool, asked: bool) -> None:
        """Note whether ASKING precedes the calls that were told to ask this server, and no others."""
        due = [self.asked[name] for name in names if name in self.asked]
        if asking != asked or (asking and len(names) > 1):
            self.mistakes.add("ASKING does not precede the script for it, with one call")
        if not self.forever and due != [server] * len(names) * asking:  # A silent server may say ASK to no reader.
            self.mistakes.add("a call does not follow ASK, or sends ASKING without need")

    def expect(self, step: str, names: list[str], target: Server, *, asking: bool) -> None:
        """Note where the calls must be sent after a step, if the client reads the reply."""
        connection = asyncio.current_task()
        if step in NONSENSE:
            self.unread.add(connection)
        elif asking and "cut" not in step and not step.startswith("NOSCRIPT") and connection not in self.unread:
            for name in names:
                self.asked.pop(name, None)
        elif step.startswith("ASK") and len(names) == 1 and not asking and connection not in self.unread:
            self.asked[names[0]] = target

    def refuse(self, step: str, names: list[str], server: Server, following: Server) -> str:
        """Return an error."""
        code, _, where = step.partition(" ")
        server.flushed = code == "NOSCRIPT"
        if step in LASTING:  # Only a code concerns all calls.
            self.failed |= {*names[: None if code == "OOM" else 1]}
        if code not in ("MOVED", "ASK"):
            return f"-{step}"
        addresses = {"itself": f"{HOST}:{server.port}", "the next": f"{HOST}:{following.port}"}
        addresses |= {"no host": f":{following.port}", "nowhere": f"{HOST}:{self.nowhere}", "": ""}
        return f"-{code} 42 {addresses[where]}"

    def run(self, script: str, names: list[str], keys: list[bytes]) -> bytes:
        """Run a script, and return the right reply."""
        replies = b"*%d\r\n" % len(names)
        for name, key in zip(names, keys, strict=True):
            self.runs[name] += 1
            if script.startswith("get"):
                replies += pack("id", name, "n", name.removeprefix("secret"), 60_000, "alive")
            elif script.startswith("set"):
                self.made[name].add(key.decode().rpartition(":")[2])
                replies += b":60000\r\n"
            else:
                replies += b":%d\r\n" % (int(name.removeprefix("secret")) * 1000 + self.runs[name])
        return replies

    @staticmethod
    def spoil(reply: bytes, how: str) -> bytes:
        """Return a wrong reply instead of a right one, or stop."""
        if how == "one too many":
            count, _, replies = reply[1:].partition(b"\r\n")
            return b"*%d\r\n:1\r\n%b" % (int(count) + 1, replies)
        if how.startswith(("cut", "silence")):
            raise Stop(reply[: len(reply) // 2] if "middle" in how else b"", silent=how == "silence")
        return f"{how}\r\n".encode()

    def judge(self, operation: str, n: int, found: object) -> None:
        """Check the result or the error of a call."""
        name, made = f"secret{n}", self.made[f"secret{n}"]
        assert self.sent[name] < 80  # It waits before most attempts.
        assert self.runs[name] <= 1 or operation != "increment"
        assert len(made) <= 1
        if isinstance(found, BaseException):
            assert isinstance(found, SessionError)
            assert not any(secret in texts(found) for secret in ("secret", *made))
            lost = operation == "increment" and self.lossy and "not known what was done" in str(found)
            assert self.forever or name in self.failed or lost
        else:
            assert found == {"get": {"id": name, "n": n}, "increment": n * 1000 + 1, "create": "".join(made)}[operation]


def texts(error: BaseException | None) -> str:
    """Return all texts of an error and its causes."""
    return f"{error} {error!r} {texts(error.__cause__ or error.__context__)}" if error else ""


async def call(store: SessionStore, operation: str, n: int) -> object:
    """Make a call with a number, and return its result."""
    if operation == "get":
        return await store.get(f"secret{n}", ["n"])
    return await (store.increment(f"secret{n}", "n") if operation == "increment" else store.create({"v": f"secret{n}"}))


async def play(servers: Servers, calls: Sequence[str], *, closing: bool) -> None:
    """Make calls at the same time, check what each gets, and do it again. *closing*: close the store meanwhile."""
    timeout, rounds = (0.1, 1) if servers.forever else (6, 3)
    async with AsyncExitStack() as stack:
        for server in servers.all:
            server.port = await stack.enter_async_context(serving(server.answer))
        url = f"redis+cluster://{HOST}:{servers.all[0].port}?protocol=2"
        store = SessionStore.from_url(url, partitions=PARTITIONS, timeout=timeout)
        servers.scripts = {sha: name for name, sha in store.operations.scripts.shas.items()}
        for number in range(rounds):
            named = dict(enumerate(calls, number * len(calls)))
            running = [asyncio.ensure_future(call(store, operation, n)) for n, operation in named.items()]
            await asyncio.sleep(0)
            if closing and number == rounds - 1:
                async with asyncio.timeout(timeout + 2):
                    await store.aclose()
            for (n, operation), found in zip(named.items(), await outcomes(running, timeout + 2), strict=True):
                servers.judge(operation, n, found)
        assert servers.mistakes == set()
        servers.recover()
        async with asyncio.timeout(5):
            for n in () if closing else range(1000, 1004):
                found = StoreUnavailable()
                while isinstance(found, StoreUnavailable):
                    (found,) = await outcomes([call(store, "get", n)])
                servers.judge("get", n, found)
            await store.aclose()
            assert all("serving" in str(task.get_coro()) for task in asyncio.all_tasks() - {asyncio.current_task()})
            while len(asyncio.all_tasks()) > 1:  # A server serves a connection until the client has closed it.
                await asyncio.sleep(0.001)


def some(items: Sequence[str], least: int, most: int) -> st.SearchStrategy[list[str]]:
    """Draw a list of items, some of them several times in a row."""
    runs = st.lists(st.tuples(st.sampled_from(items), st.sampled_from([1, 1, 1, 4])), min_size=least, max_size=most)
    return runs.map(lambda drawn: [item for item, times in drawn for _ in range(times)])


STARTS = some(LOOKS, 0, 5), some(CHECKS, 0, 3)
PLANS = st.builds(Plan, some(STEPS, 6, 18), *STARTS)
PLANS |= st.builds(Plan, some(STEPS + SILENT, 3, 12), *STARTS, st.just(value=True))


after = functools.partial(example, loop="asyncio", closing=False)


@after(plan=Plan(["cut"], ["right", *UNREADABLE]), calls=["get"])
@after(plan=Plan(looks=UNREADABLE * 100, forever=True), calls=["get"])
@after(plan=Plan(checks=CHECKS), calls=["get"])
@after(plan=Plan(["MOVED itself"], forever=True), calls=["get"])
@after(plan=Plan(["ASK the next", "TRYAGAIN later"]), calls=["get"])
@after(plan=Plan(["silence"], forever=True), calls=["get"])
@after(plan=Plan(["answer the first half"] * 4), calls=["get"] * 6)
@after(plan=Plan([NON_LOCAL]), calls=["increment"])
@after(plan=Plan([NON_LOCAL, "TRYAGAIN later"]), calls=["create"])
@example(plan=Plan(["answer"] * 2 + ["TRYAGAIN later"]), calls=["create"], loop="asyncio", closing=True)
@given(
    plan=PLANS, calls=some(["get", "increment", "create"], 3, 12), loop=st.sampled_from([*LOOPS]), closing=st.booleans()
)
def test_calls_in_trouble(plan: Plan, calls: list[str], loop: str, *, closing: bool) -> None:
    """Each call gets its own answer or an error in time, whatever the servers do; then the store works, and closes.

    No increment runs twice, no error and no log record holds an id or a value, and nothing is left.
    """
    secrecy = Secrecy()
    with pytest.MonkeyPatch.context() as patch, secrecy.listen(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setattr(coalesce, "_BACKOFF", EqualJitterBackoff(cap=0.02, base=0.005))
        for module, name, seconds in (
            (lane, "_TICK", 0.005),
            (cluster, "_PAUSE", 0.005),
            (cluster, "_LONG_PAUSE", 0.01),
        ):
            patch.setattr(module, name, seconds)
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(play(Servers(plan), calls, closing=closing))
        gc.collect()
    # asyncio tells which selector it uses, and of each reply that a server sends to a client that is gone.
    assert [record for record in secrecy.logged if not re.search("Using selector|socket.send", record)] == []
    assert warned == []
