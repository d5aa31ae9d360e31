"""The commands that look at sessions, and end them."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import click

from rss.cli.command import Place, ask, command
from rss.cli.opening import Refusal, Store
from rss.cli.output import ago, date, safe
from rss.durations import milliseconds
from rss.engine.operations import Read
from rss.errors import IncompleteReference, SessionError

# How many sessions are read together.
_AT_ONCE: Final = 50


def _target(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, str] | None:
    """Return the reference and the value of an argument such as `user_id=7`."""
    if value is None:
        return None
    field, _, text = value.partition("=")
    if not field or not text:
        raise click.BadParameter("give a reference and a value, such as user_id=7", ctx, param)
    return field, text


_TARGET: Final = click.argument("target", callback=_target, metavar="REFERENCE=VALUE")


def _known(store: Store, target: tuple[str, str]) -> tuple[str, str]:
    """Return a reference and a value. Raises `Refusal` if the store does not have the reference."""
    if target[0] not in store.fields.references:
        names = ", ".join(store.fields.references) or "none"
        raise Refusal(f"{safe(target[0])} is no reference of this prefix. Its references: {safe(names)}")
    return target


async def _ids(store: Store, target: tuple[str, str]) -> AsyncIterator[list[str]]:
    """Iterate over the ids of the sessions with a value, some at a time. Raises `IncompleteReference` at the end."""
    ids = list[str]()
    try:
        async for session in store.find_by(*target, ["id"]):
            ids.append(session["id"])
            if len(ids) == _AT_ONCE:
                yield ids
                ids = []
    except IncompleteReference:
        yield ids
        raise
    yield ids


async def _known_ids(store: Store, target: tuple[str, str]) -> set[str]:
    """Return the ids of the sessions with a value. If the reference is incomplete, return those that are found."""
    found = set[str]()
    with suppress(IncompleteReference):
        async for ids in _ids(store, target):
            found.update(ids)
    return found


def _values(store: Store, read: Read) -> dict[str, Any]:
    """Return the fields of a session that are not of the library. A field that is not readable gets a word."""
    values = dict[str, Any]()
    for name, data in zip(read.pairs[::2], read.pairs[1::2], strict=True):
        try:
            values |= store.fields.decode([name, data])
        except SessionError:
            values[name.decode(errors="backslashreplace")] = "<unreadable>"
    return values


def _created(read: Read) -> str | None:
    held = dict(zip(read.pairs[::2], read.pairs[1::2], strict=True))
    when = date(held.get(b"_created"))
    return when.isoformat(timespec="seconds") if when else None


@command("ls", "rss ls user_id=7 --fields user_agent,ip")
@_TARGET
@click.option("--fields", help="The fields to show, as a,b. By default, the references.")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="How many sessions to show.")
async def ls(place: Place, target: tuple[str, str], fields: str | None, limit: int) -> int:
    """List the sessions with a value of a reference.

    Each line has the id, the time when the session was made, the time until it expires, and some fields. A field that
    is encrypted, or not readable for another reason, is shown as <unreadable>.
    """
    names = fields.split(",") if fields else [*place.store.fields.references]
    rows, failure = list[dict[str, Any]](), None
    try:
        async for row in _rows(place.store, _known(place.store, target), names):
            rows.append(row)
            if len(rows) > limit:
                break
    except IncompleteReference as error:
        failure = error
    if place.output.as_json:
        for row in rows[:limit]:
            place.output.document(row)
    elif rows:
        columns = ["id", "created (UTC)", "expires in ", *names]
        lines = (_line(row, [row["fields"].get(name, "") for name in names]) for row in rows[:limit])
        place.output.table("", columns, lines)
    else:
        place.output.note("No session has this value.")
    if len(rows) > limit:
        place.output.note(f"These are the first {limit:,} sessions: see --limit.")
    if failure:
        raise failure
    return 0 if rows else 1


async def _rows(store: Store, target: tuple[str, str], names: list[str]) -> AsyncIterator[dict[str, Any]]:
    """Iterate over the sessions with a value, with some fields. Raises `IncompleteReference` at the end."""
    async for ids in _ids(store, target):
        reads = await asyncio.gather(*(store.operations.get(one, [*names, "_created"]) for one in ids))
        for read in reads:
            if read.state == b"alive":
                yield _row(store, read)


def _row(store: Store, read: Read) -> dict[str, Any]:
    values = _values(store, read)
    return {"id": values.pop("id"), "created": _created(read), "ttl": read.ttl / 1000, "fields": values}


def _line(row: dict[str, Any], more: list[Any]) -> list[Any]:
    return [row["id"], _utc(row["created"]), ago(row["ttl"]), *more]


def _utc(created: str | None) -> str:
    """Return a time for a table."""
    return created.replace("T", " ").removesuffix("+00:00") if created else "unknown"


@command("show", "rss show Zb5tXk0DqVNnwkRrZbtFaB1cPpJ2mUsL")
@click.argument("session_id", metavar="ID")
async def show(place: Place, session_id: str) -> int:
    """Show a session: its fields, and the keys of its reference sets. Or show why it ended.

    Why a session ended is known for five minutes.
    """
    store, layout = place.store, place.store.operations.layout
    read = await store.operations.get(session_id, None)
    if read.state != b"alive":
        sentence = f"The session was ended: {read.ended}." if read.ended else "There is no such session."
        place.output.document({"id": session_id, "state": read.state.decode(), "reason": read.ended}, safe(sentence))
        return 1
    row = _row(store, read)
    texts = store.fields.encode({name: row["fields"].get(name) for name in store.fields.references}).references
    row = {**row, "state": "alive", "sets": layout.references(texts, layout.place(row["id"])[1])}
    if place.output.as_json:
        place.output.document(row)
        return 0
    rows: list[tuple[object, object]] = [("id", row["id"]), ("created (UTC)", _utc(row["created"]))]
    rows += [("expires in", ago(row["ttl"])), *row["fields"].items(), *(("in the set", name) for name in row["sets"])]
    place.output.table("", ["", ""], rows)
    return 0


@command("count", "rss count user_id=7")
@_TARGET
@click.option("--fast", is_flag=True, help="One command, which also counts the ids of some expired sessions.")
async def count(place: Place, target: tuple[str, str], *, fast: bool) -> int:
    """Count the sessions with a value of a reference."""
    number = await place.store.count_by(*_known(place.store, target), exact=not fast)
    place.output.document({"count": number}, str(number))
    return 0


@command(
    "revoke",
    "rss revoke user_id=7 --block 30s --reason password-reset",
    "rss revoke --id Zb5tXk0DqVNnwkRrZbtFaB1cPpJ2mUsL",
    asks=True,
)
@click.argument("target", callback=_target, metavar="[REFERENCE=VALUE]", required=False)
@click.option("--id", "session_id", help="End this session, instead of those with a value.")
@click.option("--keep", multiple=True, metavar="ID", help="Keep this session. May be given several times.")
@click.option("--block", metavar="TIME", help="Let no session join the value for this time, such as 30s.")
@click.option("--reason", default="revoked", show_default=True, help="A word, which is known for five minutes.")
@click.option("--durable", type=click.IntRange(1), help="Wait until this number of replicas have the writes.")
async def revoke(
    place: Place,
    *,
    target: tuple[str, str] | None,
    session_id: str | None,
    keep: tuple[str, ...],
    block: str | None,
    reason: str,
    durable: int | None,
) -> int:
    """End all sessions with a value of a reference, or one session by its id.

    It asks before it ends more than one session. Sessions end in steps of about fifty, and no step is half done. If it
    is interrupted, run it again.
    """
    store = place.store
    if session_id is not None and target is None:
        if keep or block:
            raise Refusal("--keep and --block are for a reference and a value")
        return _ended(place, int(await store.delete(session_id, reason=reason, durable=durable)))
    if session_id is not None or target is None:
        raise Refusal("give either a reference and a value, or --id")
    async with _confirmed(place, target, keep) as with_value:
        ended = await store.delete_by(*with_value, keep=keep, reason=reason, block=block, durable=durable)
    code = _ended(place, ended)
    return 0 if block else code


@asynccontextmanager
async def _confirmed(
    place: Place, target: tuple[str, str], keep: Collection[str] = ()
) -> AsyncIterator[tuple[str, str]]:
    """Ask before more than one session with a value ends. After a Ctrl-C, say how many have ended."""
    target = _known(place.store, target)
    found = await _known_ids(place.store, target) - {*keep}
    if len(found) > 1:
        ask(place, f"End {len(found):,} sessions with {safe('='.join(target))}?")
    try:
        yield target
    except asyncio.CancelledError:
        left = await _known_ids(place.store, target)
        place.output.note(f"Interrupted. {len(found - left):,} of {len(found):,} sessions have ended: run it again.")
        raise


def _ended(place: Place, ended: int) -> int:
    place.output.document({"ended": ended}, f"{ended:,} sessions were ended." if ended != 1 else "1 session was ended.")
    return 0 if ended else 1


@command("block", "rss block user_id=7 1h", asks=True)
@_TARGET
@click.argument("time")
@click.option("--reason", default="blocked", show_default=True, help="A word, which the error of a login has.")
@click.option("--durable", type=click.IntRange(1), help="Wait until this number of replicas have the writes.")
async def block(place: Place, target: tuple[str, str], time: str, reason: str, durable: int | None) -> int:
    """Let no session join a value of a reference for some time, and end all sessions with it.

    It asks before it ends more than one session. TIME is a number and a unit, such as 30s, 15m, 1h or "2 days".
    """
    milliseconds(time, "TIME")
    async with _confirmed(place, target) as with_value:
        ended = await place.store.block(*with_value, time, reason=reason, durable=durable)
    _ended(place, ended)
    return 0


@command("unblock", "rss unblock user_id=7")
@_TARGET
async def unblock(place: Place, target: tuple[str, str]) -> int:
    """Let sessions join a value of a reference again."""
    done = await place.store.unblock(*_known(place.store, target))
    place.output.document({"unblocked": done}, "Sessions may join it again." if done else "It was not blocked.")
    return 0 if done else 1
