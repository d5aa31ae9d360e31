"""Draws the panels of grafana.json: `python -m tests.picture_dashboard` writes rss-dashboard.svg in rss/guides.

A store is in trouble for a while. A Prometheus, whose program must be on PATH, scrapes its metrics and answers the
queries of the panels. Grafana draws them in another style.
"""

import asyncio
import json
import math
import random
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter
from prometheus_client import CollectorRegistry, start_http_server

from rss import Reference, SessionError, SessionStore
from rss.observe.prometheus import Prometheus
from rss.testing import free_port
from tests.picture_cli import GUIDES
from tests.servers import client_of, own_server

_TASKS: Final = 30
# Seconds of work, and the commands that are sent to Redis after so many of them.
_SECONDS: Final = 120
_TROUBLE: Final[dict[int, tuple[str | int, ...]]] = {
    30: ("SCRIPT", "FLUSH"),
    50: ("CLIENT", "KILL", "TYPE", "normal"),
    70: ("CLIENT", "PAUSE", 6000, "ALL"),
    100: ("CLIENT", "PAUSE", 300, "ALL"),
}
_WINDOW: Final = "5s"


async def _work(store: SessionStore, number: int, until: float) -> None:
    """Do what the requests of a user do."""
    chance, session_id = random.Random(number), ""
    while time.monotonic() < until:
        await asyncio.sleep(chance.uniform(0, 0.02))
        with suppress(SessionError):
            kind = chance.random()
            if not session_id or kind < 0.02:
                session_id = await store.create({"user_id": number, "n": 0})
            elif kind < 0.8:
                await store.get(session_id, touch=True)
            elif kind < 0.95:
                await store.set(session_id, {"n": kind})
            elif kind < 0.98:
                await store.find_by("user_id", number).__anext__()
            else:
                await store.delete_by("user_id", number, keep=[session_id])


async def _live(url: str, registry: CollectorRegistry) -> None:
    """Let a store work, and have trouble."""
    observe = Prometheus(registry)
    until = time.monotonic() + _SECONDS
    async with (
        SessionStore.from_url(
            url, references={"user_id": Reference(identity=True)}, timeout=3, observe=observe
        ) as store,
        client_of(url) as admin,
        asyncio.TaskGroup() as group,
    ):
        for number in range(_TASKS):
            group.create_task(_work(store, number, until))
        for after, command in _TROUBLE.items():
            await asyncio.sleep(after - _SECONDS + until - time.monotonic())
            await admin.execute_command(*command)


@contextmanager
def _prometheus(program: str, target: int) -> Iterator[str]:
    """Start a Prometheus that scrapes a port every second, and yield its URL."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [{"job_name": "shop", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}]
        config, port = Path(folder, "prometheus.yml"), free_port()
        config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
        running = subprocess.Popen(
            [
                *(program, f"--config.file={config}", f"--storage.tsdb.path={folder}/data"),
                *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"),
            ]
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()
            running.wait()


def _ask(url: str, query: str, began: float) -> list[dict[str, Any]]:
    """Return the series of a query."""
    query = query.replace("$job", ".*").replace("$__rate_interval", _WINDOW)
    options = urllib.parse.urlencode({"query": query, "start": began, "end": time.time(), "step": 1})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{options}") as reply:
        found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
    return found


def _draw(url: str, began: float, panels: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(len(panels) // 2, 2, figsize=(13, 9), layout="constrained")
    for panel, place in zip(panels, axes.flat, strict=True):
        for target in panel["targets"]:
            for series in _ask(url, target["expr"], began):
                label = target["legendFormat"]
                for name, value in series["metric"].items():
                    label = label.replace(f"{{{{{name}}}}}", value)
                points = [(float(at) - began, float(value)) for at, value in series["values"]]
                place.plot(*zip(*(point for point in points if not math.isnan(point[1])), strict=True), label=label)
        place.set(title=panel["title"], xlim=(0, _SECONDS))
        place.set_ylim(bottom=0)
        if panel["fieldConfig"]["defaults"]["unit"] == "s":
            place.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds * 1000:,.0f} ms"))
        place.grid(axis="y", linewidth=0.4, color="#cccccc")
        place.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(GUIDES / "rss-dashboard.svg", metadata={"Date": None})


def main() -> None:
    """Draw the picture."""
    program = shutil.which("prometheus")
    assert program, "prometheus is not on PATH"
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "rss", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "savefig.facecolor": "white"})
    panels = json.loads((GUIDES / "grafana.json").read_text())["panels"]
    registry = CollectorRegistry()
    server, thread = start_http_server(0, "127.0.0.1", registry)
    with own_server() as url, _prometheus(program, server.server_port) as asked:
        began = time.time()
        asyncio.run(_live(url, registry))
        _draw(asked, began, panels)
    server.shutdown()
    thread.join()


if __name__ == "__main__":
    main()
