"""Measures the longest script that legal calls can cause: `python -m benchmarks.longest`.

While a script runs, Redis answers no other client. Each case fills a server, and makes the most expensive calls that
the store accepts, a hundred at once. SLOWLOG tells how long the longest EVALSHA took. Another process PINGs meanwhile.
The command fails if the longest script of a case is over 5 ms in the best of three repetitions.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from redis import Redis

from benchmarks import tables
from benchmarks.bystander import Bystander
from benchmarks.server import own_server, version
from rss import IdentityChanged, LimitExceeded, Reference, SessionStore

LIMIT = 5.0  # Milliseconds.
TOGETHER = 100
# Limits of the store: reference values of a write, fields of a call, ids to keep, limit times values.
VALUES = 128
FIELDS = 1000
KEEP = 1000
MEMBERS = 1000
# Fields of a large session, which several writes make. Reading takes about half a microsecond for each field.
MANY = 4000


@dataclass
class Bench:
    """A server, and the longest script of the calls inside of `watched`."""

    url: str
    admin: Redis
    bystander: Bystander
    longest: float = 0.0
    scripts: int = 0
    stores: int = field(default=0)

    @asynccontextmanager
    async def store(self, **options: Any) -> AsyncIterator[SessionStore]:
        """Open a store on an empty prefix, with the reference `tags` unless another is given."""
        self.stores += 1
        settings = {"references": ["tags"], "timeout": 120, "prefix": f"longest{self.stores}", **options}
        async with SessionStore.from_url(self.url, **settings) as store:
            yield store

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the longest script of the calls in the body, in milliseconds, and let the bystander PING."""
        self.admin.config_resetstat()
        self.admin.slowlog_reset()
        with self.bystander.pinging():
            yield
        entries = self.admin.slowlog_get(-1)
        took = [one["duration"] / 1000 for one in entries if one["command"].upper().startswith(b"EVALSHA")]
        self.longest = max(took, default=0.0)
        self.scripts = self.admin.info("commandstats")["cmdstat_evalsha"]["calls"]


Case = Callable[[Bench], Awaitable[None]]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Register a case under a name."""

    def register(function: Case) -> Case:
        CASES[name] = function
        return function

    return register


async def at_once(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Wait for calls that go out together. A refusal is a result, too."""
    replies = await asyncio.gather(*calls, return_exceptions=True)
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, LimitExceeded | IdentityChanged):
            raise reply
    return replies


async def make(store: SessionStore, values: Sequence[Mapping[str, Any]], max_age: str | None = None) -> list[str]:
    """Create sessions with these values, a hundred at a time, and return their ids."""
    ids: list[str] = []
    for start in range(0, len(values), 100):
        ids += await at_once(store.create(dict(one), max_age) for one in values[start : start + 100])
    return ids


async def widen(store: SessionStore, ids: Sequence[str], fields: int) -> None:
    """Give each session *fields* fields, by calls of FIELDS fields each."""
    for first in range(0, fields, FIELDS):
        names = range(first, first + FIELDS)
        for session_id in ids:
            await store.set(session_id, {f"field{n}": n for n in names})


def tags(n: int = 0) -> list[str]:
    """Return as many values as a write may have. Another *n* gives other values."""
    return [f"{n}-{i}" for i in range(VALUES)]


def names(first: int = 0) -> list[str]:
    """Return as many names of fields as a call may have."""
    return [f"field{n}" for n in range(first, first + FIELDS)]


# Lists of references.


@case("create, 128 references, sets shared")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        await make(store, [{"tags": tags()}] * TOGETHER)
        with bench.watched():
            await at_once(store.create({"tags": tags()}) for _ in range(TOGETHER))


@case("create, 128 references, sets of its own")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        with bench.watched():
            await at_once(store.create({"tags": tags(n)}) for n in range(TOGETHER))


@case("set, the same 128 references")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": tags()}] * TOGETHER)
        with bench.watched():
            await at_once(store.set(session_id, {"tags": tags()}) for session_id in ids)


