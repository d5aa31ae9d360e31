"""Writes the results as Markdown."""

from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.contenders import OPERATIONS
from benchmarks.goals import Verdict
from benchmarks.turns import Cell, ratio

_BEGIN, _END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
_SUMMARY: Final = ("rss", "evalsha", "ioredis", "fastapi-redis-sdk", "json")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Container[int] = (0,)) -> str:
    """Return a table. The columns *texts* are aligned left; the others hold numbers and are aligned right."""
    lines = [head, ["---" if n in texts else "---:" for n in range(len(head))], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def summary(cells: Sequence[Cell]) -> str:
    """Return the table of the README: get and set on asyncio's own loop."""
    found = {(c.operation, c.tasks, c.contender): c for c in cells if c.loop in ("asyncio", "node")}
    columns = [(operation, tasks) for operation in ("get", "set") for tasks in (1, 50, 200)]
    head = ["calls a second", *(f"{operation}, {_tasks(n)}" for operation, n in columns)]
    rows: list[list[str]] = []
    for contender in _SUMMARY:
        row = [found[operation, tasks, contender] for operation, tasks in columns if ("get", 1, contender) in found]
        if row:
            rows.append([row[0].name, *(f"{cell.median():,.0f}" for cell in row)])
    return table(head, rows)


def calls(cells: Sequence[Cell]) -> str:
    """Return a table for each operation: a row for each contender and loop, a column for each number of tasks."""
    tasks = sorted({cell.tasks for cell in cells})
    parts: list[str] = []
    for operation in OPERATIONS:
        rows = _by_contender(cell for cell in cells if cell.operation == operation)
        if rows:
            head = [f"{operation}: calls/s, client + Redis us", *map(_tasks, tasks), f"p99, {_tasks(tasks[-1])}"]
            parts.append(table(head, ([name, *map(cell, row), _p99(row[-1])] for name, row in rows.items())))
    return "\n".join(parts)


def ratios(cells: Sequence[Cell], to: str) -> str:
    """Return the ratios of this library to another contender on asyncio's own loop; "" if there are none."""
    tasks = sorted({cell.tasks for cell in cells})
    found = {(c.operation, c.tasks, c.contender): c for c in cells if c.loop in ("asyncio", "node")}
    theirs = next((cell for cell in found.values() if cell.contender == to), None)
    if theirs is None:
        return ""
    rows: list[list[str]] = []
    for operation in OPERATIONS:
        pairs = [(found.get((operation, n, "rss")), found.get((operation, n, to))) for n in tasks]
        row = [_ratio(*ratio(ours, other)) + "<br>" + _ratio(*ratio(ours, other, "cpu"))
               for ours, other in pairs if ours and other]  # fmt: skip
        if row:
            rows.append([operation, *row])
    return table([f"to {theirs.name}: calls/s, client's processor time", *map(_tasks, tasks)], rows)


def lacks(found: dict[str, str]) -> str:
    """Return a table of the features that contenders lack."""
    return table(
        ["contender", "what it does not do"], ([name, text] for name, text in found.items() if text), texts=(0, 1)
    )


def many_sessions(cells: Sequence[Cell]) -> str:
    """Return the speed by the number of sessions."""
    rows = ([c.name, f"{c.median():,.0f}", f"{other.median():,.0f}"] for c, other in _pairs(cells))
    return table(["in Redis", "get, 50 tasks, calls/s", "set, 50 tasks, calls/s"], rows)


def large_values(cells: Sequence[Cell]) -> str:
    """Return the speed by the size of a value."""
    rows = ([c.name, f"{c.median():,.0f}", f"{other.median():,.0f}"] for c, other in _pairs(cells))
    return table(["one more field", "get, 50 tasks, calls/s", "set, 50 tasks, calls/s"], rows)


def of_a_user(rows: Sequence[dict[str, float]]) -> str:
    """Return the times of calls for a user with many sessions."""
    names = ("login", "find_by", "delete_by")
    lines = ([f"{row['sessions']:,.0f}", *(f"{row[name]:.2f} ms" for name in names)] for row in rows)
    return table(["sessions of a user", "create", "find_by", "delete_by"], lines)


def memory(found: dict[str, float]) -> str:
    """Return the memory of a session."""
    rows = ([name, f"{size:.0f}"] for name, size in found.items())
    return table(["Redis memory, three fields, two of them references", "bytes a session"], rows)


def applications(rows: Sequence[dict[str, Any]]) -> str:
    """Return the requests a second."""
    head = ["requests a second", "", "reads the session", "p99", "counts in it", "p99"]
    lines = [
        [row["framework"], row["name"]]
        + [text for path in ("read", "count") for text in (f"{row[path]['rate']:,.0f}", f"{row[path]['p99']:.1f} ms")]
        for row in rows
    ]
    return table(head, lines, texts=(0, 1))


def goals(verdicts: Sequence[Verdict]) -> str:
    """Return the goals, the missed ones first."""
    rows = (
        [
            one.goal,
            _ratio(one.found, one.low, one.high),
            f"{'at most' if one.at_most else 'at least'} {one.limit:g}",
            "kept" if one.kept else "**missed**",
        ]
        for one in sorted(verdicts, key=lambda one: one.kept)
    )
    return table(["goal", "found (quartiles)", "limit", ""], rows, texts=(0, 3))


def include(text: str, path: Path) -> None:
    """Replace the text between the two comments of a file, if the file has them."""
    before, begin, rest = path.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        path.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def _by_contender(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        name = f"{cell.name}, uvloop" if cell.loop == "uvloop" else cell.name
        rows.setdefault(name, []).append(cell)
    return rows


def _pairs(cells: Sequence[Cell]) -> Iterable[tuple[Cell, Cell]]:
    """Return the cells of get, each with the matching cell of set."""
    written = {cell.name: cell for cell in cells if cell.operation == "set"}
    return [(cell, written[cell.name]) for cell in cells if cell.operation == "get"]


def _tasks(number: int) -> str:
    return "1 task" if number == 1 else f"{number} tasks"


def cell(one: Cell) -> str:
    """Return the calls a second, and the processor time of a call."""
    return f"{one.median():,.0f}<br>{one.median('cpu'):.1f} + {one.median('server'):.1f}"


def _p99(cell: Cell) -> str:
    return f"{cell.median('p99'):.2f} ms"


def _ratio(middle: float, low: float, high: float) -> str:
    return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f} to {high:.2f})"
