"""Measures a Redis Cluster of three masters beside one server: `python -m benchmarks.cluster`.

One process runs all contenders. They take short turns, interleaved, and are compared within each round. All servers
share one core, and the process has another one. So the cluster has no more power than the single server: what is
measured is what the cluster costs.
"""

import argparse
import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Final

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio import RedisCluster

from benchmarks import contenders, plots, server, tables
from benchmarks.contenders import MAX_AGE, Contender, new_id
from benchmarks.goals import Verdict
from benchmarks.turns import FOLDER, Cell, ratio, show
from benchmarks.worker import Turns
from rss import Reference
from rss.testing import Cluster, cluster

SESSIONS: Final = 1000
PARTITIONS: Final = (16, 64, 256)
# Memory of a master, in bytes.
_MEMORY: Final = 16 * 2**30
REFERENCES: Final = {"user_id": Reference(identity=True), "ip": Reference()}
# Goals: calls a second in multiples of redis-py's cluster client, by the number of tasks.
_FASTER: Final = {1: 1.2, 50: 3.0, 200: 6.0}
# Goals: times in multiples of one Redis, and of a pipeline by hand.
_IDENTITY: Final = 1.3
_FAN_OUT: Final = 1.5
_GET: Final = "return redis.call('HGETALL', KEYS[1])"
_SET: Final = "redis.call('HSET', KEYS[1], unpack(ARGV, 2)) redis.call('PEXPIRE', KEYS[1], ARGV[1])"


class Store(contenders.Store):
    """The library, with an identity and in partitions."""

    def __init__(self, url: str, prefix: str, partitions: int | None) -> None:
        """Make a store. *partitions*: None for one Redis as usual."""
        super().__init__(url, prefix, references=REFERENCES, partitions=partitions)

    def by_identity(self, n: int) -> Awaitable[Any]:
        """Find the ids of a user."""
        return self.store.ids_by("user_id", self.user(n))

    def fan_out(self, n: int) -> Awaitable[Any]:
        """Find the ids of an address, in all partitions."""
        return self.store.ids_by("ip", self.address(n))


class ByHand(Contender):
    """Finds ids in all partitions through redis-py: a pipeline for each master."""

    def __init__(self, url: str, prefix: str, partitions: int, servers: Cluster) -> None:
        """Make a store for the sessions and the names of the keys, and a client of each master."""
        super().__init__(url, prefix)
        self._stored = Store(url, prefix, partitions)
        self._clients = [AsyncRedis(port=one.port) for one in servers.servers]
        self._owners: dict[str, int] = {}
        self._servers = servers

    async def aclose(self) -> None:
        """Close the clients and the store."""
        for client in self._clients:
            await client.aclose()
        await self._stored.aclose()

    def create(self, n: int) -> Awaitable[str]:
        """Make a session, in both reference sets."""
        return self._stored.create(n)

    async def fan_out(self, n: int) -> list[str]:
        """SMEMBERS of each partition's set."""
        keys: list[list[str]] = [[] for _ in self._clients]
        for key in self._stored.store.get_reference_keys("ip", self.address(n)):
            keys[self._owner(key)].append(key)
        found = await asyncio.gather(*map(self._members, self._clients, keys))
        return [session_id for one in found for session_id in one]

    async def _members(self, client: "AsyncRedis", keys: list[str]) -> list[str]:
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.smembers(key)
        return [session_id.decode() for ids in await pipeline.execute() for session_id in ids]

    def _owner(self, key: str) -> int:
        tag = key.partition("}")[0]
        if tag not in self._owners:
            slot = int(self._servers.servers[0]("CLUSTER", "KEYSLOT", key))
            self._owners[tag] = self._servers.servers.index(self._servers.owner(slot))
        return self._owners[tag]


class Peer(Contender):
    """Another client, with a minimal script for each operation, and one EVALSHA a call."""

    def __init__(self, prefix: str, run: Callable[[str, str, list[str]], Awaitable[Any]]) -> None:
        """Take a function that runs a script: its text, its key and its arguments."""
        super().__init__("", prefix)
        self._run = run

    async def get(self, n: int) -> Any:
        """HGETALL."""
        flat = iter(await self._run(_GET, self._key(self.ids[n]), []))
        return {field.decode(): json.loads(value) for field, value in zip(flat, flat, strict=True)}

    def set(self, n: int) -> Awaitable[Any]:
        """HSET and PEXPIRE."""
        return self._run(_SET, self._key(self.ids[n]), self._arguments(n))

    async def create(self, n: int) -> str:
        """HSET and PEXPIRE."""
        session_id = new_id()
        await self._run(_SET, self._key(session_id), self._arguments(n))
        return session_id

    def _key(self, session_id: str) -> str:
        return f"{self.prefix}:{{{session_id}}}"

    def _arguments(self, n: int) -> list[str]:
        arguments = [str(MAX_AGE * 1000)]
        for field, value in self.values(n).items():
            arguments += (field, json.dumps(value))
        return arguments


