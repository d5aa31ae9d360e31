"""The commands that look at sessions, and end them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Collection
from contextlib import aclosing, suppress
from typing import Any, Final

import click

from rss.cli.command import Place, ask, command
from rss.cli.opening import Refusal, Store
from rss.cli.output import ago, date, safe
from rss.durations import milliseconds
from rss.engine.operations import Read
from rss.errors import IncompleteReference, SessionError
from rss.fields import field_names

# How many sessions are read together.
_AT_ONCE: Final = 50
# Shown in place of a value that cannot be decoded.
_UNREADABLE: Final = "<unreadable>"


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


async def _ids(store: Store, target: tuple[str, str]) -> AsyncGenerator[list[str]]:
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


async def _about(store: Store, target: tuple[str, str], keep: Collection[str]) -> int:
    """Return about how many sessions with a value would end. If the reference is incomplete, count what is found."""
    try:
        number = await store.count_by(*target, exact=False)
    except IncompleteReference as error:
        number = error.found
    return max(0, number - len({*keep}))


def _values(store: Store, read: Read) -> dict[str, Any]:
    """Return the fields of a session that are not of the library. A field that is not readable gets a word."""
    values = dict[str, Any]()
    for name, data in zip(read.pairs[::2], read.pairs[1::2], strict=True):
        try:
            values |= store.fields.decode([name, data])
        except SessionError:
            values[name.decode(errors="backslashreplace")] = _UNREADABLE
    return values


def _sets(store: Store, row: dict[str, Any]) -> list[str]:
    """Return the keys of the reference sets of a session. A value that is damaged has none."""
    layout, keys = store.operations.layout, list[str]()
    for name in store.fields.references:
        value = row["fields"].get(name)
        if value is not _UNREADABLE:
            with suppress(TypeError, ValueError):
                keys += layout.references(store.fields.encode({name: value}).references, layout.place(row["id"])[1])
    return keys


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
    names = [*place.store.fields.references] if fields is None else field_names(map(str.strip, fields.split(",")), "id")
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
        place.output.records(
            columns, [_line(row, [row["fields"].get(name, "") for name in names]) for row in rows[:limit]]
        )
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
    store = place.store
    read = await store.operations.get(session_id, None)
    if read.state != b"alive":
        sentence = f"The session was ended: {read.ended}." if read.ended else "There is no such session."
        place.output.document({"id": session_id, "state": read.state.decode(), "reason": read.ended}, safe(sentence))
        return 1
    row = _row(store, read)
    row = {**row, "state": "alive", "sets": _sets(store, row)}
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
    failure = None
    try:
        number = await place.store.count_by(*_known(place.store, target), exact=not fast)
    except IncompleteReference as error:
        number, failure = error.found, error
    place.output.document({"count": number}, str(number))
    if failure:
        raise failure
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
@click.option(
    "--reason", default="revoked", show_default=True, help="Why: a short word, which is known for five minutes."
)
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
    target = _known(store, target)
    kept = await asyncio.gather(*(store.operations.get(one, []) for one in keep))
    for one, read in zip(keep, kept, strict=True):
        if read.state != b"alive":
            place.output.note(f"The session {safe(one)} of --keep is not alive. Nothing was ended.")
            return 1
    await _confirm(place, target, keep)
    delete = store.delete_by(*target, keep=keep, keep_required=bool(keep), reason=reason, block=block, durable=durable)
    code = await _end(place, target, delete, keep)
    return 0 if block else code


async def _confirm(place: Place, target: tuple[str, str], keep: Collection[str] = ()) -> None:
    """Ask before more than one session with a value ends."""
    if place.yes:  # Sessions end at once, and a block begins at once.
        return
    others = set[str]()
    with suppress(IncompleteReference):
        async with aclosing(_ids(place.store, target)) as pages:
            async for ids in pages:
                others |= {*ids} - {*keep}
                if len(others) > 1:
                    break
    if len(others) > 1:
        number = await _about(place.store, target, keep)
        ask(place, f"End about {number:,} sessions with {safe('='.join(target))}?")


async def _end(place: Place, target: tuple[str, str], ending: Awaitable[int], keep: Collection[str] = ()) -> int:
    """End sessions with a value, and return the exit code. After a Ctrl-C, say how many are left."""
    try:
        return _ended(place, await ending)
    except IncompleteReference as error:
        _ended(place, error.ended)
        raise
    except asyncio.CancelledError:
        left = "some"
        with suppress(SessionError, TimeoutError):
            # Redis may have stopped, and nobody waits long after a Ctrl-C. Before Python 3.11.3, asyncio.timeout raises
            # CancelledError in a task that was cancelled before.
            left = f"about {await asyncio.wait_for(_about(place.store, target, keep), 1):,}"
        place.output.note(f"Interrupted. Of the sessions to end, {left} are left: run it again.")
        raise


def _ended(place: Place, ended: int) -> int:
    place.output.document({"ended": ended}, f"{ended:,} sessions were ended." if ended != 1 else "1 session was ended.")
    return 0 if ended else 1


@command("block", "rss block user_id=7 1h", asks=True)
@_TARGET
@click.argument("time")
@click.option(
    "--reason", default="blocked", show_default=True, help="Why: a short word. A login that is refused gets it."
)
@click.option("--durable", type=click.IntRange(1), help="Wait until this number of replicas have the writes.")
async def block(place: Place, target: tuple[str, str], time: str, reason: str, durable: int | None) -> int:
    """Let no session join a value of a reference for some time, and end all sessions with it.

    It asks before it ends more than one session. TIME is a number and a unit, such as 30s, 15m, 1h or "2 days".
    """
    milliseconds(time, "TIME")
    target = _known(place.store, target)
    await _confirm(place, target)
    await _end(place, target, place.store.block(*target, time, reason=reason, durable=durable))
    return 0


@command("unblock", "rss unblock user_id=7")
@_TARGET
async def unblock(place: Place, target: tuple[str, str]) -> int:
    """Let sessions join a value of a reference again."""
    done = await place.store.unblock(*_known(place.store, target))
    place.output.document({"unblocked": done}, "Sessions may join it again." if done else "It was not blocked.")
    return 0 if done else 1