@case("set, from 128 references to 128 others")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": tags(n)} for n in range(TOGETHER)])
        with bench.watched():
            await at_once(store.set(session_id, {"tags": tags(n + 1000)}) for n, session_id in enumerate(ids))


@case("touch, 128 references, a longer max_age")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": tags(n)} for n in range(TOGETHER)])
        with bench.watched():
            await at_once(store.touch(session_id, "60 days") for session_id in ids)


@case("get that renews, 128 references")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": tags(n)} for n in range(TOGETHER)], "1h")
        await asyncio.sleep(0.01)
        with bench.watched():
            await at_once(store.get(session_id, touch=True) for session_id in ids)


@case("rotate, 128 references")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": tags()}] * TOGETHER)
        with bench.watched():
            await at_once(store.rotate(session_id) for session_id in ids)


@case("rotate, from 128 references to 128 others")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": tags(n)} for n in range(TOGETHER)])
        with bench.watched():
            await at_once(store.rotate(session_id, {"tags": tags(n + 1000)}) for n, session_id in enumerate(ids))


@case("unset of 128 references")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": tags()}] * TOGETHER)
        with bench.watched():
            await at_once(store.unset(session_id, ["tags"]) for session_id in ids)


@case("delete, 128 references")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": tags()}] * TOGETHER)
        with bench.watched():
            await at_once(store.delete(session_id) for session_id in ids)


# By reference.


@case("delete_by, sessions with 128 references")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        await make(store, [{"tags": tags()}] * 3 * TOGETHER)
        with bench.watched():
            assert await store.delete_by("tags", tags()[0]) == 3 * TOGETHER


@case("delete_by, 10,000 sessions, 1,000 ids to keep")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": "a"}] * 10_000)
        with bench.watched():
            assert await store.delete_by("tags", "a", keep=ids[:KEEP]) == 10_000 - KEEP


