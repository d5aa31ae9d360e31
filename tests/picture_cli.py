"""Takes the pictures of the command in rss/guides: `python -m tests.picture_cli` writes rss-*.svg."""

import asyncio
import contextlib
import io
import random
import re
from pathlib import Path
from typing import Final
from unittest import mock

from rich.console import Console
from rich.progress import Progress
from rich.terminal_theme import MONOKAI

from rss import Reference, SessionStore
from rss.cli import main, output
from tests.servers import client_of, own_server

GUIDES: Final = Path(__file__).parents[1] / "rss" / "guides"
_REFERENCES: Final = {"user_id": Reference(identity=True), "ip": Reference(), "team": Reference(strict=True)}
_COMMANDS: Final = {
    "ls": ("ls", "user_id=7", "--fields", "ip,device"),
    "stats": ("stats",),
    "check": ("check",),
    "doctor": ("doctor",),
}


async def _fill(url: str) -> None:
    """Make sessions and some damage."""
    chance = random.Random(7)
    async with SessionStore.from_url(url, references=_REFERENCES) as store, client_of(url) as client:
        devices = ["Firefox on Linux", "Safari on iPhone", "Chrome on Windows"]
        ids = [
            await store.create(
                {"user_id": n % 400, "ip": f"203.0.113.{chance.randrange(90)}", "team": "red", "device": devices[n % 3]}
            )
            for n in range(1200)
        ]
        for one in ids[100:130]:
            await client.unlink(store.get_session_key(one))
        for one in ids[7:10]:
            await client.srem(store.get_reference_key("user_id", ids.index(one)), one)
        await client.persist(store.get_session_key(ids[50]))
        await store.delete_by("user_id", 9)
        await store.delete(ids[20])


def _take(url: str, name: str, args: tuple[str, ...]) -> None:
    """Run a command, and save what it prints."""
    consoles = list[Console]()

    def console(*, stderr: bool) -> Console:
        file = io.StringIO() if stderr else None
        made = Console(record=True, width=106, force_terminal=True, highlight=False, file=file)
        consoles.append(made)
        return made

    with mock.patch.object(output, "make_console", console), contextlib.suppress(SystemExit):
        main([*args, "--url", url])
    _save(name, f"rss {' '.join(args)}", consoles[0])


def _save(name: str, title: str, console: Console) -> None:
    svg = console.export_svg(title=title, theme=MONOKAI, unique_id=f"rss-{name}")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # No fonts from other servers.
    (GUIDES / f"rss-{name}.svg").write_text(svg)


def _take_progress() -> None:
    """Save a progress bar that is not full."""
    console = Console(record=True, width=64, force_terminal=True, file=io.StringIO())
    bars = Progress(*output.columns(), console=console)
    bars.update(bars.add_task("sweeping", total=1.0), completed=0.62)
    console.print(bars.get_renderable())
    _save("progress", "rss sweep", console)


def take() -> None:
    """Take all pictures."""
    with own_server() as url:
        asyncio.run(_fill(url))
        for name, args in _COMMANDS.items():
            _take(url, name, args)
    _take_progress()


if __name__ == "__main__":
    take()
