"""The operator's command: what each command prints and changes, its exit codes, and what its errors do not tell."""

import asyncio
import contextlib
import functools
import importlib.metadata
import io
import json
import os
import pty
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis.exceptions
from redis import Redis as SyncRedis

from rss import IncompleteReference, PartlyDone, Reference, SessionStore, TextCodec
from rss.cli import doctor, main, opening, output
from rss.encryption import EncryptingCodec
from rss.engine.meta import Held, held_by
from rss.testing import free_port
from tests.keyspace import Keyspace
from tests.servers import client_of, everywhere, own_server, sentinel, stopped
from tests.test_acl import ACL_RULE

on_both = pytest.mark.parametrize("keyspace", [None, "cluster"], indirect=True)
GUIDE = (Path(__file__).parents[1] / "rss" / "guides" / "command.md").read_text()
REFERENCES = {"user_id": Reference(identity=True), "ip": Reference(), "team": Reference(strict=True)}
LOOKS = ["check", "count", "doctor", "ls", "show", "stats"]
COMMANDS = sorted([*LOOKS, "block", "copy", "reindex", "repair", "revoke", "sweep", "unblock"])


class Result(NamedTuple):
    """The output of a command, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON that it printed."""
        return [json.loads(line) for line in self.out.splitlines()]


class Place:
    """A store of an application, and the command beside it."""

    def __init__(self, url: str, prefix: str, store: SessionStore, admin: Any) -> None:
        self.url = url
        self.prefix = prefix
        self.store = store
        self.admin = admin

    async def rss(self, *args: str, expect: int = 0) -> Result:
        """Run the command in this process, and check its exit code."""
        result = await asyncio.to_thread(run, *args, "--url", self.url, "--prefix", self.prefix)
        assert result.code == expect, result
        assert "Traceback" not in result.err
        return result

    async def dump(self) -> dict[bytes, tuple[bytes, bool]]:
        """Return the content of all keys of the prefix, and whether they have a TTL."""
        keys = [key async for key in self.admin.scan_iter(match=f"{self.prefix}:*", count=1000)]
        return {key: (await self.admin.dump(key), await self.admin.pttl(key) > 0) for key in sorted(keys)}


def run(*args: str) -> Result:
    """Run the command in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(args)
        except SystemExit as error:
            return Result(int(error.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("the command did not exit")


def command(*args: str, **options: Any) -> "subprocess.Popen[str]":
    """Start the command in a process of its own."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    # A shell that runs the tests in the background lets them ignore SIGINT, and the command would inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-m", "rss", *args], text=True, preexec_fn=heed, **pipes)  # noqa: PLW1509


