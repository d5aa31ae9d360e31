"""Ending all sessions of a value: exact, page by page, whatever others do meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from rss import SessionEnded, SessionStore
from tests.keyspace import Keyspace

SESSIONS = 1000  # Twenty pages.


async def _crowd(store: SessionStore, number: int = SESSIONS) -> list[str]:
    ids = []
    for start in range(0, number, 100):
        ids += await asyncio.gather(*(store.create({"user_id": 1, "ip": "x"}) for _ in range(start, start + 100)))
    return ids


def _between_pages(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch, others: Callable[[], Awaitable[object]]
) -> None:
    """Let others do something after each page of this store."""
    run = store._calls.run

    async def run_and_let_others(name: str, *args: Any, **options: Any) -> Any:
        reply = await run(name, *args, **options)
        if name == "delete_by_ref":
            await others()
        return reply

    monkeypatch.setattr(store._calls, "run", run_and_let_others)


async def test_all_end_that_were_there_and_none_that_came(
    store: SessionStore, client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions that get the value while it runs stay: new ones, anonymous ones that sign in, ones that changed user."""
    ids = await _crowd(store)
    others = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    await others.set("anonymous", {"ip": "y"})
    came: list[str] = []

    async def come() -> None:
        came.append(await others.create({"user_id": 1}))
        anonymous = await others.create({"ip": "y"})
        await others.set(anonymous, {"user_id": 1})
        came.append(anonymous)
        came.append(await others.rotate(await others.create({"user_id": 2}), {"user_id": 1}))
        came.append(await others.rotate(came.pop(0)))  # One that came stays so under a new id.

    _between_pages(store, monkeypatch, come)
    assert await store.delete_by("user_id", 1, keep=ids[:2], reason="password") == SESSIONS - 2
    assert sorted(await others.ids_by("user_id", 1)) == sorted([*ids[:2], *came])
    assert len(came) >= 3 * SESSIONS // 200
    for session_id in ids[2:]:
        assert await others.ended(session_id) == "password"
    dump = await keyspace.dump()
    assert dump["ip:{x}"] == set(ids[:2])


async def test_none_slips_away_under_a_new_id(
    store: SessionStore, client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that is rotated while it runs ends, one to keep stays."""
    ids = await _crowd(store)
    others = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    kept = ids[0]

    async def slip() -> None:
        nonlocal kept
        for session_id in [i for i in await others.ids_by("user_id", 1) if i != kept][:3]:
            with pytest.raises(SessionEnded, match="stolen"):
                await others.rotate(session_id)
        kept = await others.rotate(kept)

    _between_pages(store, monkeypatch, slip)
    ended = await store.delete_by("user_id", 1, keep=[kept], reason="stolen")
    assert 0 < ended < SESSIONS  # The others ended when they were rotated.
    assert await others.ids_by("user_id", 1) == [kept]
    assert len(await others.get(kept)) == 3


@pytest.mark.parametrize("way", ["set", "unset"])
async def test_none_steps_aside(
    store: SessionStore, client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A session that would get another value while it runs, and perhaps come back, ends; another field is no matter."""
    await _crowd(store)
    others = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)

    async def step_aside() -> None:
        for session_id in (await others.ids_by("user_id", 1))[:3]:
            await others.set(session_id, {"ip": "y", "user_id": 1})
            with pytest.raises(SessionEnded, match="deleted"):
                await (
                    others.set(session_id, {"user_id": 2}) if way == "set" else others.unset(session_id, ["user_id"])
                )

    _between_pages(store, monkeypatch, step_aside)
    assert 0 < await store.delete_by("user_id", 1) < SESSIONS
    for value in (1, 2):
        assert await others.ids_by("user_id", value) == []
    assert await others.ids_by("ip", "y") == []


async def test_two_at_once_each_end_what_was_there(
    store: SessionStore, client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that came after the first began, but before the second, is ended by the second."""
    await _crowd(store)
    second = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    third = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    pages: list[str] = []
    later: list[str] = []

    async def between_pages_of_the_second() -> None:
        if not later:
            later.append(await third.create({"user_id": 1}))

    async def between_pages_of_the_first() -> None:
        if not pages:
            pages.append(await third.create({"user_id": 1}))
            await second.delete_by("user_id", 1)
            assert await third.get(pages[0]) == {}
            assert await third.ids_by("user_id", 1) == later

    _between_pages(store, monkeypatch, between_pages_of_the_first)
    _between_pages(second, monkeypatch, between_pages_of_the_second)
    await store.delete_by("user_id", 1)
    assert await third.ids_by("user_id", 1) == later


async def test_an_iteration_sees_all_once(store: SessionStore, client: Redis, keyspace: Keyspace) -> None:
    """Whatever joins and ends meanwhile, each session that stays is seen, and none twice."""
    ids = await _crowd(store)
    others = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    stay, go = ids[: SESSIONS // 2], ids[SESSIONS // 2 :]
    seen: list[str] = []
    async for session in store.find_by("user_id", 1, ["ip"]):
        assert session.get("ip", "x") == "x"
        seen.append(session["id"])
        if len(seen) % 100 == 0:
            await asyncio.gather(
                *(others.delete(session_id) for session_id in go[:50]),
                *(others.create({"user_id": 1}) for _ in range(100)),
            )
            del go[:50]
    assert set(stay) <= set(seen)
    assert len(seen) == len(set(seen))


async def test_what_is_left_behind_passes(store: SessionStore, keyspace: Keyspace) -> None:
    """After a large one a note of it stays for five minutes, and does no harm to sessions that come then."""
    await _crowd(store, 300)
    assert await store.delete_by("user_id", 1) == 300
    assert 0 < await keyspace.ttl("_fence:user_id:{1}") <= 300_000
    session_id = await store.create({"user_id": 1})
    session_id = await store.rotate(session_id)
    assert await store.ids_by("user_id", 1) == [session_id]
    assert await store.delete_by("user_id", 1) == 1