async def peers(servers: Cluster, running: AsyncExitStack) -> dict[str, Contender]:
    """Return the cluster clients of others: redis-py, coredis and valkey-glide."""
    port = servers.servers[0].port
    plain = await running.enter_async_context(RedisCluster(host="127.0.0.1", port=port, max_connections=1000))
    shas = {text: await plain.script_load(text) for text in (_GET, _SET)}
    found: dict[str, Contender] = {
        "redis-py": Peer("redis-py", lambda text, key, args: plain.evalsha(shas[text], 1, key, *args))
    }
    with suppress(ImportError):
        import coredis  # noqa: PLC0415 - it may be missing

        other = coredis.RedisCluster("127.0.0.1", port, max_connections=1000)
        await running.enter_async_context(other)
        found["coredis"] = Peer(
            "coredis", lambda text, key, args: other.evalsha(shas[text], keys=[key], args=list(args))
        )
    with suppress(ImportError):
        import glide  # noqa: PLC0415 - it may be missing

        addresses = [glide.NodeAddress("127.0.0.1", port)]
        rust = await glide.GlideClusterClient.create(glide.GlideClusterClientConfiguration(addresses))
        running.push_async_callback(rust.close)
        scripts = {text: glide.Script(text) for text in (_GET, _SET)}  # type: ignore[no-untyped-call]
        found["valkey-glide"] = Peer(
            "glide", lambda text, key, args: rust.invoke_script(scripts[text], keys=[key], args=list(args))
        )
    return found


class Field:
    """Contenders that take turns on the same servers."""

    def __init__(self, contenders: Mapping[str, Contender], admins: Sequence[Redis]) -> None:
        self._turns = {name: Turns(contender) for name, contender in contenders.items()}
        self._admins = admins

    async def fill(self) -> None:
        """Make the sessions of all contenders."""
        for turns in self._turns.values():
            await turns.fill(SESSIONS)

    async def aclose(self) -> None:
        """Close all contenders."""
        for turns in self._turns.values():
            await turns.contender.aclose()

    async def measure(self, operation: str, tasks: int, rounds: int, seconds: float) -> dict[str, Cell]:
        """Measure an operation of the contenders that have it, and print the results."""
        row = [name for name, turns in self._turns.items() if hasattr(turns.contender, operation)]
        cells = {name: Cell(operation, tasks, name, "asyncio", name) for name in row}
        for number in range(-1, rounds):  # The first round warms up.
            first = number % len(row)
            for name in row[first:] + row[:first]:
                before = sum(map(server.seconds, self._admins))
                turn = await self._turns[name].turn(operation, tasks, seconds)
                spent = sum(map(server.seconds, self._admins)) - before
                if number >= 0:
                    cells[name].add(turn, spent)
        show([*cells.values()])
        return cells


async def throughput(
    one: str, servers: Cluster, admins: Sequence[Redis], rounds: int
) -> tuple[list[Cell], list[Verdict]]:
    """Measure get and set: the library on one Redis and on the cluster, and other cluster clients."""
    cells: list[Cell] = []
    verdicts: list[Verdict] = []
    async with AsyncExitStack() as running:
        stores = {f"N = {n}": Store(servers.url, f"n{n}", n) for n in PARTITIONS}
        field = Field({**await peers(servers, running), "one Redis": Store(one, "one", None), **stores}, admins)
        await field.fill()
        for operation in ("get", "set"):
            for tasks, limit in _FASTER.items():
                row = await field.measure(operation, tasks, rounds, 0.15)
                cells += row.values()
                if operation == "get":
                    goal = f"get, {tasks} at once, N = 64: calls/s to redis-py's cluster client"
                    verdicts.append(Verdict(goal, *ratio(row["N = 64"], row["redis-py"]), limit))
        await field.aclose()
    return cells, verdicts


async def by_reference(
    one: str, servers: Cluster, admins: Sequence[Redis], rounds: int
) -> tuple[list[Cell], list[Verdict]]:
    """Measure finding the ids of a user, by the identity, and of an address, in all partitions."""
    stores = {"one Redis": Store(one, "by-one", None), "N = 64": Store(servers.url, "by-64", 64)}
    field = Field({**stores, "by hand": ByHand(servers.url, "by-hand", 64, servers)}, admins)
    await field.fill()
    identity = await field.measure("by_identity", 1, rounds, 0.15)
    fan_out = await field.measure("fan_out", 1, rounds, 0.3)
    await field.aclose()
    goals = {
        "ids_by of the identity, N = 64: p50 to one Redis": (identity, "one Redis", _IDENTITY),
        "ids_by of another reference, N = 64: p50 to a pipeline for each master": (fan_out, "by hand", _FAN_OUT),
    }
    return [*identity.values(), *fan_out.values()], [
        Verdict(goal, *ratio(row["N = 64"], row[to], "p50"), limit, at_most=True)
        for goal, (row, to, limit) in goals.items()
    ]


