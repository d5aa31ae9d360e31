"""Measures this library beside others: `python -m benchmarks`. `benchmarks/README.md` says how.

The server is the one that REDIS_URL names, else an embedded one, through TCP on the loopback.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from benchmarks import application, commands, goals, longest, plots, scaling, server, tables
from benchmarks.contenders import OPERATIONS, Original, Store
from benchmarks.turns import CONTENDERS, FOLDER, Cell, Unavailable, Worker, Workers

RESULTS = FOLDER / "results"
TASKS = (1, 10, 50, 200)
_ON_UVLOOP = ("rss", "evalsha", "register_script")
_QUICK = ("rss", "evalsha", "register_script", "ioredis", "starsessions", "json")
_PACKAGES = (
    "redis", "hiredis", "uvloop", "starsessions", "aiohttp-session", "litestar", "fastapi-redis-sdk", "aiohttp",
    "starlette", "quart", "quart-session", "uvicorn",
)  # fmt: skip


def _options() -> argparse.Namespace:
    def words(known: Sequence[str]) -> Any:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose of {', '.join(known)}")
            return chosen

        return parse

    def numbers(text: str) -> list[int]:
        return [int(one) for one in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look at the calls, in under a minute")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="also the library as it is in another checkout")
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "both"), help="the event loops; by default both")
    parser.add_argument("--operations", type=words(OPERATIONS), help=f"of {','.join(OPERATIONS)}")
    parser.add_argument("--contenders", type=words(tuple(CONTENDERS)), help=f"of {','.join(CONTENDERS)}")
    parser.add_argument("--tasks", type=numbers, help=f"by default {','.join(map(str, TASKS))}")
    parser.add_argument("--rounds", type=int, help="turns of each contender; by default 15")
    parser.add_argument("--seconds", type=float, help="length of a turn; by default 0.15")
    parser.add_argument("--unpinned", action="store_true", help="let the scheduler choose the cores")
    return parser.parse_args()


def _start(url: str, admin: Redis, options: argparse.Namespace) -> Iterator[Worker]:
    """Start a worker for each contender, checkout and loop."""
    loop = options.loop or ("asyncio" if options.quick else "both")
    for contender in options.contenders or (_QUICK if options.quick else CONTENDERS):
        both = ("asyncio", "uvloop") if contender in _ON_UVLOOP else ("asyncio",)
        checkouts = ["", str(options.before.resolve())] if contender == "rss" and options.before else [""]
        for checkout, one in itertools.product(checkouts, both if loop == "both" else (loop,)):
            label = "redis-session-sets, before" if checkout else ""
            try:
                if contender == "fastapi-redis-sdk":
                    _need_ttls_of_fields(admin)
                yield Worker(contender, url, loop=one, checkout=checkout, label=label)
            except Unavailable as error:
                print(f"{contender} is skipped: {error}")


def _need_ttls_of_fields(admin: Redis) -> None:
    try:
        admin.execute_command("HTTL", server.RUN, "FIELDS", "1", "x")  # type: ignore[no-untyped-call]
    except ResponseError:
        raise Unavailable("the server has no HEXPIRE") from None


def _calls(url: str, admin: Redis, options: argparse.Namespace) -> tuple[list[Cell], dict[str, str], dict[str, str]]:
    """Measure the calls. Return the cells, what each contender lacks, and the versions that workers report."""
    rounds = options.rounds or (3 if options.quick else 15)
    seconds = options.seconds or (0.05 if options.quick else 0.15)
    tasks = options.tasks or ((1, 200) if options.quick else TASKS)
    cells: list[Cell] = []
    with Workers(admin, list(_start(url, admin, options)), pinned=not options.unpinned) as workers:
        for operation in sorted(options.operations or OPERATIONS, key=OPERATIONS.index):
            cells += workers.measure(operation, tasks, rounds=rounds, seconds=seconds)
        lacks = {worker.label: worker.lacks for worker in workers.workers}
        versions = {name: text for worker in workers.workers for name, text in worker.versions.items()}
    return cells, lacks, versions


def _machine(url: str, admin: Redis, versions: dict[str, str]) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "server": server.version(admin),
        "transport": url.split("://", 1)[0],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES} | versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def _judge(verdicts: Sequence[goals.Verdict]) -> None:
    for verdict in verdicts:
        print(f"  {verdict}")


def _all(options: argparse.Namespace) -> None:
    """Measure everything, and write the results."""
    load = os.getloadavg()[0]
    started = time.monotonic()

    def step(title: str) -> None:
        print(f"\n=== {title} ({time.monotonic() - started:.0f} s)", flush=True)

    with server.any_server() as url, Redis.from_url(url, socket_timeout=60) as admin:
        step("calls")
        cells, lacks, versions = _calls(url, admin, options)
        step("many sessions")
        many = scaling.many_sessions(url, admin, (1_000, 100_000, 1_000_000), 7)
        step("large values")
        large = scaling.large_values(url, admin, (100, 1_000, 10_000, 100_000), 5)
        step("many sessions of a user")
        of_a_user = asyncio.run(scaling.many_of_a_user(url, (1, 10, 1_000, 100_000)))
        server.clear(admin)
        step("memory")
        memory = asyncio.run(scaling.memory(url, admin, 20_000))
        step("applications")
        apps = asyncio.run(application.application(url, 3))
        server.clear(admin)
        machine = {**_machine(url, admin, versions), "load": load}
    step("commands and the server's time")
    rows, version = asyncio.run(commands.measure(rounds=5))
    step("the longest scripts")
    scripts, _ = asyncio.run(longest.measure(repetitions=3))
    step("the goals")
    verdicts = [
        *goals.of_calls(cells),
        *goals.of_many_sessions(many),
        goals.of_memory(memory[Store.name], memory[Original.name]),
    ]
    _judge(verdicts)
    for kept, text in commands.verdicts(rows, version):
        print(f"  {'kept  ' if kept else 'MISSED'} {text}")

    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    sections = {
        "Goals": tables.goals(verdicts),
        "Ratios": "\n".join(filter(None, (tables.ratios(cells, to) for to in ("evalsha", "ioredis", "before")))),
        "Calls": tables.calls(cells),
        "What other libraries do not do": tables.lacks(lacks),
        "Commands and the server's time": commands.table(rows, version),
        "The longest scripts": longest.table(scripts, version),
        "Sizes": "\n".join(
            (
                tables.many_sessions(many),
                tables.of_a_user(of_a_user),
                tables.large_values(large),
                tables.memory(memory),
            )
        ),
        "Applications": tables.applications(apps),
        "Machine and versions": f"{machine['cores']} cores, {machine['system']}, {machine['server']}, "
        f"Python {machine['python']}, {packages}; {machine['date']}, load at the start {load:.1f}.\n",
    }
    text = "\n".join(f"### {title}\n\n{body}" for title, body in sections.items())
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tables.md").write_text(text)
    tables.include(f"![Calls a second by the number of tasks](results/throughput.svg)\n\n{text}", FOLDER / "README.md")
    summary = tables.summary(cells)
    (RESULTS / "summary.md").write_text(summary)
    tables.include(summary, FOLDER.parent / "README.md")
    plots.throughput(cells, RESULTS / "throughput.svg")
    found = {
        "machine": machine,
        "contenders": lacks,
        "calls": [dataclasses.asdict(cell) for cell in cells],
        "many sessions": [dataclasses.asdict(cell) for cell in many],
        "large values": [dataclasses.asdict(cell) for cell in large],
        "sessions of a user": of_a_user,
        "memory": memory,
        "applications": apps,
        "commands": [dataclasses.asdict(row) for row in rows],
        "longest scripts": [dataclasses.asdict(one) for one in scripts],
        "goals": [{**dataclasses.asdict(one), "kept": one.kept} for one in verdicts],
    }
    (RESULTS / "results.json").write_text(json.dumps(_rounded(found), separators=(",", ":")) + "\n")
    step("done")


def _some(options: argparse.Namespace) -> None:
    """Measure some calls and print them."""
    with server.any_server() as url, Redis.from_url(url, socket_timeout=60) as admin:
        cells, _, _ = _calls(url, admin, options)
    print()
    _judge([*goals.of_calls(cells)])


def _rounded(found: Any) -> Any:
    """Return the same data with four digits of each number, since further digits are noise."""
    if isinstance(found, dict):
        return {name: _rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_rounded(value) for value in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found


def main() -> None:
    """Measure everything, or what the options choose."""
    options = _options()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 16384), most))  # Some contenders use a connection a task.
    if any((options.quick, options.operations, options.contenders, options.tasks, options.rounds, options.seconds)):
        _some(options)
    else:
        _all(options)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
    sys.exit()
