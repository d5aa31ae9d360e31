"""Draws what was measured, as SVG."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.contenders import Coalesced, Nothing, Plain
from benchmarks.measure import Cell

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "rss", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})
mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "savefig.facecolor": "white"})
_COLORS = {Coalesced.name: "#c1121f", Plain.name: "#003049"}
_OTHERS = ["#669bbc", "#7a9e7e", "#b08968", "#8d99ae", "#9d8189", "#bcb8b1", "#6d6875"]


def throughput(cells: Sequence[Cell], path: Path) -> None:
    """Draw calls a second by the number of tasks; the bars go from the worst round to the best."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for panel, operation in zip(panels, ("get", "set"), strict=True):
        rows = [c for c in cells if c.operation == operation and c.loop == "asyncio" and c.contender != Nothing.name]
        others = iter(_OTHERS)
        for name in dict.fromkeys(cell.contender for cell in rows):
            row = sorted((cell for cell in rows if cell.contender == name), key=lambda cell: cell.tasks)
            rates = [cell.rate for cell in row]
            spread = [[c.rate - min(c.rates) for c in row], [max(c.rates) - c.rate for c in row]]
            color = _COLORS.get(name) or next(others)
            width = 2.2 if name in _COLORS else 1.1
            panel.errorbar(
                [c.tasks for c in row],
                rates,
                spread,
                label=name,
                color=color,
                linewidth=width,
                capsize=2,
                marker="o",
                markersize=3,
            )
        panel.set(
            xscale="log",
            yscale="log",
            title="read a session" if operation == "get" else "write a session",
            xlabel="tasks at once",
        )
        panel.grid(axis="y", which="both", linewidth=0.3)
    panels[0].set_ylabel("calls a second, one process")
    panels[1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def latency(cells: Sequence[Cell], path: Path, tasks: int = 200) -> None:
    """Draw the median and the 99th percentile of the latency."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    for panel, operation in zip(panels, ("get", "set"), strict=True):
        row = [
            c
            for c in cells
            if (c.operation, c.loop, c.tasks) == (operation, "asyncio", tasks) and c.contender != Nothing.name
        ][::-1]
        names = [cell.contender for cell in row]
        colors = [_COLORS.get(name, "#8d99ae") for name in names]
        panel.barh(names, [statistics.median(cell.p99) for cell in row], color=colors, alpha=0.35, label="p99")
        panel.barh(names, [statistics.median(cell.p50) for cell in row], color=colors, label="p50")
        panel.set(
            xlabel=f"ms, {tasks} tasks at once: median, and (pale) 99th percentile",
            title="read a session" if operation == "get" else "write a session",
        )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def scaling(cells: Sequence[Cell], path: Path) -> None:
    """Draw the speed with more and more sessions in Redis."""
    figure, panel = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for operation, color in (("get", "#c1121f"), ("set", "#003049")):
        row = [cell for cell in cells if cell.operation == operation]
        spread = [[c.rate - min(c.rates) for c in row], [max(c.rates) - c.rate for c in row]]
        panel.errorbar(
            [c.contender for c in row],
            [c.rate for c in row],
            spread,
            label=operation,
            color=color,
            capsize=3,
            marker="o",
        )
    panel.set(ylim=(0, None), ylabel="calls a second, 50 tasks")
    panel.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