@case("delete_by, sessions of 4,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        await widen(store, await make(store, [{"tags": "a"}] * 20), MANY)
        with bench.watched():
            assert await store.delete_by("tags", "a") == 20


@case("ids_by, strict, 128 references")
async def _(bench: Bench) -> None:
    async with bench.store(references={"tags": Reference(strict=True)}) as store:
        await make(store, [{"tags": tags()}] * 3 * TOGETHER)
        with bench.watched():
            assert len(await store.ids_by("tags", tags()[0])) == 3 * TOGETHER


@case("find_by, sessions of 1,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        await widen(store, await make(store, [{"tags": "a"}] * TOGETHER), 1000)
        with bench.watched():
            assert len([one async for one in store.find_by("tags", "a")]) == TOGETHER


@case("find_by, sessions of 4,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        await widen(store, await make(store, [{"tags": "a"}] * 20), MANY)
        with bench.watched():
            assert len([one async for one in store.find_by("tags", "a")]) == 20


# Fields.


@case("get, 1,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{}] * TOGETHER)
        await widen(store, ids, 1000)
        with bench.watched():
            await at_once(store.get(session_id) for session_id in ids)


@case("get, 4,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{}] * 20)
        await widen(store, ids, MANY)
        with bench.watched():
            await at_once(store.get(session_id) for session_id in ids)


@case("get of 1,000 names of 4,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{}] * 20)
        await widen(store, ids, MANY)
        with bench.watched():
            await at_once(store.get(session_id, names(5000)) for session_id in ids * 5)


@case("get, a value of 1 MB")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"note": "x" * 2**20}] * 20)
        with bench.watched():
            await at_once(store.get(session_id) for session_id in ids)


@case("set of 1,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{}] * TOGETHER)
        with bench.watched():
            await at_once(store.set(session_id, dict.fromkeys(names(), 1)) for session_id in ids)


@case("set of 1,000 fields that expects 1,000")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{}] * TOGETHER)
        await widen(store, ids, 1000)
        expected = {name: n for n, name in enumerate(names())}
        with bench.watched():
            await at_once(store.set(one, dict.fromkeys(names(), 1), expect=expected) for one in ids)


@case("unset of 1,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{}] * TOGETHER)
        await widen(store, ids, 1000)
        with bench.watched():
            await at_once(store.unset(session_id, names()) for session_id in ids)


@case("pop of 1,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{}] * TOGETHER)
        await widen(store, ids, 1000)
        with bench.watched():
            await at_once(store.pop(session_id, names()) for session_id in ids)


@case("rotate, 4,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": "a"}] * 20)
        await widen(store, ids, MANY)
        with bench.watched():
            await at_once(store.rotate(session_id) for session_id in ids)


@case("delete, 4,000 fields")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": "a"}] * 20)
        await widen(store, ids, MANY)
        with bench.watched():
            await at_once(store.delete(session_id) for session_id in ids)


# Limits, strictness, grace, and ids of expired sessions.


async def full(bench: Bench, values: int, limit: int, **options: Any) -> None:
    """Let sessions join *values* sets at once, each of which has as many sessions as its limit."""
    async with bench.store(references={"tags": Reference(limit=limit, **options)}) as store:
        for value in range(values):
            await make(store, [{"tags": f"0-{value}"}] * limit)
        with bench.watched():
            await at_once(store.create({"tags": tags()[:values]}) for _ in range(TOGETHER))


@case("create, a full set of 1,000, evicts")
async def _(bench: Bench) -> None:
    await full(bench, 1, MEMBERS)


@case("create, a full set of 1,000, refuses")
async def _(bench: Bench) -> None:
    await full(bench, 1, MEMBERS, on_limit="refuse")


@case("create, 10 full sets of 100")
async def _(bench: Bench) -> None:
    await full(bench, 10, MEMBERS // 10)


@case("create, 10 full sets of 100, strict")
async def _(bench: Bench) -> None:
    await full(bench, 10, MEMBERS // 10, strict=True)


@case("get, strict, 128 references")
async def _(bench: Bench) -> None:
    async with bench.store(references={"tags": Reference(strict=True)}) as store:
        ids = await make(store, [{"tags": tags()}] * TOGETHER)
        with bench.watched():
            await at_once(store.get(session_id) for session_id in ids)


@case("get through many rotations with grace")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        hops = [await make(store, [{"tags": "a"}] * TOGETHER)]
        for _ in range(40):
            hops.append(await at_once(store.rotate(session_id, grace="1h") for session_id in hops[-1]))
        with bench.watched():
            for back in (-8, -9, -10, 0):  # Ids at the most rotations that are followed, and beyond.
                await at_once(store.get(session_id) for session_id in hops[back])


@case("create, a set of 20,000 expired ids")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        await make(store, [{"tags": "a"}])
        await make(store, [{"tags": "a"}] * 20_000, "500ms")
        await asyncio.sleep(0.6)
        with bench.watched():
            await at_once(store.create({"tags": "a"}) for _ in range(TOGETHER))


@case("ids_by, a set of 20,000 expired ids")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        await make(store, [{"tags": "a"}])
        await make(store, [{"tags": "a"}] * 20_000, "500ms")
        await asyncio.sleep(0.6)
        with bench.watched():
            assert len(await store.ids_by("tags", "a")) == 1


# Fences, blocks, and identities.


async def fence(store: SessionStore, values: Iterable[str]) -> None:
    """Leave a fence beside each set, by a block that is over."""
    for value in values:
        await store.block("tags", value, "1ms")


@case("create, 128 references with fences")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        await fence(store, tags())
        with bench.watched():
            await at_once(store.create({"tags": tags()}) for _ in range(TOGETHER))


@case("rotate, from 128 references to 128 others, all with fences")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        ids = await make(store, [{"tags": tags(1)}] * TOGETHER)
        await asyncio.gather(fence(store, tags(2)), *(store.unblock("tags", value) for value in tags(1)))
        with bench.watched():
            await at_once(store.rotate(session_id, {"tags": tags(2)}) for session_id in ids)


@case("create, the last of 128 references is blocked")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        await fence(store, tags()[:-1])
        await store.block("tags", tags()[-1], "1h")
        with bench.watched():
            await at_once(store.create({"tags": tags()}) for _ in range(TOGETHER))


@case("block, 10,000 sessions")
async def _(bench: Bench) -> None:
    async with bench.store() as store:
        await make(store, [{"tags": "a"}] * 10_000)
        with bench.watched():
            assert await store.block("tags", "a", "1h") == 10_000


@case("rotate to an identity with 1,000 sessions, its limit")
async def _(bench: Bench) -> None:
    references = {"user_id": Reference(identity=True, limit=MEMBERS), "tags": Reference()}
    async with bench.store(references=references) as store:
        await make(store, [{"user_id": 1}] * MEMBERS)
        ids = await make(store, [{"user_id": n + 2, "tags": tags()[:-1]} for n in range(TOGETHER)])
        with bench.watched():
            await at_once(store.rotate(session_id, {"user_id": 1}) for session_id in ids)


@case("set, 1,000 fields and another identity, refused")
async def _(bench: Bench) -> None:
    async with bench.store(references={"user_id": Reference(identity=True), "tags": Reference()}) as store:
        ids = await make(store, [{"user_id": 1, "tags": tags()[:-1]}] * TOGETHER)
        values = {"user_id": 2, **dict.fromkeys(names()[:-1], 1)}
        with bench.watched():
            await at_once(store.set(session_id, values) for session_id in ids)


@dataclass(frozen=True)
class Longest:
    """The longest script and the longest PING of a case in milliseconds, and the number of scripts.

    The numbers are those of the best repetition: the one with the shortest longest script.
    """

    case: str
    milliseconds: float
    scripts: int
    ping: float

    @property
    def kept(self) -> bool:
        """Whether the longest script is within the limit."""
        return self.milliseconds <= LIMIT


async def measure(repetitions: int, only: str = "") -> tuple[list[Longest], str]:
    """Measure all cases whose names contain *only* on a new server. Return them, and the version of the server."""
    found: list[Longest] = []
    with own_server() as url, Redis.from_url(url, socket_timeout=120) as admin, Bystander(url) as bystander:
        # Microseconds. With 0, the commands inside of the scripts push the scripts out of the log.
        admin.config_set("slowlog-log-slower-than", 100)
        admin.config_set("slowlog-max-len", 100_000)
        for name, function in CASES.items():
            if only not in name:
                continue
            best: Longest | None = None
            started = time.monotonic()
            for _ in range(repetitions):
                admin.flushall()
                bench = Bench(url, admin, bystander)
                await function(bench)
                took = Longest(name, bench.longest, bench.scripts, bystander.longest)
                best = min(best or took, took, key=lambda one: one.milliseconds)
            assert best is not None
            found.append(best)
            print(
                f"  {'kept  ' if best.kept else 'MISSED'} {name:58} {best.milliseconds:8.2f} ms, "
                f"of {best.scripts} scripts; PING {best.ping:.2f} ms ({time.monotonic() - started:.1f} s)",
                flush=True,
            )
        return found, version(admin)


def table(found: Sequence[Longest], server: str) -> str:
    """Return the cases as Markdown, the longest first."""
    rows = sorted(found, key=lambda one: -one.milliseconds)
    lines = ([one.case, f"{one.milliseconds:.2f} ms", f"{one.scripts:,}", f"{one.ping:.2f} ms"] for one in rows)
    return tables.table([server, "longest script", "scripts", "longest PING"], lines)


def main() -> None:
    """Print all, and fail if one is over the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.longest", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", default="", metavar="WORDS", help="only cases with these words in their names")
    options = parser.parse_args()
    found, _ = asyncio.run(measure(options.repetitions, options.only))
    if over := [one.case for one in found if not one.kept]:
        sys.exit(f"longer than {LIMIT:g} ms: {'; '.join(over)}")


if __name__ == "__main__":
    main()
