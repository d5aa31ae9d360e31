"""The speed with many sessions, many of one user, and large values; and the memory that a session takes."""

import asyncio
import time
from collections.abc import Sequence

from redis.asyncio import Redis

from benchmarks.contenders import MAX_AGE, RUN, Blob, Coalesced, Contender, Original, Plain, prepare
from benchmarks.measure import Cell, at_random, measure
from benchmarks.throughput import call, clear

TASKS = 50

# Makes sessions as the store makes them, without the way to Redis: a million is a matter of seconds.
_FILL = """
local prefix, max_age, first, last = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local now = redis.call("TIME")[1] .. "000"
for n = first, last do
  local id, user, ip = string.format("%032d", n), math.floor(n / 2), "10.0." .. math.floor(n / 250) .. "." .. n % 250
  local key = prefix .. ":{" .. id .. "}"
  redis.call("HSET", key, "user_id", user, "ip", ip, "visits", 0, "id", id, "_created", now)
  redis.call("PEXPIRE", key, max_age)
  for _, set in ipairs({ prefix .. ":user_id:{" .. user .. "}", prefix .. ":ip:{" .. ip .. "}" }) do
    redis.call("SADD", set, id)
    redis.call("PEXPIRE", set, max_age)
  end
end
"""


async def many_sessions(url: str, counts: Sequence[int], rounds: int) -> list[Cell]:
    """Measure get and set with so many sessions in Redis, at random among them."""
    stores = [Coalesced(url, f"{RUN}-{count}") for count in counts]
    cells: list[Cell] = []
    async with Redis.from_url(url, socket_timeout=None) as admin:
        for store, count in zip(stores, counts, strict=True):
            for first in range(0, count, 5000):
                last = min(first + 5000, count) - 1
                await admin.eval(_FILL, 0, store.prefix, str(MAX_AGE * 1000), str(first), str(last))
            assert (await store.get(count - 1))["user_id"] == (count - 1) // 2
        for operation in ("get", "set"):
            row = [Cell(operation, f"{count:,} sessions", TASKS, "asyncio") for count in counts]
            await _fill_in(row, admin, stores, counts, rounds=rounds, seconds=0.3)
            cells += row
        for store in stores:
            await store.aclose()
        await clear(admin)
    return cells


async def many_of_a_user(url: str, counts: Sequence[int]) -> list[dict[str, float]]:
    """Measure listing and ending all sessions of a user who has so many, and what a login of that user takes then."""
    rows: list[dict[str, float]] = []
    async with Redis.from_url(url) as admin:
        contender = Coalesced(url, f"{RUN}-users")
        for count in counts:
            repeat = max(1, min(200, 2000 // count))
            taken = dict.fromkeys(("login", "find_by", "delete_by"), 0.0)
            for turn in range(repeat):
                user = f"{count}-{turn}"
                for start in range(0, count, 1000):
                    some = range(start, min(start + 1000, count))
                    await asyncio.gather(*(contender.store.create({"user_id": user, "ip": str(n)}) for n in some))
                started = time.perf_counter()
                await contender.store.create({"user_id": user, "ip": "x"})
                taken["login"] += time.perf_counter() - started
                started = time.perf_counter()
                assert len([session async for session in contender.store.find_by("user_id", user)]) == count + 1
                taken["find_by"] += time.perf_counter() - started
                started = time.perf_counter()
                assert await contender.store.delete_by("user_id", user) == count + 1
                taken["delete_by"] += time.perf_counter() - started
            row = {name: seconds / repeat * 1e3 for name, seconds in taken.items()}
            print(
                f"  {count:9,} sessions of a user: " + "  ".join(f"{k} {v:9,.2f} ms" for k, v in row.items()),
                flush=True,
            )
            rows.append({"sessions": count, **row})
        await contender.aclose()
        await clear(admin)
    return rows


async def large_values(url: str, sizes: Sequence[int], rounds: int) -> list[Cell]:
    """Measure reading and writing a session with one more field, of so many bytes."""
    cells: list[Cell] = []
    kinds: Sequence[type[Contender]] = (Coalesced, Plain, Blob)
    async with Redis.from_url(url) as admin:
        for size in sizes:
            contenders = [kind(url, f"{RUN}-{n}-{size}") for n, kind in enumerate(kinds)]
            for contender in contenders:
                contender.more = {"note": "x" * size}
                await prepare(contender, range(200))
            for operation in ("get", "set"):
                row = [Cell(operation, f"{kind.name}, {size:,} bytes", TASKS, "asyncio") for kind in kinds]
                await _fill_in(row, admin, contenders, [200] * len(row), rounds=rounds, seconds=0.15)
                cells += row
            for contender in contenders:
                await contender.aclose()
            await clear(admin)
    return cells


async def _used(admin: Redis, connections: int) -> int:
    """Return what Redis uses when there are no more connections than that: what these take is not a session's."""
    for _ in range(500):
        if (await admin.info("clients"))["connected_clients"] <= connections:
            break
        await asyncio.sleep(0.01)
    return int((await admin.info("memory"))["used_memory"])


async def memory(url: str, sessions: int) -> dict[str, float]:
    """Measure the bytes that Redis takes for a session: of ours, the original's layout, and a JSON text."""
    found: dict[str, float] = {}
    async with Redis.from_url(url) as admin:
        connections = (await admin.info("clients"))["connected_clients"]
        async with Coalesced(url, f"{RUN}-memory").store as store:
            await store.set("a", {})  # The scripts are there now.
        await clear(admin)
        for kind in (Coalesced, Original, Blob):
            before = await _used(admin, connections)
            contender = kind(url, f"{RUN}-memory")
            await prepare(contender, range(sessions))
            await contender.aclose()
            found[kind.name] = (await _used(admin, connections) - before) / sessions
            print(f"  {kind.name:34} {found[kind.name]:6.0f} bytes a session", flush=True)
            await clear(admin)
    return found


async def _fill_in(
    row: Sequence[Cell],
    admin: Redis,
    contenders: Sequence[Contender],
    sessions: Sequence[int],
    *,
    rounds: int,
    seconds: float,
) -> None:
    """Measure each cell with its contender, among so many sessions; another one begins in each round. Print them."""
    for turn in range(rounds):
        for n in range(len(row)):
            at = (n + turn) % len(row)
            work = call(contenders[at], row[at].operation)
            await measure(row[at], admin, work, at_random(sessions[at]), seconds)
    for cell in row:
        spread = f"{min(cell.rates):9,.0f} to {max(cell.rates):9,.0f}"
        print(f"  {cell.operation} {cell.contender:44} {cell.rate:9,.0f}/s ({spread})", flush=True)
