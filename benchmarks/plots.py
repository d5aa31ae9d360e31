"""Draws the pictures: calls a second by the number of tasks, and the cost of a call by the number of partitions."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.turns import Cell

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "rss", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "savefig.facecolor": "white"})
# Contender: label, color. Few lines, so that they can be told apart.
_LINES = {
    "rss": ("redis-session-sets", "#c1121f"),
    "evalsha": ("redis-py, one Lua script a call", "#003049"),
    "ioredis": ("the Node original's algorithm, ioredis", "#4f772d"),
    "starsessions": ("starsessions", "#8d6a9f"),
    "aiohttp-session": ("aiohttp-session", "#b08968"),
}
_TITLES = {"get": "read a session", "set": "write a session"}


def throughput(cells: Sequence[Cell], path: Path) -> None:
    """Draw get and set on asyncio's own loop."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for panel, operation in zip(panels, _TITLES, strict=True):
        row = [cell for cell in cells if cell.operation == operation and cell.loop in ("asyncio", "node")]
        for contender, (label, color) in _LINES.items():
            line = sorted((cell for cell in row if cell.contender == contender), key=lambda cell: cell.tasks)
            panel.plot(
                [cell.tasks for cell in line],
                [cell.median() for cell in line],
                label=label,
                color=color,
                linewidth=2.5 if contender == "rss" else 1.5,
                marker="o",
                markersize=4,
            )
        tasks = sorted({cell.tasks for cell in row})
        panel.set(xscale="log", yscale="log", title=_TITLES[operation], xlabel="tasks at once")
        panel.set_xticks(tasks, [str(number) for number in tasks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_yticks([5_000, 10_000, 20_000, 50_000, 100_000, 200_000])
        panel.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(axis="y", linewidth=0.4, color="#cccccc")
    panels[0].set_ylabel("calls a second, one process")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def growth(found: Sequence[tuple[int, int, Cell]], path: Path) -> None:
    """Draw the processor time of get, and the time of a fan-out, by masters and partitions."""
    partitions = sorted({n for _, n, _ in found})
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for panel, operation, what, title in (
        (panels[0], "get", "cpu", "read a session, 200 tasks: client us"),
        (panels[1], "fan_out", "p50", "find ids in all partitions, alone: ms"),
    ):
        for masters, color in zip(
            sorted({masters for masters, _, _ in found}), ("#003049", "#c1121f", "#4f772d"), strict=True
        ):
            line = [
                (n, cell.median(what)) for count, n, cell in found if (count, cell.operation) == (masters, operation)
            ]
            panel.plot(
                *zip(*line, strict=True),
                label="1 master" if masters == 1 else f"{masters} masters",
                color=color,
                marker="o",
                markersize=4,
            )
        panel.set(xscale="log", title=title, xlabel="partitions")
        panel.set_ylim(bottom=0)
        panel.set_xticks(partitions, [str(n) for n in partitions])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(axis="y", linewidth=0.4, color="#cccccc")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
