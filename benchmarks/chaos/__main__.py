"""Break Redis under load, and count errors and lost data: `python -m benchmarks.chaos`.

Forty tasks work on sessions of their own, so each knows what its sessions must hold. Meanwhile one fault happens after
the other. If an operation raises StoreUnavailable, both outcomes are right. At the end of each deployment every key is
checked, and `store.maintenance.check()` runs.

It fails if anything differs from what the tasks know, or if an acknowledged write is lost that the server must keep.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Final

from redis import Redis

from benchmarks import server
from benchmarks.chaos import cluster, one, sentinel
from benchmarks.chaos.deployment import Options
from benchmarks.chaos.report import failures, merged, show
from benchmarks.chaos.scene import Phase, Scene

DEPLOYMENTS: Final[dict[str, tuple[str, Callable[[Options], Awaitable[list[Scene]]]]]] = {
    "one": ("one server", one.run),
    "sentinel": ("a master and a replica behind three Sentinels", sentinel.run),
    "cluster": ("a cluster of three masters", cluster.run),
}


def main() -> None:
    """Run it, and fail if something is wrong that must not be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--on", default=",".join(DEPLOYMENTS), help="deployments: %(default)s")
    parser.add_argument("--minutes", type=float, default=10, help="repeat the faults for so long in all: %(default)s")
    parser.add_argument("--quick", action="store_true", help="short faults, each once, in two minutes; judge no times")
    parser.add_argument("--strict", action="store_true", help="one of the references is strict")
    arguments = parser.parse_args()
    names = arguments.on.split(",")
    if unknown := set(names) - DEPLOYMENTS.keys():
        parser.error(f"--on must name some of {', '.join(DEPLOYMENTS)}, not {', '.join(sorted(unknown))}")
    options = Options(strict=arguments.strict, quick=arguments.quick)
    with server.own_server() as url, Redis.from_url(url) as admin:
        version = server.version(admin)
    failed = False
    for name in names:
        title, run = DEPLOYMENTS[name]
        phases = merged(_rounds(run, options, 0 if options.quick else arguments.minutes * 60 / len(names)))
        show(f"{version}, {title}", phases)
        for phase in phases:
            for failure in failures(phase, times=not options.quick):
                failed = True
                print(f"FAILED: {phase.name}: {failure}", flush=True)
    sys.exit(1 if failed else 0)


def _rounds(run: Callable[[Options], Awaitable[list[Scene]]], options: Options, seconds: float) -> list[Phase]:
    """Run all faults at least once, and again while there is time for another round."""
    began, rounds, phases = time.monotonic(), 0, list[Phase]()
    while not rounds or (time.monotonic() - began) * (rounds + 1) / rounds < seconds:
        scenes = asyncio.run(_finish(run(options)))
        phases += [phase for scene in scenes for phase in scene.phases if phase.name != "start"]
        rounds += 1
    return phases


async def _finish(running: Awaitable[list[Scene]]) -> list[Scene]:
    return await running


if __name__ == "__main__":
    main()
