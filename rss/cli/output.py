"""Print results: tables and notes for people, JSON for programs."""

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# Columns. Output that is no terminal is not cut at the width of one.
_WIDE = 10_000
# The least width of a column whose cells may be folded.
_FOLDED = 12
# Columns that are not folded.
_WHOLE = ("id", "reference", "examined", "created (UTC)", "expires in ")


def safe(value: object) -> str:
    """Return a value as a text of one line. Characters that could command the terminal are escaped."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def date(milliseconds: bytes | str | None) -> datetime | None:
    """Return the date of a time in the hash of a session. Return None if it is no such time."""
    try:
        return datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=int(milliseconds or ""))
    except (ValueError, OverflowError):
        return None


def ago(seconds: float) -> str:
    """Return a length of time in its two largest units, such as "27d 4h"."""
    left, parts = round(seconds), list[str]()
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= length:
            parts.append(f"{left // length}{unit}")
            left %= length
    return " ".join(parts[:2]) or "0s"


def size(count: float) -> str:
    """Return a number of bytes in the largest unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"


class Output:
    """Prints results on stdout, and everything else on stderr. *as_json*: print results as JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json: bool = as_json
        self.out: Console = make_console(stderr=False)
        self.err: Console = make_console(stderr=True)

    def document(self, value: dict[str, Any], sentence: str = "") -> None:
        """Print a JSON document, or a sentence for people."""
        self.out.print(Text(json.dumps(value, default=str) if self.as_json else sentence), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a table. Columns whose names end with a blank are aligned to the right. Names may be blank."""
        named = any(map(str.strip, columns))
        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=named)
        for column in columns:
            whole = column in _WHOLE
            side: JustifyMethod = "right" if column.endswith(" ") else "left"
            table.add_column(column.strip(), justify=side, overflow="fold", no_wrap=whole)
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(safe(cell)) for cell in row))
        self.out.print(table)

    def records(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table, or a table of each row if the terminal is too narrow."""
        width = 0
        for column, *cells in zip(columns, *rows, strict=True):
            widest = max(cell_len(safe(cell)) for cell in (column, *cells))
            width += 2 + (widest if column in _WHOLE else min(widest, _FOLDED))
        if width <= self.out.width:
            self.table("", columns, rows)
            return
        for row in rows:
            self.table("", ["", ""], [*zip(map(str.strip, columns), row, strict=True)])

    def note(self, sentence: str) -> None:
        """Print a sentence on stderr."""
        self.err.print(Text(sentence), soft_wrap=True)

    @contextmanager
    def progress(self, doing: str, done: str) -> Iterator[Callable[[float], None]]:
        """Show a progress bar on stderr, if that is a terminal. Yield a function that takes the share that is done.

        *done*: what is said after a Ctrl-C, after the share.
        """
        share = 0.0
        bars = Progress(*columns(), console=self.err)
        with bars if self.err.is_terminal else nullcontext():
            task = bars.add_task(doing, total=1.0)

            def report(now: float) -> None:
                nonlocal share
                share = now
                bars.update(task, completed=now)

            try:
                yield report
            except asyncio.CancelledError:
                if self.err.is_terminal:
                    bars.stop()
                self.note(f"Interrupted after {share:.0%} of the keys. {done}")
                raise


def columns() -> tuple[ProgressColumn, ...]:
    """Return the columns of a progress bar."""
    return TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()


def make_console(*, stderr: bool) -> Console:
    """Return a console for stdout or stderr."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console
