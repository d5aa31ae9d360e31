"""Run the faults of one deployment in order. The course is the same for all deployments."""

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from redis import Redis

from benchmarks.chaos.others import Runner, runners
from benchmarks.chaos.scene import Fault, Phase, Scene, listening
from benchmarks.chaos.tasks import TASKS, Task
from rss import Reference, SessionStore
from rss.testing import ClusterServer

# Keys that are looked at in one pipeline.
_AT_ONCE: Final = 1000


@dataclass(frozen=True)
class Options:
    """The options of a run."""

    #: One of the references is strict.
    strict: bool
    #: Two minutes in all.
    quick: bool

    @property
    def seconds(self) -> float:
        """How long most faults last."""
        return 1 if self.quick else 3

    @property
    def store(self) -> dict[str, Any]:
        """The options of a store. Each has a prefix of its own."""
        references = {"user_id": Reference(identity=True), "ip": Reference(strict=self.strict)}
        return {"references": references, "prefix": f"chaos-{secrets.token_hex(4)}", "timeout": 10, "events": True}


async def play(
    store: SessionStore,
    options: Options,
    servers: Callable[[], Iterable[ClusterServer]],
    plan: Callable[[Scene], list[Fault]],
    *,
    durable: bool = False,
    beside: Callable[[Scene], list[Runner]] = lambda _: [],
) -> Scene:
    """Let tasks use a store while the faults of a plan happen, and check all keys at the end.

    *servers*: returns the masters. *durable*: half of the revocations wait for a replica. *beside*: returns other tasks
    that run meanwhile.
    """
    quiet, patience = (2, 1) if options.quick else (4, 10)
    scene, stop = Scene(store.operations.layout, quiet, patience), asyncio.Event()
    tasks = [Task(store, scene, number, durable=durable) for number in range(TASKS)]
    scene.workers = [*tasks]
    runs = [*tasks, *runners(store, scene), *beside(scene)]
    running = [asyncio.create_task(task.run(stop)) for task in runs]
    try:
        with listening(scene):
            await asyncio.sleep(1 if options.quick else 2)  # The tasks have their first sessions now.
            for fault in plan(scene):
                await scene.run(fault)
                for task in running:
                    if task.done():
                        task.result()
            stop.set()
            await asyncio.gather(*running)
            await asyncio.sleep(1)
            scene.phases.append(Phase("at the end"))
            await scene.settle()
            await asyncio.to_thread(_look_at_keys, scene, tasks, servers())
            async for finding in store.maintenance.check():
                if finding.kind != "stale":
                    scene.now.wrong[f"check: {finding.kind}"] += 1
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return scene


def _look_at_keys(scene: Scene, tasks: list[Task], masters: Iterable[ClusterServer]) -> None:
    """Look at every key on every master, without the library."""
    layout, ttls = scene.layout, dict[str, int]()
    sessions, sets = dict[str, bool](), dict[str, set[str]]()
    for master in masters:
        with Redis(port=master.port, decode_responses=True) as client:
            names = [str(name) for name in client.scan_iter(f"{layout.prefix}:*", 1000)]
            for start in range(0, len(names), _AT_ONCE):
                some = names[start : start + _AT_ONCE]
                types = _all(client, "TYPE", some)
                ttls |= zip(some, _all(client, "PTTL", some), strict=True)
                hashes = [name for name, kind in zip(some, types, strict=True) if kind == "hash"]
                sessions |= zip(hashes, map(bool, _all(client, "HEXISTS", hashes, "id")), strict=True)
                members = [name for name, kind in zip(some, types, strict=True) if kind == "set"]
                sets |= zip(members, map(set, _all(client, "SMEMBERS", members)), strict=True)
    for name, ttl in ttls.items():
        if ttl == -1 and not name.endswith("_meta"):
            scene.now.wrong["a key without a TTL"] += 1
    for task in tasks:
        for session_id, model in task.live.items():
            key, partition = layout.place(session_id)
            if not sessions.get(key):
                scene.now.wrong["a live session has no key"] += 1
            for name, value in model.references:
                held = sets.get(layout.reference(name, value, partition), ())
                scene.now.unreachable += session_id not in held
        for session_id in task.ended:
            scene.now.revived += sessions.get(layout.place(session_id)[0], False)


def _all(client: Redis, command: str, names: list[str], *more: str) -> list[Any]:
    """Run a command on each of these keys."""
    with client.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.execute_command(command, name, *more)  # type: ignore[no-untyped-call]
        return pipeline.execute()
