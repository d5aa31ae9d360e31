"""The command that shows what happens to sessions while it happens."""

import dataclasses
import json
from datetime import UTC, datetime

import click
from rich.text import Text

from rss.cli.command import Place, command
from rss.cli.output import safe
from rss.events import Event


@command("watch", "rss watch", "rss watch --reason password")
@click.option("--reason", help="Show only what has this reason, and gaps.")
async def watch(place: Place, reason: str | None) -> int:
    """Show logins, rotations, ends and blocks while they happen, until Ctrl-C.

    The stores of the applications must have events=True. A gap means that some events may be missing, because the
    connection was lost. Expired sessions are shown when a sweep finds them.
    """
    if not place.held.events:
        place.output.note("The store that opened last publishes no events. Only those with events=True do.")
    async with place.store.events() as events:
        place.output.note("Watching. Ctrl-C ends this.")
        async for event in events:
            if reason in (None, event.reason) or event.kind == "gap":
                place.output.out.print(Text(_line(event, as_json=place.output.as_json)), soft_wrap=True)
    return 0


def _line(event: Event, *, as_json: bool) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    if as_json:
        return json.dumps({"time": now, **dataclasses.asdict(event)}, default=str)
    identity = "" if event.identity is None else f"of {safe(event.identity)}"
    parts = (event.session_id, event.new_id and f"-> {event.new_id}", event.field and f"{event.field}={event.value}")
    words = [f"{event.kind:<8}", *filter(None, map(safe, parts)), identity, safe(event.reason)]
    return " ".join([now, *filter(None, words)])
