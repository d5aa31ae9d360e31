"""The commands that look after the keys and the server."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

import click
from rich.text import Text

from rss.cli import doctor as doctors
from rss.cli.command import Place, ask, command
from rss.cli.opening import Refusal, client_for, read_meta
from rss.cli.output import safe, size
from rss.cli.stats import Statistics
from rss.clients import close
from rss.errors import IncompleteReference, SessionError
from rss.maintenance import Finding
from rss.moving import MovingStore, Progress

_MEANINGS: Final = {
    "outside": "a set lacks a live session",
    "stale": "ids of expired sessions in sets; this is normal",
    "endless": "a key has no TTL",
    "short": "a set would expire before a session in it",
    "wrong type": "a key holds another type of data",
    "misplaced": "a key is in a wrong partition",
    "stray": "a key is not of this library",
}


@command("stats", "rss stats")
async def stats(place: Place) -> int:
    """Count sessions, tombstones and reference sets, and show the largest values of each reference.

    A tombstone remembers for five minutes that a session was ended. A fence remembers a block, or that sessions with a
    value were ended. The bytes are estimated by MEMORY USAGE of some keys. The stale share is the share of ids in the
    sets that belong to no live session, estimated by some ids.
    """
    numbers = Statistics(place.store)
    with place.output.progress("counting", "Nothing was changed.") as report:
        await numbers.count(report)
    references = {
        name: {
            "sets": numbers.keys[f"set {name}"],
            "ids": numbers.ids[name],
            "stale_share": numbers.stale(name),
            "largest": [{"value": value, "ids": ids} for value, ids in numbers.largest.get(name, [])],
        }
        for name in place.store.fields.references
    }
    others = {kind: numbers.keys[kind] for kind in ("sessions", "tombstones", "fences", "other")}
    if place.output.as_json:
        place.output.document({**others, "bytes": numbers.bytes, "references": references})
        return 0
    used = "unknown" if numbers.bytes is None else f"about {size(numbers.bytes)}"
    rows = [*((kind, f"{number:,}") for kind, number in others.items()), ("memory", used)]
    place.output.table("", ["", " "], rows)
    place.output.table(
        "Reference sets",
        ["reference", "sets ", "ids ", "stale ", "largest values"],
        (
            (
                name,
                f"{numbers.keys[f'set {name}']:,}",
                f"{numbers.ids[name]:,}",
                "" if (share := numbers.stale(name)) is None else f"{share:.0%}",
                ", ".join(f"{safe(value)}: {ids:,}" for value, ids in numbers.largest.get(name, [])),
            )
            for name in references
        ),
    )
    return 0


@command("check", "rss check")
async def check(place: Place) -> int:
    """Look for what is wrong with the keys, and change nothing.

    The exit code is 1 if anything but stale ids was found. With --json, there is a line for each finding, with its key.
    """
    found = await _findings(place, place.store.maintenance.check, "checking", "Nothing was changed.")
    return 1 if {kind for kind, _ in found} - {"stale"} else 0


@command("repair", "rss repair --yes", asks=True)
async def repair(place: Place) -> int:
    """Mend what `rss check` finds, while applications go on.

    Sessions are added to the sets that lack them, and stale ids leave. A key without a TTL gets one. Keys that are
    misplaced, stray or of a wrong type are removed. A session that is revoked, because a strict reference set lacks it,
    stays revoked. The exit code is 1 if something could not be mended: stderr says why.
    """
    ask(
        place,
        f"Repair the keys that begin with '{safe(place.prefix)}:', and remove those that are not of this library?",
    )
    done = "What was found is mended. Run it again."
    found = await _findings(place, place.store.maintenance.repair, "repairing", done)
    return 0 if all(mended for _, mended in found) else 1


async def _findings(
    place: Place,
    method: Callable[[Callable[[float], object]], AsyncGenerator[Finding]],
    doing: str,
    done: str,
) -> Counter[tuple[str, bool]]:
    """Show the progress and the findings of a check or a repair.

    Return how many there are of each kind, and whether they were mended.
    """
    found = Counter[tuple[str, bool]]()
    try:
        with place.output.progress(doing, done) as report:
            async with aclosing(method(report)) as findings:
                async for finding in findings:
                    found[finding.kind, finding.mended] += finding.count
                    if place.output.as_json:
                        place.output.document(_line(finding))
    finally:
        for mended, heading in ((True, "mended "), (False, "found " if doing == "checking" else "not mended ")):
            rows = [(kind, f"{n:,}", _MEANINGS[kind]) for (kind, one), n in found.most_common() if one is mended]
            if rows and not place.output.as_json:
                place.output.table("", ["kind", heading, "meaning"], rows)
    if not found:
        place.output.note("Nothing is wrong.")
    return found


def _line(finding: Finding) -> dict[str, Any]:
    return {name: getattr(finding, name) for name in ("kind", "key", "session_id", "count", "mended")}


@command("reindex", "rss reindex")
@click.option(
    "--forget", multiple=True, metavar="REFERENCE", help="Forget this reference, because no store has it any more."
)
async def reindex(place: Place, forget: tuple[str, ...]) -> int:
    """Complete the sets of references that are incomplete, because some processes lacked them for a while.

    Run it when all processes of the application have the same references.
    """
    del forget  # The store was opened without them.
    with place.output.progress("reindexing", "Run it again: it begins anew.") as report:
        try:
            names = await place.store.maintenance.reindex(report)
        except IncompleteReference as error:
            raise SessionError(
                f"the reference {error.field!r} is still incomplete, because stores without it keep opening: give all "
                "processes the same references, and run it again"
            ) from None
    sentence = f"Complete now: {', '.join(names)}." if names else "Every reference was complete."
    place.output.document({"completed": names}, safe(sentence))
    return 0


@command("sweep", "rss sweep")
async def sweep(place: Place) -> int:
    """Remove the ids of expired sessions from the reference sets."""
    with place.output.progress("sweeping", "The stale ids among them were removed. Run it again.") as report:
        removed = await place.store.maintenance.sweep(report)
    place.output.document({"removed": removed}, f"{removed:,} stale ids were removed.")
    return 0


@command("doctor", "rss doctor", events=False)
async def doctor(place: Place) -> int:
    """Examine Redis, and what its user may do there.

    It looks at the version, eviction, persistence and encryption of the connection. It tries each script on a session
    of its own, and removes that. It measures the latency, and says which references are incomplete. The exit code is 1
    if a line is an error.
    """
    lines = list[doctors.Line]()
    try:
        async with aclosing(doctors.examine(place.store, place.url, events=place.held.events)) as found:
            async for line in found:
                lines.append(line)
                if place.output.as_json:
                    place.output.document(line._asdict())
    finally:  # If Redis stops answering, show what is known until then.
        if not place.output.as_json:
            colors = {"ok": "green", "warning": "yellow", "error": "red"}
            rows = ((Text(one.level, colors[one.level]), one.what, one.sentence) for one in lines)
            place.output.table("", ["", "examined", "result"], rows)
    return 1 if any(line.level == "error" for line in lines) else 0


@command("copy", "rss copy --to redis+cluster://10.0.0.5:6379", asks=True)
@click.option("--to", required=True, metavar="URL", help="The Redis or Redis Cluster to move the sessions to.")
@click.option(
    "--partitions",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Their number, if the prefix is new there.",
)
async def copy(place: Place, to: str, partitions: int) -> int:
    """Move all sessions to another Redis or Redis Cluster, under the same prefix.

    Run it when no application uses the sessions here: all of them use a MovingStore, or are stopped. It may be
    interrupted, and run again. The sessions get partitions, on one Redis too: give stores there the same number, and
    partition_by_identity=False.
    """
    store, target = place.store, client_for(to)
    progress = Progress(0, 0)
    try:
        here, held = place.held, await read_meta(target, place.prefix)
        if held and set(held.references) != set(store.fields.references):
            raise Refusal("the stores there have other references")
        if held and not held.partitions:
            raise Refusal("the stores there have no partitions: is --to the Redis from which the sessions move?")
        if held and held.identity:
            raise Refusal("the stores there need partition_by_identity=False, because sessions keep their ids")
        if held and held.json != here.json:
            raise Refusal("the stores there have another codec")
        last = held or here
        ask(place, "Move all sessions, so that they are no longer where they are now?")
        moving: MovingStore[dict[str, Any]] = MovingStore(
            target,
            source=store,
            references=store.fields.references,
            prefix=place.prefix,
            partitions=held.partitions if held else partitions,
            partition_by_identity=False,
            max_age=last.max_age / 1000,
            max_lifetime=last.max_lifetime / 1000 or None,
            codec=store.fields.codec,
            events=here.events or last.events,
        )

        def note(now: Progress) -> None:
            nonlocal progress
            progress = now
            status.update(f"{now.seen:,} sessions looked at, {now.moved:,} moved")

        status = place.output.err.status("moving")
        with status:
            async with moving:
                await moving.move_all(note)
    except asyncio.CancelledError:
        place.output.note(f"Interrupted. {progress.moved:,} sessions have moved: run it again.")
        raise
    finally:
        await close(target)
    place.output.document({"moved": progress.moved}, f"{progress.moved:,} sessions have moved.")
    return 0
