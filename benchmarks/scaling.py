"""The speed with many sessions, many of one user, and large values; and the memory that a session takes."""

import asyncio
import time
from collections.abc import Sequence

from redis import Redis

from benchmarks import server
from benchmarks.contenders import Contender, Json, Original, Store
from benchmarks.turns import Cell, Worker, Workers
from rss import SessionStore

TASKS = 50


def many_sessions(url: str, admin: Redis, counts: Sequence[int], rounds: int) -> list[Cell]:
    """Measure get and set of random sessions, for each number of sessions in Redis."""
    with Workers(admin, [Worker("rss", url, label=f"{n:,} sessions", sessions=n) for n in counts]) as workers:
        return [
            cell
            for operation in ("get", "set")
            for cell in workers.measure(operation, [TASKS], rounds=rounds, seconds=0.3)
        ]


def large_values(url: str, admin: Redis, sizes: Sequence[int], rounds: int) -> list[Cell]:
    """Measure get and set of a session with one more field, for each size of that field in bytes."""
    cells: list[Cell] = []
    for size in sizes:
        started = [Worker(kind, url, sessions=200, padding=size) for kind in ("rss", "evalsha", "json")]
        with Workers(admin, started) as workers:
            for operation in ("get", "set"):
                row = workers.measure(operation, [TASKS], rounds=rounds, seconds=0.15)
                for cell in row:
                    cell.name += f", {size:,} bytes"
                cells += row
    return cells


async def many_of_a_user(url: str, counts: Sequence[int]) -> list[dict[str, float]]:
    """Measure a login, a listing and a `delete_by` of one user, for each number of that user's sessions."""
    rows: list[dict[str, float]] = []
    prefix = f"{server.RUN}-users"
    async with SessionStore.from_url(url, references=["user_id", "ip"], prefix=prefix, timeout=60) as store:
        for count in counts:
            repeat = max(1, min(200, 2000 // count))
            taken = dict.fromkeys(("login", "find_by", "delete_by"), 0.0)
            for turn in range(repeat):
                user = f"{count}-{turn}"
                for start in range(0, count, 1000):
                    some = range(start, min(start + 1000, count))
                    await asyncio.gather(*(store.create({"user_id": user, "ip": str(n)}) for n in some))
                started = time.perf_counter()
                await store.create({"user_id": user, "ip": "x"})
                taken["login"] += time.perf_counter() - started
                started = time.perf_counter()
                assert len([session async for session in store.find_by("user_id", user)]) == count + 1
                taken["find_by"] += time.perf_counter() - started
                started = time.perf_counter()
                assert await store.delete_by("user_id", user) == count + 1
                taken["delete_by"] += time.perf_counter() - started
            row = {name: seconds / repeat * 1e3 for name, seconds in taken.items()}
            print(
                f"  {count:9,} sessions of a user: " + "  ".join(f"{k} {v:9,.2f} ms" for k, v in row.items()),
                flush=True,
            )
            rows.append({"sessions": count, **row})
    return rows


async def memory(url: str, admin: Redis, sessions: int) -> dict[str, float]:
    """Measure the bytes that Redis takes for a session. Two sessions share a user_id, and none share an ip."""
    found: dict[str, float] = {}
    async with SessionStore.from_url(url, references=["user_id", "ip"], prefix=f"{server.RUN}-warm") as store:
        await store.create({"user_id": 1})  # The scripts are loaded now.
    server.clear(admin)
    connections = admin.info("clients")["connected_clients"]
    kinds: Sequence[type[Contender]] = (Store, Original, Json)
    for kind in kinds:
        before = await _used(admin, connections)
        contender = kind(url, f"{server.RUN}-memory")
        contender.sharing = (2, 1)
        await contender.fill(range(sessions))
        await contender.aclose()
        found[kind.name] = (await _used(admin, connections) - before) / sessions
        print(f"  {kind.name:36} {found[kind.name]:6.0f} bytes a session", flush=True)
        server.clear(admin)
    return found


async def _used(admin: Redis, connections: int) -> int:
    """Wait until only *connections* connections are left, and return the memory that Redis uses."""
    for _ in range(500):
        if admin.info("clients")["connected_clients"] <= connections:
            break
        await asyncio.sleep(0.01)
    return int(admin.info("memory")["used_memory"])