@pytest.fixture(name="place")
async def _place(redis_url: str, keyspace: Keyspace, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """A store with three references, on one server or on a cluster."""
    url = request.getfixturevalue("cluster_url") if keyspace.partitions else redis_url
    async with client_of(url) as admin, SessionStore.from_url(url, references=REFERENCES, prefix=keyspace.prefix) as s:
        yield Place(url, keyspace.prefix, s, admin)


async def fill(store: SessionStore, count: int, **values: Any) -> list[str]:
    """Make sessions."""
    made = list[str]()
    for _ in range(0, count, 500):
        made += await asyncio.gather(*(store.create(values) for _ in range(min(500, count - len(made)))))
    return made


# Looking at sessions, and ending them.


@on_both
async def test_ls(place: Place) -> None:
    """`ls` shows the id, the creation, the time left and the references of each session, or other fields."""
    values = {"user_id": 7, "ip": "10.0.0.1", "device": "phone"}
    ids = [await place.store.create(values, "1h") for _ in range(3)]
    await place.store.create({"user_id": 8})
    table = (await place.rss("ls", "user_id=7")).out
    assert all(re.search(rf"{one} +20\S+ \S+ +(1h|59m \d+s) +7 +10.0.0.1", table) for one in ids)
    assert "device" not in table
    assert "phone" in (await place.rss("ls", "user_id=7", "--fields", "device")).out
    rows = (await place.rss("ls", "user_id=7", "--json", "--fields", "device,ip")).lines
    assert {row["id"] for row in rows} == {*ids}
    assert rows[0]["fields"] == {"device": "phone", "ip": "10.0.0.1"}
    assert rows[0]["ttl"] == pytest.approx(3600, abs=60)
    assert rows[0]["created"].startswith("20")
    limited = await place.rss("ls", "user_id=7", "--limit", "2", "--json")
    assert len(limited.lines) == 2
    assert "first 2 sessions" in limited.err
    assert (await place.rss("ls", "user_id=9", expect=1)).err == "No session has this value.\n"
    assert "phone" in (await place.rss("ls", "user_id=7", "--fields", " id, device")).out


async def test_ls_in_a_narrow_terminal(place: Place) -> None:
    """If the table is wider than the terminal, `ls` prints a table for each session, with the whole id."""
    ids = await fill(place.store, 2, user_id=7, ip="10.0.0.1")
    for columns, headings in ((200, 1), (60, 2)):
        args = ["ls", "user_id=7", "--fields", "user_id,ip", "--url", place.url, "--prefix", place.prefix]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", str(columns))
            code, shown = await asyncio.to_thread(talk, args, "", b"")
        assert code == 0
        assert shown.count("10.0.0.1") == 2
        assert shown.count("created (UTC)") == headings
        assert all(one in shown for one in ids)


@on_both
async def test_show(place: Place) -> None:
    """`show` shows all fields and the sets of a session, or why it ended."""
    session_id = await place.store.create({"user_id": 7, "ip": "x", "cart": ["a", 1]})
    shown = (await place.rss("show", session_id)).out
    assert re.search(r"cart +\[\"a\", 1\]", shown)
    [row] = (await place.rss("show", session_id, "--json")).lines
    assert row["fields"] == {"user_id": 7, "ip": "x", "cart": ["a", 1]}
    assert row["state"] == "alive"
    for name in row["sets"]:
        assert await place.admin.sismember(name, session_id)
        assert name in shown
    assert len(row["sets"]) == 2
    await place.store.delete(session_id, reason="stolen")
    assert "The session was ended: stolen." in (await place.rss("show", session_id, expect=1)).out
    [row] = (await place.rss("show", session_id, "--json", expect=1)).lines
    assert row == {"id": session_id, "state": "ended", "reason": "stolen"}
    assert "no such session" in (await place.rss("show", "nothing", expect=1)).out


async def test_ids_that_begin_with_dashes(place: Place) -> None:
    """An id may begin with one dash or two, and is not taken for an option."""
    for session_id in ("-h7", "--help-me", "--json-", "-"):
        await place.store.set(session_id, {"user_id": 7})
        assert session_id in (await place.rss("show", session_id)).out
        await place.rss("revoke", "user_id=7", "--keep", session_id, expect=1)
        await place.rss("revoke", "--id", session_id)


@on_both
async def test_count(place: Place) -> None:
    """`count` counts the live sessions, and --fast the ids in the set."""
    ids = await fill(place.store, 3, user_id=7)
    await place.admin.unlink(place.store.get_session_key(ids[0]))
    assert (await place.rss("count", "user_id=7")).out == "2\n"
    assert (await place.rss("count", "user_id=7", "--json")).lines == [{"count": 2}]
    assert int((await place.rss("count", "user_id=9", "--fast")).out) == 0


@on_both
async def test_revoke(place: Place) -> None:
    """`revoke` ends the sessions of a value except those to keep, and blocks the value if that is wanted."""
    ids = await fill(place.store, 4, user_id=7)
    other = await place.store.create({"user_id": 8})
    kept = ["--keep", ids[0], "--keep", ids[1]]
    refused = await place.rss("revoke", "user_id=7", *kept, expect=2)
    assert "use --yes" in refused.err
    assert await place.store.count_by("user_id", 7) == 4
    revoked = await place.rss("revoke", "user_id=7", *kept, "--yes", "--json", "--reason", "reset", "--block", "1h")
    assert revoked.lines == [{"ended": 2}]
    assert sorted(await place.store.ids_by("user_id", 7)) == sorted(ids[:2])
    assert await place.store.ended(ids[2]) == "reset"
    assert await place.store.blocked("user_id", 7)
    # One session is ended without a question.
    assert "1 session was ended" in (await place.rss("revoke", "--id", ids[0])).out
    assert "1 session was ended" in (await place.rss("revoke", "user_id=8")).out
    assert not await place.store.get(other)
    assert "0 sessions were ended" in (await place.rss("revoke", "user_id=8", expect=1)).out
    await place.rss("revoke", "--id", ids[0], expect=1)


@on_both
async def test_a_session_to_keep_that_is_not_alive(place: Place) -> None:
    """`revoke --keep` ends nothing if a session to keep is not alive: its id may be mistyped."""
    ids = await fill(place.store, 3, user_id=7)
    for keep in (["mistyped"], [ids[0], "mistyped"]):
        result = await place.rss("revoke", "user_id=7", "--yes", *(f"--keep={one}" for one in keep), expect=1)
        assert result.err == "The session mistyped of --keep is not alive. Nothing was ended.\n"
    assert await place.store.count_by("user_id", 7) == 3
    args = ["revoke", "user_id=7", f"--keep={ids[0]}", "--url", place.url, "--prefix", place.prefix]
    assert (await asyncio.to_thread(talk, args, "End about 2 sessions with user_id=7?", b"y\n"))[0] == 0
    assert await place.store.ids_by("user_id", 7) == ids[:1]
    assert (await asyncio.to_thread(talk, args, "", b""))[0] == 1  # No other session is left, so there is no question.


@pytest.mark.parametrize("data", ['{"a": 1}', "1.5", "true", "[[1]]", '""', "\udcff"])
async def test_show_a_damaged_session(place: Place, data: str) -> None:
    """`show` shows a session even if the value of a reference is none. That value has no set."""
    session_id = await place.store.create({"user_id": 7, "ip": "x"})
    key = place.store.get_session_key(session_id)
    await place.admin.hset(key, "ip", data.encode(errors="surrogateescape"))
    (row,) = (await place.rss("show", session_id, "--json")).lines
    assert row["sets"] == [place.store.get_reference_key("user_id", 7)]
    assert session_id in (await place.rss("show", session_id)).out


async def test_bad_arguments(place: Place) -> None:
    """Wrong usage has exit code 2, and changes nothing."""
    session_id = await place.store.create({"user_id": 7})
    for args, words in {
        ("revoke",): "either a reference and a value, or --id",
        ("revoke", "user_id=7", "--id", session_id): "either a reference and a value, or --id",
        ("revoke", "--id", session_id, "--block", "1s"): "--keep and --block are for",
        ("revoke", "user_id=7", "--reason", "two words"): "reason must be a short word",
        ("revoke", "user_id=7", "--block", "soon"): "must be a number and a unit",
        ("revoke", "user_id=7", "--durable", "0"): "--durable",
        ("block", "user_id=7", "5"): "TIME must be a number and a unit",
        ("count", "device=7"): "device is no reference of this prefix. Its references: user_id, ip, team",
        ("ls", "user_id=7", "--fields", "_created"): "reserved",
        ("count", "user_id"): "give a reference and a value",
        ("count", "=7"): "give a reference and a value",
        ("reindex", "--forget", "device"): "no reference 'device'",
        ("show", ""): "must not be empty",
        ("nothing",): "No such command",
    }.items():
        assert words in (await place.rss(*args, expect=2)).err
    assert await place.store.count_by("user_id", 7) == 1


@on_both
async def test_block_and_unblock(place: Place) -> None:
    """`block` ends the sessions of a value, and refuses others until `unblock`."""
    await fill(place.store, 2, user_id=7)
    await place.rss("block", "user_id=7", "1h", expect=2)
    assert (await place.rss("block", "user_id=7", "1h", "--yes", "--json")).lines == [{"ended": 2}]
    left = await place.store.blocked("user_id", 7)
    assert left
    assert left.total_seconds() > 3500
    await place.rss("block", "user_id=9", "1h")
    assert (await place.rss("unblock", "user_id=7", "--json")).lines == [{"unblocked": True}]
    assert await place.store.blocked("user_id", 7) is None
    assert "was not blocked" in (await place.rss("unblock", "user_id=7", expect=1)).out


# Looking after the keys.


@on_both
async def test_stats(place: Place) -> None:
    """`stats` counts the keys, finds the largest values, and estimates bytes and the stale share."""
    ids = [*await fill(place.store, 30, user_id=7, ip="x"), *await fill(place.store, 10, user_id=8)]
    await place.store.delete(ids[0])
    await place.store.block("ip", "y", "1h")
    gone = ids[-5:]
    for one in gone:
        await place.admin.unlink(place.store.get_session_key(one))
    await place.admin.set(f"{place.prefix}:thing", "x", ex=600)
    await place.admin.set(place.store.get_session_key("a-string"), "x", ex=600)
    for value in ("", "x" * 600):  # No value of a reference.
        await place.admin.set(place.store.get_reference_key("user_id", "QQQ").replace("QQQ", value), "x", ex=600)
    await place.store.rotate(ids[1], grace="1m")
    await place.admin.sadd((await place.rss("show", ids[30], "--json")).lines[0]["sets"][0], b"\xff")
    [told] = (await place.rss("stats", "--json")).lines
    assert (told["sessions"], told["tombstones"], told["other"]) == (34, 2, 4)
    assert told["fences"] > 0
    assert told["references"]["user_id"]["largest"] == [{"value": "7", "ids": 29}, {"value": "8", "ids": 11}]
    assert told["references"]["user_id"]["ids"] == 40
    assert told["references"]["team"] == {"sets": 0, "ids": 0, "stale_share": None, "largest": []}
    assert 0 <= told["references"]["user_id"]["stale_share"] <= 0.5
    assert told["references"]["ip"]["stale_share"] == 0
    assert 34 * 100 < told["bytes"] < 34 * 3000
    table = (await place.rss("stats")).out
    assert re.search(r"sessions +34", table)
    assert "7: 29, 8: 11" in table


@on_both
async def test_check_and_repair(place: Place) -> None:
    """`check` finds damage, changes nothing, and exits with 1. `repair` mends it. Stale ids alone are no damage."""
    ids = await fill(place.store, 5, user_id=7)
    key = (await place.rss("show", ids[0], "--json")).lines[0]["sets"][0]
    assert (await place.rss("check")).err == "Nothing is wrong.\n"
    await place.admin.sadd(key, "dead-1", "dead-2")
    assert re.search(r"stale +2 ", (await place.rss("check")).out)
    await place.admin.srem(key, ids[0])
    await place.admin.persist(place.store.get_session_key(ids[1]))
    before = await place.dump()
    found = (await place.rss("check", "--json", expect=1)).lines
    assert {one["kind"] for one in found} == {"outside", "endless", "stale"}
    table = (await place.rss("check", expect=1)).out
    assert "a set lacks a live session" in table
    assert ids[0] not in table
    await place.rss("repair", expect=2)
    assert await place.dump() == before
    mended = (await place.rss("repair", "--yes", "--json")).lines
    assert all(one["mended"] for one in mended)
    assert {"kind": "outside", "key": key, "session_id": ids[0], "count": 1, "mended": True} in mended
    assert (await place.rss("check")).err == "Nothing is wrong.\n"
    assert sorted(await place.store.ids_by("user_id", 7)) == sorted(ids)


@on_both
async def test_sweep(place: Place) -> None:
    """`sweep` removes stale ids, and says how many."""
    ids = await fill(place.store, 3, ip="x")
    key = (await place.rss("show", ids[0], "--json")).lines[0]["sets"][0]
    await place.admin.sadd(key, "dead-1", "dead-2")
    assert (await place.rss("sweep", "--json")).lines == [{"removed": 2}]
    assert "0 stale ids were removed" in (await place.rss("sweep")).out


async def test_a_repair_keeps_lifetimes(redis_url: str, keyspace: Keyspace) -> None:
    """A session that has lost its TTL gets one as the store of the application would give it."""
    options: dict[str, Any] = {"prefix": keyspace.prefix, "references": ["user_id"]}
    for age, lifetime, longest in (("30m", None, 1800), ("30m", "12h", 1800), ("2h", "1h", 3600)):
        async with (
            SessionStore.from_url(redis_url, max_age=age, max_lifetime=lifetime, **options) as store,
            client_of(redis_url) as admin,
        ):
            session_id, place = await store.create({"user_id": 7}), Place(redis_url, keyspace.prefix, store, admin)
            await admin.persist(store.get_session_key(session_id))
            await place.rss("repair", "--yes")
            assert longest - 60 < await admin.ttl(store.get_session_key(session_id)) <= longest
            await store.delete(session_id)


@on_both
async def test_incomplete_references(place: Place, redis_url: str) -> None:
    """A reference that another store has added is shown as incomplete, until `reindex`."""
    del redis_url
    old = await place.store.create({"user_id": 7, "device": "phone"})
    more = {**REFERENCES, "device": Reference()}
    async with SessionStore.from_url(place.url, references=more, prefix=place.prefix) as newer:
        new = await newer.create({"user_id": 7, "device": "phone"})
        before = await place.dump()
        for args, out in (
            (("ls", "device=phone", "--json"), new),
            (("count", "device=phone", "--json"), '{"count": 1}'),
            (("count", "device=phone", "--fast", "--json"), '{"count": 1}'),
            (("revoke", "device=none", "--json"), '{"ended": 0}'),
        ):
            result = await place.rss(*args, expect=4)
            assert "the reference 'device' is incomplete" in result.err
            assert len(result.lines) == 1
            assert out in result.out
        assert re.search(r"warning +reference device +Its sets may lack sessions", (await place.rss("doctor")).out)
        assert (await place.rss("stats", "--json")).lines[0]["references"]["device"]["ids"] == 1
        assert await place.dump() == before
        assert (await place.rss("reindex", "--json")).lines == [{"completed": ["device"]}]
        rows = (await place.rss("ls", "device=phone", "--json")).lines
        assert {row["id"] for row in rows} == {old, new}
        assert "Every reference was complete." in (await place.rss("reindex")).out
        assert sorted(await newer.ids_by("device", "phone")) == sorted([old, new])
    await place.rss("reindex", "--forget", "device")
    assert "device is no reference" in (await place.rss("count", "device=phone", expect=2)).err


@on_both
async def test_opening_marks_nothing(place: Place) -> None:
    """Commands that only look change no key, not even for a moment a TTL, and mark no reference."""
    ids = await fill(place.store, 60, user_id=7, ip="x", team="t")
    await place.store.block("ip", "y", "1h")
    before = await place.dump()
    for args in (
        ("ls", "user_id=7"), ("show", ids[0]), ("count", "user_id=7"), ("count", "team=t", "--fast"), ("stats",),
        ("check",), ("sweep",), ("reindex",), ("doctor",), ("repair", "--yes"),
    ):  # fmt: skip
        await place.rss(*args)
        assert await place.dump() == before, args


@on_both
async def test_a_reference_that_is_added_meanwhile(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a store opens with another reference after the command has read them, that one is not marked as missing."""
    more, made = {**REFERENCES, "device": Reference()}, opening.store_of

    async def add() -> None:
        async with SessionStore.from_url(place.url, references=more, prefix=place.prefix) as newer:
            await newer.maintenance.reindex()

    def add_and_make(*args: Any, **options: Any) -> Any:
        thread = asyncio.run_coroutine_threadsafe(add(), loop)
        thread.result(20)
        return made(*args, **options)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(opening, "store_of", add_and_make)
    await place.rss("count", "user_id=7")
    async with SessionStore.from_url(place.url, references=more, prefix=place.prefix) as newer:
        assert await newer.ids_by("device", "phone") == []


@on_both
async def test_strict_references(place: Place) -> None:
    """A session that is revoked, because a strict set lacks it, counts as such, and a repair does not bring it back."""
    session_id = await place.store.create({"user_id": 7, "team": "t"})
    key = next(key for key in (await place.rss("show", session_id, "--json")).lines[0]["sets"] if "team" in key)
    await place.admin.unlink(key)
    assert "revoked" in (await place.rss("show", session_id, expect=1)).out
    assert (await place.rss("count", "user_id=7")).out == "0\n"
    await place.rss("check")
    await place.rss("repair", "--yes")
    assert await place.store.get(session_id) == {}


async def test_text_codec(redis_url: str, keyspace: Keyspace) -> None:
    """The sessions of a store with `TextCodec` are read as it wrote them, and its sets are not taken for stale."""
    options: dict[str, Any] = {"references": ["user_id"], "prefix": keyspace.prefix, "codec": TextCodec()}
    async with SessionStore.from_url(redis_url, **options) as store, client_of(redis_url) as admin:
        place = Place(redis_url, keyspace.prefix, store, admin)
        for value in ('"a"', "null", "[1]"):
            session_id = await store.create({"user_id": value, "n": "1"})
            assert (await place.rss("show", session_id, "--json")).lines[0]["fields"] == {"user_id": value, "n": "1"}
            assert (await place.rss("count", f"user_id={value}")).out == "1\n"
        assert "Nothing is wrong" in (await place.rss("check")).err
        assert (await place.rss("sweep", "--json")).lines == [{"removed": 0}]


async def test_unreadable_fields(redis_url: str, keyspace: Keyspace) -> None:
    """A field that is encrypted is shown as such. The references are readable."""
    codec = EncryptingCodec([secrets.token_bytes(32)])
    async with (
        SessionStore.from_url(redis_url, references=["user_id"], prefix=keyspace.prefix, codec=codec) as store,
        client_of(redis_url) as admin,
    ):
        place = Place(redis_url, keyspace.prefix, store, admin)
        session_id = await store.create({"user_id": 7, "card": "4111"})
        fields = (await place.rss("show", session_id, "--json")).lines[0]["fields"]
        assert fields == {"user_id": 7, "card": "<unreadable>"}
        assert "<unreadable>" in (await place.rss("ls", "user_id=7", "--fields", "card")).out


async def test_values_cannot_command_the_terminal(place: Place) -> None:
    """Control characters and markup in values, which visitors may choose, are printed as texts."""
    evil = "[red]\x1b[2J\x9b\r\n\u202e"
    session_id = await place.store.create({"user_id": 7, "ip": evil, "\x1b[1m": [evil]})
    for args in (("ls", "user_id=7"), ("show", session_id), ("stats",), ("ls", "user_id=7", "--json")):
        out = (await place.rss(*args)).out
        assert not set(out) & set("\x1b\x9b\r\u202e")
    assert r"[red]\x1b[2J\x9b\r\n\u202e" in (await place.rss("ls", "user_id=7")).out


def test_an_output_without_unicode(url: str) -> None:
    """A character that the output cannot show is escaped."""

    async def make() -> None:
        async with SessionStore.from_url(url, references=["user_id"], prefix="ascii") as store:
            await store.create({"user_id": "J\xfcrgen"})

    asyncio.run(make())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONIOENCODING", "ascii")
        process = command("ls", "user_id=J\xfcrgen", "--url", url, "--prefix", "ascii")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert r"J\xfcrgen" in out


# The meta key.


async def test_another_identity(redis_url: str, keyspace: Keyspace) -> None:
    """If the identity of the stores has changed, the command works, and forgets the old one if it is told so."""
    for name in ("user_id", "account_id"):
        identity = {name: Reference(identity=True)}
        async with (
            SessionStore.from_url(redis_url, references=identity, prefix=keyspace.prefix) as store,
            client_of(redis_url) as admin,
        ):
            await store.create({name: 7})
            place = Place(redis_url, keyspace.prefix, store, admin)
    assert (await place.rss("count", "user_id=7", "--json", expect=4)).lines == [{"count": 1}]
    await place.rss("doctor")
    await place.rss("reindex", "--forget", "user_id")
    assert (await place.rss("count", "account_id=7")).out == "1\n"


@pytest.mark.parametrize(("field", "data"), [("max_age", b"x"), ("partitions", b"x"), ("reference:a", b"\xff")])
async def test_a_damaged_meta_key(place: Place, field: str, data: bytes) -> None:
    """If the meta key cannot be read, the error says so."""
    await place.admin.hset(f"{place.prefix}:_meta", field, data)
    assert f"the key {place.prefix}:_meta is damaged" in (await place.rss("check", expect=2)).err


async def test_the_options_of_references_are_kept(redis_url: str, keyspace: Keyspace) -> None:
    """The meta key tells the options of the last store that opened. An older version has not written them."""
    options: dict[str, Any] = {"prefix": keyspace.prefix}
    async with SessionStore.from_url(redis_url, references=["a"], **options) as store, client_of(redis_url) as admin:
        place, meta = Place(redis_url, keyspace.prefix, store, admin), store.operations.layout.meta

        async def held() -> Held | None:
            return await held_by(store.operations.layout, store.operations.engine.servers.master_of)

        first = Held(
            "1",
            None,
            None,
            {"a": Reference()},
            28 * 86_400_000,
            0,
            events=False,
            json=True,
            complete=True,
            moving=False,
        )
        assert await held() == first
        await admin.hset(meta, "reference:a", "")
        assert "an older version" in (await place.rss("check", expect=2)).err
        strict = {"a": Reference(strict=True, identity=True)}
        async with SessionStore.from_url(redis_url, references=strict, events=True, **options):
            assert await held() == first._replace(references=strict, events=True)
        async with SessionStore.from_url(redis_url, references=strict, **options) as newer:
            assert await held() == first._replace(references=strict)
            assert await newer.ids_by("a", 1) == []  # It was not marked.
        async with SessionStore.from_url(redis_url, references=["a", "b"], codec=TextCodec(), **options):
            references = {"a": Reference(), "b": Reference()}
            assert await held() == first._replace(references=references, json=False)
        async with SessionStore.from_url(
            redis_url, references=["a", "b"], max_age="30m", max_lifetime="12h", **options
        ):
            assert await held() == first._replace(references=references, max_age=1_800_000, max_lifetime=43_200_000)
            with pytest.raises(IncompleteReference):
                await SessionStore(admin, references=["a", "b"], **options).ids_by("b", 1)
        await admin.hset(meta, "format", "2")
        assert "a format that this version does not know" in (await place.rss("check", expect=2)).err


@pytest.mark.parametrize("partitions", [1, 8])
@pytest.mark.parametrize("by_identity", [True, False])
async def test_partitions(redis_url: str, keyspace: Keyspace, partitions: int, *, by_identity: bool) -> None:
    """The command finds the sessions of a store with partitions, whether these follow the identity or not."""
    async with (
        SessionStore.from_url(
            redis_url,
            references={"user_id": Reference(identity=True, limit=9 if by_identity else None), "ip": Reference()},
            prefix=keyspace.prefix,
            partitions=partitions,
            partition_by_identity=by_identity,
        ) as store,
        client_of(redis_url) as admin,
    ):
        place = Place(redis_url, keyspace.prefix, store, admin)
        await fill(store, 5, user_id=7, ip="x")
        assert (await place.rss("count", "user_id=7")).out == "5\n"
        assert "Nothing is wrong" in (await place.rss("check")).err
        await place.rss("doctor")
        assert (await place.rss("revoke", "ip=x", "--yes", "--json")).lines == [{"ended": 5}]


# Failures.


async def test_a_prefix_that_does_not_exist(redis_url: str) -> None:
    """A prefix that no store has used is not made by looking at it."""
    async with client_of(redis_url) as admin:
        place = Place(redis_url, "nobody", SessionStore(admin), admin)
        for args in (("check",), ("count", "a=1"), ("repair", "--yes"), ("doctor",)):
            assert "no store has used the prefix 'nobody'" in (await place.rss(*args, expect=2)).err
        assert await place.dump() == {}
        place.prefix = "a{b"
        assert "must not hold a brace" in (await place.rss("check", expect=2)).err


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("redis://me:hunter2@127.0.0.1:1", 3, "cannot connect to Redis at 127.0.0.1:1"),
        ("redis+cluster://me:hunter2@127.0.0.1:1", 3, "cannot connect to Redis at 127.0.0.1:1"),
        ("redis+sentinel://me:hunter2@127.0.0.1:1,127.0.0.1:2/main", 3, "the Sentinel service 'main'"),
        ("redis+sentinel://me:hunter2@127.0.0.1", 2, "the URL must be"),
        ("http://me:hunter2@127.0.0.1", 2, "the URL must be"),
        ("redis://me:hunter2@127.0.0.1:port", 2, "the URL must be"),
        ("redis://me:hunter2@127.0.0.1/?foo=bar", 2, "the URL must be"),
        ("redis+cluster://me:hunter2@127.0.0.1/?foo=bar", 2, "the URL must be"),
        ("redis+cluster://me:hunter2@127.0.0.1/1", 2, "the URL must be"),
        ("redis+cluster://", 2, "the URL must be"),
    ],
)
def test_a_server_that_cannot_be_used(url: str, code: int, words: str) -> None:
    """The error is one sentence without the password."""
    result = run("check", "--url", url)
    assert (result.code, result.err.count("\n")) == (code, 1)
    assert words in result.err
    assert "hunter2" not in result.err


def test_another_kind_of_server() -> None:
    """If the URL is for another kind of server, or for another database, the error says so."""
    port = free_port()
    with own_server("--port", str(port), "--bind", "127.0.0.1"):
        for url, words in (
            (f"redis://127.0.0.1:{port}/99", "no database of that number"),
            (f"redis+cluster://127.0.0.1:{port}", "not a Redis Cluster"),
        ):
            result = run("count", "user_id=7", "--url", url)
            assert (result.code, result.err.count("\n")) == (3, 1)
            assert words in result.err


def test_a_wrong_password() -> None:
    """A server that refuses the user has exit code 3."""
    with own_server("--requirepass", "secret") as url:
        for wrong in (url, url.replace("://", "://:hunter2@")):
            result = run("count", "user_id=7", "--url", wrong)
            assert (result.code, result.err) == (3, "Error: Redis refuses: AUTH\n")


async def test_a_server_that_stops(url: str) -> None:
    """If Redis does not answer any more, the error is one sentence with exit code 3."""
    async with SessionStore.from_url(url, references=["a"]) as store:
        await store.create()
        async with client_of(url) as admin, stopped(admin):
            result = await asyncio.to_thread(run, "count", "a=1", "--url", url)
    assert (result.code, result.err.count("\n")) == (3, 1)
    assert "cannot connect to Redis" in result.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PartlyDone(3, 1, 16), 3, "run it again"),
        (IncompleteReference("user_id"), 4, "rss reindex"),
        (TimeoutError(), 3, "Redis does not answer"),
        (redis.exceptions.ConnectionError("127.0.0.1 hung up"), 3, "Redis does not answer"),
        (ValueError("a bad argument"), 2, "a bad argument"),
    ],
)
async def test_an_error_is_a_sentence(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    """Each error becomes one sentence and an exit code."""
    await place.store.create({"user_id": 7})

    async def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(SessionStore, "count_by", fail)
    result = await place.rss("count", "user_id=7", expect=code)
    assert result.err.count("\n") == 1
    assert words in result.err


def test_numbers_for_people() -> None:
    """Sizes have units, and a time that is none is left out."""
    assert [output.size(count) for count in (7, 2048, 5e6, 5e9)] == ["7 B", "2.05 kB", "5 MB", "5 GB"]
    assert output.date(b"soon") is None


def test_the_extra_is_missing() -> None:
    """Without click or rich, one sentence says how to install them."""
    for name in ("click", "rich"):
        script = f"import sys; sys.modules[{name!r}] = None; from rss.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, f"rss needs {name}: pip install 'redis-session-sets[cli]'\n")


async def test_a_closed_pipe(place: Place) -> None:
    """`rss ls user_id=7 | head -1` ends without an error message."""
    await fill(place.store, 900, user_id=7)
    for more in (("ls", "user_id=7"), ("ls", "user_id=7", "--json"), ("doctor", "--json")):
        process = command(*more, "--url", place.url, "--prefix", place.prefix)
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert await asyncio.to_thread(process.stderr.read) == ""
        assert await asyncio.to_thread(process.wait, 20) in (0, 1)
        process.stderr.close()


async def interrupt(place: Place, args: list[str], begun: Callable[[], bool]) -> tuple[int, str]:
    """Run a command in a process of its own, and send it a Ctrl-C when it has begun. Return its code and stderr."""
    process = command(*args, "--url", place.url, "--prefix", place.prefix)
    while not await asyncio.to_thread(begun):
        assert process.poll() is None, process.communicate()
        await asyncio.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.to_thread(process.communicate, None, 30)
    return process.returncode, err


async def test_watching_what_nobody_publishes(url: str) -> None:
    """`watch` says that the stores publish no events. A reason of another program does not command the terminal."""
    async with client_of(url) as admin, SessionStore.from_url(url) as store:
        await admin.flushall()
        async with SessionStore.from_url(url):
            pass
        process = command("watch", "--url", url)
        assert process.stdout
        while not await admin.pubsub_channels():
            await asyncio.sleep(0.01)
        await admin.publish(store.operations.layout.events(0), json.dumps(["ended", "x", "\x1b[2J\n", ""]))
        line = await asyncio.to_thread(process.stdout.readline)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.to_thread(process.communicate, None, 30)
        assert line.endswith(r"ended    x \x1b[2J\n" + "\n")
        assert "The store that opened last publishes no events" in err


@pytest.mark.parametrize("as_json", [False, True])
async def test_watching(url: str, *, as_json: bool) -> None:
    """`watch` prints each event while it happens, until Ctrl-C."""
    async with client_of(url) as admin, SessionStore.from_url(url, references=REFERENCES, events=True) as store:
        await admin.flushall()
        async with SessionStore.from_url(url, references=REFERENCES):
            pass
        process = command("watch", "--url", url, *(["--json"] if as_json else []))
        assert process.stdout
        while not await admin.pubsub_channels():
            await asyncio.sleep(0.01)
        first = await store.create({"user_id": 7, "ip": "x"})
        second = await store.rotate(first)
        await store.block("user_id", 7, "1s", reason="stolen")
        lines = [await asyncio.to_thread(process.stdout.readline) for _ in range(4)]
        process.send_signal(signal.SIGINT)
        await asyncio.to_thread(process.communicate, None, 30)
        assert process.returncode == 130
        if as_json:
            events = [json.loads(line) for line in lines]
            assert [event["kind"] for event in events] == ["created", "rotated", "blocked", "ended"]
            assert [event["session_id"] for event in events] == [first, first, "", second]
            assert events[3]["identity"] == 7
        else:
            words = [line.split(maxsplit=1)[1].rstrip() for line in lines]
            assert words[0] == f"created  {first}"
            assert words[1] == f"rotated  {first} -> {second}"
            assert words[2] == "blocked  user_id=7 stolen"
            assert words[3] == f"ended    {second} of 7 stolen"


async def test_watching_a_reason(url: str) -> None:
    """`watch --reason` leaves out what has another reason."""
    async with client_of(url) as admin, SessionStore.from_url(url, references=REFERENCES, events=True) as store:
        await admin.flushall()
        async with SessionStore.from_url(url, references=REFERENCES):
            pass
        process = command("watch", "--url", url, "--json", "--reason", "password")
        assert process.stdout
        while not await admin.pubsub_channels():
            await asyncio.sleep(0.01)
        first, second = [await store.create({"user_id": 7}) for _ in range(2)]
        await store.delete(first, reason="logout")
        await store.delete(second, reason="password")
        event = json.loads(await asyncio.to_thread(process.stdout.readline))
        process.send_signal(signal.SIGINT)
        await asyncio.to_thread(process.communicate, None, 30)
        assert (event["kind"], event["session_id"]) == ("ended", second)


@pytest.mark.parametrize("partitions", [None, 4])
async def test_what_the_command_does_is_told(url: str, partitions: int | None) -> None:
    """The readers of events hear what the command ends, as if the application had done it, but nothing of a doctor."""
    options: dict[str, Any] = {"references": REFERENCES, "partitions": partitions, "partition_by_identity": False}
    async with client_of(url) as admin:
        await admin.flushall()
        async with SessionStore.from_url(url, events=True, **options) as store, store.events() as events:
            first, second = [await store.create({"user_id": 7, "ip": "x"}) for _ in range(2)]
            assert [(await anext(events)).kind for _ in range(2)] == ["created"] * 2
            await admin.unlink(store.get_session_key(second))
            for args in (["doctor"], ["sweep"], ["revoke", "ip=x", "--yes"]):
                assert (await asyncio.to_thread(run, *args, "--url", url)).code == 0
            told = [await anext(events) for _ in range(2)]
        await admin.flushall()
        assert [(one.kind, one.session_id, one.reason, one.identity) for one in told] == [
            ("ended", second, "expired", None),
            ("ended", first, "revoked", 7),
        ]


async def test_a_repair_that_may_not_remove(url: str) -> None:
    """If a key could not be removed, the output says that it was not mended, and the exit code is 1."""
    async with client_of(url) as admin, SessionStore.from_url(url, references=["user_id"]) as store:
        await admin.flushall()
        async with SessionStore.from_url(url, references=["user_id"]):
            await store.create({"user_id": 1})
        await admin.set("rss:stray", "x")
        rules = [*ACL_RULE.split(), "+scan", "+dbsize", "-unlink"]
        await admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *rules)
        user = url.replace("://", "://app:secret@")
        result = await asyncio.to_thread(run, "repair", "--yes", "--url", user)
        assert (result.code, "not mended" in result.out) == (1, True), result
        lines = (await asyncio.to_thread(run, "repair", "--yes", "--json", "--url", user)).lines
        assert [line["mended"] for line in lines] == [False]
        assert await admin.exists("rss:stray")
        assert (await asyncio.to_thread(run, "repair", "--yes", "--url", url)).code == 0
        await admin.execute_command("ACL", "DELUSER", "app")


async def test_the_doctor_of_an_incomplete_reference(url: str) -> None:
    """A reference that is incomplete is a warning, and no error of the scripts."""
    async with client_of(url) as admin:
        await admin.flushall()
        async with SessionStore.from_url(url), SessionStore.from_url(url, references=["user_id"]) as store:
            await store.create({"user_id": 1})
        result = await asyncio.to_thread(run, "doctor", "--url", url, "--json")
        levels = {line["what"]: line["level"] for line in result.lines}
        assert (result.code, levels["scripts"], levels["reference user_id"]) == (0, "ok", "warning"), result


async def test_an_interrupted_sweep(url: str) -> None:
    """After a Ctrl-C in a long sweep, the command says how far it got, and nothing is broken."""
    async with client_of(url) as admin, SessionStore.from_url(url, references=["ip"]) as store:
        await admin.flushall()
        place = Place(url, "rss", store, admin)
        async with SessionStore.from_url(url, references=["ip"]):
            alive = await fill(store, 100, ip="x")
        pipe = admin.pipeline(transaction=False)
        for n in range(60_000):
            pipe.sadd(f"rss:ip:{{{n}}}", "dead").pexpire(f"rss:ip:{{{n}}}", 600_000)
        await pipe.execute()
        with SyncRedis.from_url(url) as counter:
            full = counter.dbsize()
            code, err = await interrupt(place, ["sweep"], lambda: full - counter.dbsize() > 500)
        assert code == 130
        assert re.fullmatch(r"\n?Interrupted after \d+% of the keys. .*Run it again.\n", err)
        assert await admin.dbsize() > 1000
        assert sorted(await store.ids_by("ip", "x")) == sorted(alive)
        await admin.flushall()


async def test_an_interrupted_revoke(url: str) -> None:
    """After a Ctrl-C in a revocation, the command says how many sessions are left. Each is either alive or ended."""
    async with client_of(url) as admin, SessionStore.from_url(url, references=["user_id"]) as store:
        await admin.flushall()
        async with SessionStore.from_url(url, references=["user_id"]):
            await fill(store, 30_000, user_id=7)
        place, key = Place(url, "rss", store, admin), store.get_reference_key("user_id", 7)
        with SyncRedis.from_url(url) as counter:
            begun = lambda: counter.scard(key) < 30_000  # noqa: E731 - it is short
            code, err = await interrupt(place, ["revoke", "user_id=7", "--yes"], begun)
        left = await store.count_by("user_id", 7)
        assert code == 130
        assert err == f"Interrupted. Of the sessions to end, about {left:,} are left: run it again.\n"
        assert 0 < left < 30_000
        assert "Nothing is wrong" in (await place.rss("check")).err
        await admin.flushall()


async def test_an_interrupted_revoke_of_a_server_that_stops(url: str) -> None:
    """After a Ctrl-C, the command does not wait long for a server that does not answer."""
    async with client_of(url) as admin, SessionStore.from_url(url, references=["user_id"]) as store:
        await admin.flushall()
        async with SessionStore.from_url(url, references=["user_id"]):
            await fill(store, 30_000, user_id=7)
        key = store.get_reference_key("user_id", 7)
        process = command("revoke", "user_id=7", "--yes", "--url", url)
        while await admin.scard(key) == 30_000:
            await asyncio.sleep(0.001)
        async with stopped(admin):
            process.send_signal(signal.SIGINT)
            _, err = await asyncio.to_thread(process.communicate, None, 8)
        assert process.returncode == 130
        assert err == "Interrupted. Of the sessions to end, some are left: run it again.\n"
        await admin.flushall()


def talk(args: list[str], prompt: str, answer: bytes | signal.Signals) -> tuple[int, str]:
    """Run the command in a terminal, answer its question, and return its exit code and what it showed."""
    terminal, other = pty.openpty()
    process = command(*args, stdin=other, stdout=other, stderr=other, start_new_session=True)
    os.close(other)
    shown, asked = "", not prompt
    with contextlib.suppress(OSError):  # The command has ended.
        while select.select([terminal], [], [], 20)[0] and (part := os.read(terminal, 65536)):
            shown += part.decode(errors="replace")
            if not asked and prompt in shown:
                asked = True
                time.sleep(0.3)  # A signal that arrives while readline begins is noticed only at the next key.
                if isinstance(answer, bytes):
                    os.write(terminal, answer)
                else:
                    process.send_signal(answer)
    os.close(terminal)
    return process.wait(20), shown


async def test_a_question(place: Place) -> None:
    """In a terminal, the command asks before it ends several sessions. "n" and Ctrl-C change nothing."""
    await fill(place.store, 3, user_id=7)
    args = ["revoke", "user_id=7", "--url", place.url, "--prefix", place.prefix]
    prompt = "End about 3 sessions with user_id=7?"
    for answer, code, left in ((b"n\n", 1, 3), (signal.SIGINT, 130, 3), (b"y\n", 0, 0)):
        told = await asyncio.to_thread(talk, args, prompt, answer)
        assert told[0] == code, told
        assert "Traceback" not in told[1]
        assert ("Nothing was changed." in told[1]) == (code != 0)
        assert await place.store.count_by("user_id", 7) == left


async def test_progress(place: Place) -> None:
    """In a terminal, the commands that look at all keys show a progress bar. Elsewhere they do not."""
    await fill(place.store, 3, user_id=7)
    args = ["check", "--url", place.url, "--prefix", place.prefix]
    code, shown = await asyncio.to_thread(talk, args, "", b"")
    assert code == 0
    assert "checking" in shown
    assert "100%" in shown
    assert "checking" not in (await place.rss("check")).err


# The doctor.


async def test_the_doctor(place: Place) -> None:
    """A healthy server has no error, and each line says what was examined."""
    await place.store.create({"user_id": 7})
    lines = (await place.rss("doctor", "--json")).lines
    assert {line["level"] for line in lines} <= {"ok", "warning"}
    told = {line["what"]: line["sentence"] for line in lines}
    assert "one server" in told["server"]
    assert told["scripts"] == "This user may run every script."
    assert told["reference team"] == "It is complete and strict."
    assert "20 calls took" in told["latency"]
    assert told["transport"] == "The connection does not leave this machine."
    assert all(line["sentence"].endswith(".") for line in lines)


@pytest.mark.parametrize("keyspace", ["cluster"], indirect=True)
async def test_the_doctor_of_a_cluster(place: Place) -> None:
    """Each master is examined."""
    lines = (await place.rss("doctor", "--json")).lines
    assert len([line for line in lines if line["what"].startswith("server of ")]) == 3
    assert all(
        re.search("(Redis|Valkey).* Cluster", line["sentence"]) for line in lines if line["what"].startswith("server")
    )


@pytest.mark.parametrize("keyspace", ["cluster"], indirect=True)
async def test_the_doctor_of_a_master_with_other_rights(place: Place) -> None:
    """The scripts are tried on each master, so a right that a single one lacks is found."""
    await place.store.create()
    rule = [*ACL_RULE.replace("rss", place.prefix).split(), "+cluster|slots", "+hkeys", "+asking"]
    await everywhere(place.admin, "ACL SETUSER", "app", "reset", "on", ">secret", *rule)
    poor = place.admin.get_primaries()[1]
    await place.admin.execute_command("ACL SETUSER", "app", "-hincrby", target_nodes=poor)
    url = place.url.replace("://", "://app:secret@")
    result = await asyncio.to_thread(run, "doctor", "--url", url, "--prefix", place.prefix, "--json")
    await everywhere(place.admin, "ACL DELUSER", "app")
    assert [line["what"] for line in result.lines if line["level"] == "error"] == [
        f"script increment of 127.0.0.1:{poor.port}"
    ], [line for line in result.lines if line["level"] == "error"]


async def test_the_doctor_of_a_bad_server(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old server, a disk that is full, a slow network and a foreign module of the same name are told."""
    info = {"redis_version": "6.0.16", "aof_last_write_status": "err", "maxmemory_policy": "noeviction"}
    monkeypatch.setattr("rss.cli.doctor._info", lambda _: info)
    monkeypatch.setattr("rss.cli.doctor._SLOW", -1)
    owners = {"rss": ["redis-session-sets", "another"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    told = {
        line["what"]: (line["level"], line["sentence"])
        for line in (await place.rss("doctor", "--json", expect=1)).lines
    }
    assert told["server"] == ("error", "Redis 6.0.16 is too old: install Redis 6.2 or newer, or Valkey.")
    assert told["persistence"] == ("error", "Redis could not write to disk, and may refuse writes: see its log.")
    assert told["module rss"] == ("error", "Another distribution has a module rss too: uninstall another.")
    assert told["latency"][0] == "warning"
    assert told["latency"][1].endswith("run the application nearer to Redis.")


@pytest.mark.parametrize(
    ("url", "level", "words"),
    [
        ("rediss://redis.example:6379", "ok", "encrypted by TLS"),
        ("rediss+cluster://redis.example", "ok", "encrypted by TLS"),
        ("redis://user:pw@redis.example", "warning", "use rediss://"),
        ("redis+sentinel://127.0.0.1:1,redis.example:2/main", "warning", "use rediss://"),
        ("redis://[::1]:6379", "ok", "does not leave this machine"),
        ("unix:///run/redis.sock", "ok", "does not leave this machine"),
    ],
)
async def test_the_doctor_of_a_transport(place: Place, url: str, level: str, words: str) -> None:
    """A connection to another machine must be encrypted."""
    line = await anext(doctor.examine(place.store, url, events=False))
    assert (line.what, line.level) == ("transport", level)
    assert words in line.sentence


async def test_the_doctor_of_a_server_that_evicts() -> None:
    """A server that may evict sessions is an error; without a limit of memory, a warning."""
    limited = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    for arguments, code, level in (
        ((*limited, "--appendonly", "yes", "--lazyfree-lazy-expire", "no"), 1, "error"),
        (("--maxmemory-policy", "volatile-ttl", "--lazyfree-lazy-expire", "yes"), 0, "warning"),
    ):
        with own_server(*arguments) as url:
            async with SessionStore.from_url(url) as store:
                await store.create()
            result = await asyncio.to_thread(run, "doctor", "--url", url, "--json")
            assert result.code == code, result
            lines = {line["what"]: (line["level"], line["sentence"]) for line in result.lines}
            assert lines["maxmemory-policy"][0] == level
            assert "set noeviction" in lines["maxmemory-policy"][1]
            assert lines["persistence"][0] == ("ok" if code else "warning")
            assert lines["lazyfree-lazy-expire"][0] == ("warning" if code else "ok")


async def test_the_doctor_of_a_user_without_rights(url: str) -> None:
    """A right that a script lacks is an error which names it, and no key of the trial is left."""
    async with client_of(url) as admin, SessionStore.from_url(url, references=["user_id"]) as store:
        await admin.flushall()
        async with SessionStore.from_url(url, references=["user_id"]):
            await store.create({"user_id": 1})
        before = sorted(await admin.keys("*"))
        user = url.replace("://", "://app:secret@")
        for rules, code, what in (
            ((), 0, set[str]()),
            (("-hincrby",), 1, {"script increment"}),
            (("-smembers", "-rename"), 1, {"script rotate_with_refs", "script delete_by_ref"}),
        ):
            await admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *ACL_RULE.split(), *rules)
            result = await asyncio.to_thread(run, "doctor", "--url", user, "--json")
            lines = {line["what"]: line for line in result.lines}
            assert {line["level"] for line in lines.values() if line["level"] != "ok"} >= {"warning"}
            assert "may not run INFO" in lines["server"]["sentence"]
            assert "no permission for the command scan" in lines["command SCAN"]["sentence"]
            assert result.code == code, result
            assert {name for name in lines if lines[name]["level"] == "error"} == what
            assert ("Not tried, because others failed" in result.out) == ("-rename" in rules)
            assert sorted(await admin.keys("*")) == before
        assert "This user of Redis has no permission" in str(lines)
        for rule, line in (("-hget", "reference user_id"), ("-unlink", "trial")):
            await admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *ACL_RULE.split(), rule)
            result = await asyncio.to_thread(run, "doctor", "--url", user, "--json")
            assert {one["what"]: one["level"] for one in result.lines}.get(line) in ("error", "warning"), result
        await admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *ACL_RULE.split())
        await admin.execute_command("ACL", "SETUSER", "app", "+info", "+scan", "+dbsize")
        result = await asyncio.to_thread(run, "doctor", "--url", user, "--json")
        assert "may not run CONFIG GET" in result.out
        assert (await asyncio.to_thread(run, "stats", "--url", user, "--json")).lines[0]["bytes"] is None
        await admin.execute_command("ACL", "DELUSER", "app")
        await admin.flushall()


@pytest.mark.parametrize("partitions", [None, 4])
async def test_the_doctor_of_a_user_that_may_not_publish(
    url: str, partitions: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A store whose user may not publish events says so in its log, and the doctor says it too."""
    async with client_of(url) as admin:
        await admin.flushall()
        user = url.replace("://", "://app:secret@")
        for rules, warnings in ((["allchannels"], 0), (["resetchannels"], 1)):
            await admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", "~*", "+@all", *rules)
            async with SessionStore.from_url(user, events=True, partitions=partitions) as store:
                await store.create()
            assert caplog.text.count("no events are published") == warnings
            result = await asyncio.to_thread(run, "doctor", "--url", user, "--json")
            assert sum(line["what"] == "events" for line in result.lines) == warnings
        await admin.execute_command("ACL", "DELUSER", "app")
        await admin.flushall()


async def test_the_doctor_of_a_full_server() -> None:
    """A server that refuses writes is an error, and the other lines are there too."""
    with own_server("--maxmemory-policy", "noeviction") as url:
        async with client_of(url) as admin, SessionStore.from_url(url, references=["user_id"]) as store:
            await store.create({"user_id": 7})
            await admin.config_set("maxmemory", "1kb")
            result = await asyncio.to_thread(run, "doctor", "--url", url, "--json")
        assert result.code == 1, result
        levels = {line["what"]: line["level"] for line in result.lines}
        assert levels["script set_with_refs"] == "error"
        assert "Not tried, because others failed: get, get_and_renew" in result.out
        assert "permission" not in result.out
        assert levels["latency"] == "ok"
        assert levels["maxmemory-policy"] == "ok"


# Other servers.


async def test_sentinel(tmp_path: Path) -> None:
    """The URL of Sentinels leads to the master."""
    port = free_port()
    with own_server("--port", str(port), "--bind", "127.0.0.1") as url, sentinel(tmp_path, port) as number:
        async with SessionStore.from_url(url, references=["user_id"]) as store:
            await store.create({"user_id": 7})
        args = "--url", f"redis+sentinel://127.0.0.1:1,127.0.0.1:{number}/main"
        result = await asyncio.to_thread(run, "count", "user_id=7", *args)
        assert (result.code, result.out) == (0, "1\n"), result
        assert "behind Sentinels" in (await asyncio.to_thread(run, "doctor", *args)).out


async def test_copy(url: str, cluster_url: str, keyspace: Keyspace) -> None:
    """`copy` moves all sessions, and their lifetimes stay. It may run again."""
    async with (
        client_of(url) as here,
        SessionStore.from_url(url, references=REFERENCES, prefix=keyspace.prefix) as store,
        client_of(cluster_url) as there,
    ):
        place = Place(url, keyspace.prefix, store, here)
        ids = await fill(store, 250, user_id=7, team="t")
        await place.rss("copy", "--to", cluster_url, expect=2)
        assert (await place.rss("copy", "--to", cluster_url, "--yes", "--json")).lines == [{"moved": 250}]
        assert "0 sessions have moved" in (await place.rss("copy", "--to", cluster_url, "--yes")).out
        async with SessionStore.from_url(
            cluster_url, references=REFERENCES, prefix=keyspace.prefix, partition_by_identity=False
        ) as moved:
            assert sorted(await moved.ids_by("user_id", 7)) == sorted(ids)
            left = await moved.ttl(ids[0])
            assert left
            assert left.days == 27
            assert "Nothing is wrong" in (await Place(cluster_url, place.prefix, moved, there).rss("check")).err
            await moved.delete_by("user_id", 7)
        async with SessionStore.from_url(
            cluster_url, references=["a"], prefix=keyspace.prefix, partition_by_identity=False
        ):
            assert "have other references" in (await place.rss("copy", "--to", cluster_url, "--yes", expect=2)).err
        for key in [key async for key in there.scan_iter(match=f"{keyspace.prefix}:*")]:
            await there.unlink(key)


async def test_the_examples_of_the_guide(url: str, cluster_url: str) -> None:
    """The examples of the guide run in order, each with exit code 0. Each command and exit code is in the guide."""
    lines = re.findall(r"^\$ rss (.*)$", GUIDE, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {*COMMANDS, "watch"}
    async with (
        client_of(url) as admin,
        client_of(cluster_url) as there,
        SessionStore.from_url(url, references=REFERENCES) as store,
    ):
        await admin.flushall()
        async with SessionStore.from_url(url, references=REFERENCES):
            await store.set("Zb5tXk0DqVNnwkRrZbtFaB1cPpJ2mUsL", {"user_id": 7, "ip": "x"})
        for line in [line for line in lines if line != "watch"]:  # It does not end.
            await store.unblock("user_id", 7)
            await fill(store, 2, user_id=7)
            args = line.replace("redis+cluster://127.0.0.1:7000", cluster_url).split()
            result = await asyncio.to_thread(run, *args, "--url", url)
            assert result.code == 0, (line, result)
        for key in [key async for key in there.scan_iter(match="rss:*")]:
            await there.unlink(key)
        await admin.flushall()
    codes = set(re.findall(r"^ +(\d+) {2,}", run("--help").out, re.MULTILINE))
    assert set(re.findall(r"^\| (\d+) \|", GUIDE, re.MULTILINE)) == codes == {"0", "1", "2", "3", "4", "130"}


def test_completion() -> None:
    """The line for the shell prints a script."""
    assert '"$(_RSS_COMPLETE=bash_source rss)"' in GUIDE
    environment = {**os.environ, "_RSS_COMPLETE": "bash_source"}
    done = subprocess.run([sys.executable, "-m", "rss"], env=environment, capture_output=True, text=True, check=True)
    assert "complete " in done.stdout


@pytest.mark.parametrize("name", [*COMMANDS, "watch", ""])
def test_the_help(name: str) -> None:
    """The help of each command has an example and the exit codes."""
    result = run(*([name] if name else []), "--help")
    assert result.code == 0
    assert "Exit codes:" in result.out
    assert f"rss {name or 'ls'}" in result.out.split("Example:")[1]


def test_the_commands() -> None:
    """The help lists all commands, and `rss --version` is the version of the distribution."""
    listed = run("--help").out.split("Commands:")[1]
    assert re.findall(r"^  (\w+) ", listed.split("Example:")[0], re.MULTILINE) == sorted([*COMMANDS, "watch"])
    assert run("--version").out == f"rss, version {importlib.metadata.version('redis-session-sets')}\n"