async def growth(masters: int, rounds: int) -> list[tuple[int, int, Cell]]:
    """Measure how the cost grows with the number of partitions. Return masters, partitions and a cell each."""
    with cluster(masters) as servers:
        admins = pinned(servers)
        contenders = {f"{masters} masters, N = {n}": Store(servers.url, f"n{n}", n) for n in PARTITIONS}
        field = Field(contenders, admins)
        await field.fill()
        rows = [await field.measure(name, tasks, rounds, 0.2) for name, tasks in (("get", 200), ("fan_out", 1))]
        for contender in contenders.values():
            await contender.aclose()
    return [(masters, n, row[f"{masters} masters, N = {n}"]) for row in rows for n in PARTITIONS]


async def capacity(one: str, admin: Redis) -> str:
    """Compute what a cluster carries, from what a session and a call cost one server. Return a table."""
    store = Store(one, "capacity", 64)
    server.settle(admin)
    before = admin.info("memory")["used_memory"]
    await store.fill(range(20_000))
    size = (admin.info("memory")["used_memory"] - before) / 20_000
    field = Field({"64 partitions": store, "one partition": Store(one, "capacity-1", None)}, [admin])
    await field.fill()
    alone = (await field.measure("get", 1, 7, 0.2))["64 partitions"].median("server")
    batched = (await field.measure("get", 200, 7, 0.2))["one partition"].median("server")
    look = (await field.measure("fan_out", 1, 7, 0.2))["64 partitions"].median("server") / 64
    await field.aclose()
    rows: list[list[str]] = []
    for masters, partitions in ((3, 64), (30, 256), (300, 4096)):
        rates = [masters * 1e6 / spent for spent in (alone, batched)]
        share = 0.01 * partitions * look / (0.01 * partitions * look + alone)
        sessions = masters * _MEMORY / size
        rows.append(
            [str(masters), str(partitions), f"{sessions / 1e6:,.0f} M"]
            + [f"{rate / 1e3:,.0f} k" for rate in rates]
            + [f"{partitions * look / 1e3:,.1f} ms", f"{share:.0%}"]
        )
    head = ["masters", "N", "sessions", "gets/s, alone", "gets/s, in batches", "a fan-out", "1 % fan-outs take"]
    return (
        f"A session takes {size:.0f} bytes, a lone get {alone:.1f} us of a master's processor, one in a batch "
        f"{batched:.1f} us, and a look at one partition {look:.1f} us. Each master has one core and "
        f"{_MEMORY / 2**30:.0f} GiB.\n\n{tables.table(head, rows)}"
    )


def pinned(servers: Cluster) -> list[Redis]:
    """Give all servers one core, and this process another. Return a client of each server."""
    admins = [Redis(port=one.port) for one in servers.servers]
    for admin in admins:
        if others := server.pin(admin):
            os.sched_setaffinity(0, others)
    return admins


def rows(cells: Sequence[Cell]) -> str:
    """Return the tables of the results: an operation each."""
    parts: list[str] = []
    for operation in dict.fromkeys(cell.operation for cell in cells):
        row = [cell for cell in cells if cell.operation == operation]
        tasks = list(dict.fromkeys(cell.tasks for cell in row))
        lines = [
            [name, *(tables.cell(cell) + f"<br>{cell.median('p50'):.2f} ms" for cell in row if cell.name == name)]
            for name in dict.fromkeys(cell.name for cell in row)
        ]
        parts.append(tables.table([f"{operation}: calls/s, client + Redis us, p50", *map(str, tasks)], lines))
    return "\n".join(parts)


async def run(rounds: int) -> str:
    """Measure everything, and return the results as Markdown."""
    with server.own_server() as one, cluster(3) as servers, Redis.from_url(one) as admin:
        server.pin(admin)
        admins = [admin, *pinned(servers)]
        cells, verdicts = await throughput(one, servers, admins, rounds)
        more, judged = await by_reference(one, servers, admins, rounds)
        about = server.version(admin)
        admin.flushall()
        carried = await capacity(one, admin)
    grown = [found for masters in (1, 3, 6) for found in await growth(masters, max(3, rounds // 3))]
    plots.growth(grown, FOLDER / "results" / "cluster.svg")
    for verdict in [*verdicts, *judged]:
        print(f"  {verdict}")
    return (
        f"## Goals\n\n{tables.goals([*verdicts, *judged])}\n## Calls\n\n{about}, three masters; by tasks at once.\n\n"
        f"{rows([*cells, *more])}\n## Growth\n\n![What a call costs by the number of partitions](cluster.svg)\n\n"
        f"## The capacity of a cluster, computed\n\n{carried}"
    )


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender; by default 15")
    text = asyncio.run(run(parser.parse_args().rounds))
    print(f"\n{text}")
    (FOLDER / "results" / "cluster.md").write_text(f"# A cluster beside one Redis\n\n{text}")


if __name__ == "__main__":
    main()
