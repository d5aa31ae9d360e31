"""`delete_by` ends exactly the sessions that were there, page by page, whatever others do meanwhile."""

import asyncio
from contextlib import suppress
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, given, settings
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from rss import Blocked, SessionEnded, SessionStore
from rss.engine import operations, scripts
from rss.engine.operations import Position
from tests.bugs import found
from tests.keyspace import Keyspace
from tests.steps import between_pages

SESSIONS = 1000  # Twenty pages.


async def _crowd(store: SessionStore, number: int = SESSIONS) -> list[str]:
    ids = []
    for start in range(0, number, 100):
        ids += await asyncio.gather(*(store.create({"user_id": 1, "ip": "x"}) for _ in range(start, start + 100)))
    return ids


async def test_all_end_that_were_there_and_none_that_came(
    store: SessionStore, client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`delete_by` ends all sessions that had the value when it began, and spares those that get the value later."""
    ids = await _crowd(store)
    others = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    await others.set("anonymous", {"ip": "y"})
    came: list[str] = []

    async def come(_: Position) -> None:
        came.append(await others.create({"user_id": 1}))
        anonymous = await others.create({"ip": "y"})
        await others.set(anonymous, {"user_id": 1})
        came.append(anonymous)
        came.append(await others.rotate(await others.create({"user_id": 2}), {"user_id": 1}))
        came.append(await others.rotate(came.pop(0)))  # A session that came later is spared under a new id, too.

    between_pages(store, monkeypatch, come)
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
    """A session that is rotated while `delete_by` runs is ended; a session to keep may be rotated."""
    ids = await _crowd(store)
    others = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    kept = ids[0]

    async def slip(_: Position) -> None:
        nonlocal kept
        for session_id in [i for i in await others.ids_by("user_id", 1) if i != kept][:3]:
            with pytest.raises(SessionEnded, match="stolen"):
                await others.rotate(session_id)
        kept = await others.rotate(kept)

    between_pages(store, monkeypatch, slip)
    ended = await store.delete_by("user_id", 1, keep=[kept], reason="stolen")
    assert 0 < ended < SESSIONS  # The others ended when they were rotated.
    assert await others.ids_by("user_id", 1) == [kept]
    assert len(await others.get(kept)) == 3


@pytest.mark.parametrize("way", ["set", "unset"])
async def test_none_steps_aside(
    store: SessionStore, client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A session that would leave the value while `delete_by` runs is ended; a write of other fields is allowed."""
    await _crowd(store)
    others = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)

    async def step_aside(_: Position) -> None:
        for session_id in (await others.ids_by("user_id", 1))[:3]:
            await others.set(session_id, {"ip": "y", "user_id": 1})
            with pytest.raises(SessionEnded, match="deleted"):
                await (
                    others.set(session_id, {"user_id": 2}) if way == "set" else others.unset(session_id, ["user_id"])
                )

    between_pages(store, monkeypatch, step_aside)
    assert 0 < await store.delete_by("user_id", 1) < SESSIONS
    for value in (1, 2):
        assert await others.ids_by("user_id", value) == []
    assert await others.ids_by("ip", "y") == []


async def test_two_at_once_each_end_what_was_there(
    store: SessionStore, client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two calls at once, each ends the sessions that were there when it began."""
    await _crowd(store)
    second = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    third = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    pages: list[str] = []
    later: list[str] = []

    async def between_pages_of_the_second(_: Position) -> None:
        if not later:
            later.append(await third.create({"user_id": 1}))

    async def between_pages_of_the_first(_: Position) -> None:
        if not pages:
            pages.append(await third.create({"user_id": 1}))
            await second.delete_by("user_id", 1)
            assert await third.get(pages[0]) == {}
            assert await third.ids_by("user_id", 1) == later

    between_pages(store, monkeypatch, between_pages_of_the_first)
    between_pages(second, monkeypatch, between_pages_of_the_second)
    await store.delete_by("user_id", 1)
    assert await third.ids_by("user_id", 1) == later


async def test_an_iteration_sees_all_once(store: SessionStore, client: Redis, keyspace: Keyspace) -> None:
    """`find_by` yields each session that stays, and none twice, while others join and end."""
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
    """The fence of a large `delete_by` expires within five minutes, and does not affect later sessions."""
    await _crowd(store, 300)
    assert await store.delete_by("user_id", 1) == 300
    assert 0 < await keyspace.ttl("_fence:user_id:{1}") <= 300_000
    session_id = await store.create({"user_id": 1})
    session_id = await store.rotate(session_id)
    assert await store.ids_by("user_id", 1) == [session_id]
    assert await store.delete_by("user_id", 1) == 1


async def test_a_fence_stays_small_when_calls_recur(store: SessionStore, keyspace: Keyspace) -> None:
    """A fence has one entry after many calls of `delete_by`, since it remembers only the last one."""
    for _ in range(10):
        await _crowd(store, 100)
        assert await store.delete_by("user_id", 1) == 100
        assert len(await keyspace.client.hgetall(f"{keyspace.prefix}:_fence:user_id:{{1}}")) == 1


async def test_what_one_call_keeps_another_one_ends(
    store: SessionStore, client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `delete_by` that keeps a session does not save that session from a `block` that is still running.

    The session ends, whether it keeps its id or is rotated.
    """
    others = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    for rotates in (False, True):
        ids = set(await _crowd(store, 500))
        left: list[str] = []

        async def between(_: Position, ids: set[str] = ids, left: list[str] = left, *, rotates: bool = rotates) -> None:
            if not left:
                left += [session_id for session_id in ids if await others.ttl(session_id)][-1:]
                assert await others.delete_by("user_id", 1, keep=left, reason="others")
                if rotates:
                    with pytest.raises(SessionEnded, match="blocked"):
                        await others.rotate(left[0])

        with monkeypatch.context() as patch:
            between_pages(store, patch, between)
            assert await store.block("user_id", 1, "1h") >= 1
        assert left
        assert await others.ids_by("user_id", 1) == []
        assert await others.get(left[0]) == {}
        await others.unblock("user_id", 1)


#: The rest of the arguments of `Operations.delete_by`.
CALL: dict[str, Any] = {"reason": "deleted", "block": "open", "tell": False, "keep": (), "required": False}


async def test_a_replica_that_takes_over_before_the_last_step(store: SessionStore, keyspace: Keyspace) -> None:
    """If a replica takes over that lacks what the last pages did, the call begins anew there and ends all sessions."""
    await _crowd(store, 300)
    at = (await store.operations.delete_by("user_id", 1, operations.Position(), token="one", **CALL)).position
    keys = [f"{keyspace.prefix}:{name}" for name in await keyspace.dump()]
    replica = [(key, await keyspace.client.pttl(key), await dumped(keyspace.client, key)) for key in keys]
    while at.cursor != b"end":
        at = (await store.operations.delete_by("user_id", 1, at, token="one", **CALL)).position
    assert await store.ids_by("user_id", 1) == []
    for key, ttl, held in replica:
        await keyspace.client.restore(key, ttl, held, replace=True)
    left = await store.count_by("user_id", 1)
    assert left >= 100
    ended, at = 0, at._replace(channel="the one to the old master")
    while not at.done:
        page = await store.operations.delete_by("user_id", 1, at, token="one", **CALL)
        ended, at = ended + page.ended, page.position
    assert ended == left
    assert await store.ids_by("user_id", 1) == []
    assert await keyspace.client.hgetall(f"{keyspace.prefix}:_fence:user_id:{{1}}") == {"call:one": "done"}


async def dumped(client: Redis, key: str) -> bytes:
    """Return the content of a key as bytes, by a client that decodes replies."""
    connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.send_command("DUMP", key)
        held: Any = await connection.read_response(disable_decoding=True)
    finally:
        await client.connection_pool.release(connection)
    assert isinstance(held, bytes)
    return held


async def test_a_fence_stays_small_after_a_caller_died(store: SessionStore, keyspace: Keyspace) -> None:
    """The marks of a call that never goes on are removed when another call begins and there are many marks."""
    fence = f"{keyspace.prefix}:_fence:user_id:{{1}}"
    await _crowd(store, 300)
    page = await store.operations.delete_by(
        "user_id", 1, operations.Position(), token="died", **{**CALL, "block": "3600000"}
    )
    assert page.position != operations.Position()
    assert await keyspace.client.hget(fence, "open") == " 1"
    await keyspace.client.hset(fence, mapping={f"id:{n}": 1 for n in range(20_000)})
    await store.delete_by("user_id", 1)
    held = await keyspace.client.hgetall(fence)
    assert {"until", "why"} < held.keys()
    assert [value for field, value in held.items() if str(field).startswith("call:")] == ["done"]
    assert len(held) == 3
    assert await store.ids_by("user_id", 1) == []
    assert await store.blocked("user_id", 1) is not None
    assert 0 < await keyspace.ttl("_fence:user_id:{1}") <= 3_600_000


async def test_keep_follows_grace(store: SessionStore) -> None:
    """`keep` accepts the old id of a session that was rotated with grace, also over many pages."""
    for number in (3, 300):
        ids = await asyncio.gather(*(store.create({"user_id": 1}) for _ in range(number)))
        kept = await store.rotate(ids[0], grace="1m")
        assert await store.delete_by("user_id", 1, keep=[ids[0]]) == number - 1
        assert await store.ids_by("user_id", 1) == [kept]
        await store.delete(kept)


async def test_nothing_joins_a_blocked_value_while_it_runs(
    store: SessionStore, client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No session joins a blocked value during or after `delete_by`; kept sessions can be written and rotated."""
    ids = await _crowd(store, 300)
    others = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    await others.set("anonymous", {"ip": "y"})
    kept = ids[0]

    async def come(_: Position) -> None:
        nonlocal kept
        for join in (
            others.create({"user_id": 1}),
            others.set("anonymous", {"user_id": [2, 1]}),
            others.rotate("anonymous", {"user_id": 1}),
        ):
            with pytest.raises(Blocked, match="password") as raised:
                await join
            assert raised.value.field == "user_id"
        await others.set(kept, {"user_id": 1, "theme": "dark"})
        kept = await others.rotate(kept, {"user_id": 1})
        await others.create({"user_id": 2})

    between_pages(store, monkeypatch, come)
    assert await store.delete_by("user_id", 1, keep=[kept], reason="password", block="1h") == 299
    await come(Position())
    assert await others.ids_by("user_id", 1) == [kept]
    assert await others.unblock("user_id", 1)
    await others.set("anonymous", {"user_id": 1})
    assert sorted(await others.ids_by("user_id", 1)) == sorted(["anonymous", kept])


async def test_a_block_that_is_lifted_while_it_runs(
    store: SessionStore, client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions may join at once if the block is lifted while `delete_by` runs, and later pages spare them."""
    await _crowd(store, 300)
    others = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    came: list[str] = []

    async def lift(_: Position) -> None:
        await others.unblock("user_id", 1)
        came.append(await others.create({"user_id": 1}))

    between_pages(store, monkeypatch, lift)
    await store.delete_by("user_id", 1, block="1h")
    assert await others.blocked("user_id", 1) is None
    assert sorted(await others.ids_by("user_id", 1)) == sorted(came)


class Others:
    """Makes other calls while user 1 is signed out, and tracks which sessions must end and which must stay."""

    def __init__(self, store: SessionStore, keyspace: Keyspace, ids: list[str], kept: set[str]) -> None:
        """Take all sessions of the user, and those that are kept."""
        self.store = store
        self.keyspace = keyspace
        self.second: SessionStore | None = None
        self.ids = list(ids)
        self.safe = set(kept)
        self.doomed = set(ids) - kept

    def came(self, session_id: str) -> None:
        """Note a session that must stay."""
        self.ids.append(session_id)
        self.safe.add(session_id)

    def gone(self, session_id: str) -> None:
        """Note that a session is gone."""
        self.safe.discard(session_id)
        self.doomed.discard(session_id)

    async def step(self, how: str, n: int) -> None:
        """Make one call. A session that must end raises SessionEnded when it would leave the set."""
        session_id = self.ids[-1 - n % len(self.ids)]  # Smaller numbers choose later sessions.
        if how == "join":
            self.came(await self.store.create({"user_id": 1, "ip": "x"}))
        elif how == "log in":
            self.came(await self.store.rotate(await self.store.create({"ip": "x"}), {"user_id": 1}))
        elif how == "delete":
            await self.store.delete(session_id)
            self.gone(session_id)
        elif how == "sign out" and self.second:
            # A second call, with other calls between its pages, must end all sessions that have the value now.
            second, self.second = self.second, None
            having = {i for i in self.safe if (await self.store.get(i)).get("user_id") == 1}
            self.safe -= having
            self.doomed |= having
            await second.delete_by("user_id", 1)
        elif how == "expire":
            await self.keyspace.expire(f"{{{session_id}}}")
            self.gone(session_id)
        elif session_id in self.doomed:
            with pytest.raises(SessionEnded, match="deleted"):
                await self.move(how, session_id)
        elif session_id in self.safe:
            await self.move(how, session_id)

    async def move(self, how: str, session_id: str) -> None:
        """Take a session out of the set, perhaps only for a moment."""
        if how == "rotate":
            self.came(await self.store.rotate(session_id))
            self.gone(session_id)
        elif how == "unset":
            await self.store.unset(session_id, ["user_id"])
        else:
            await self.store.set(session_id, {"user_id": 2})
            if how == "return":
                await self.store.set(session_id, {"user_id": 1})


STEPS = st.tuples(
    st.sampled_from(["join", "log in", "delete", "expire", "rotate", "unset", "leave", "return", "sign out"]),
    st.integers(0, 2) | st.integers(0, 60),
)


def _interleave(url: str, steps: list[tuple[str, int]], sessions: int, keep: set[int], at_once: int) -> None:
    """End all sessions of a user, let others do *at_once* steps after each page, and check what is left."""

    async def run() -> None:
        async with (
            Redis.from_url(url, decode_responses=True) as admin,
            SessionStore.from_url(url, references=["user_id", "ip"]) as store,
            SessionStore.from_url(url, references=["user_id", "ip"]) as second,
            SessionStore.from_url(url, references=["user_id", "ip"]) as another,
        ):
            await admin.flushall()
            with suppress(ResponseError):  # Small sets must have pages, too. Before Redis 7.2 they always do.
                await admin.config_set("set-max-listpack-entries", 0)
            ids = await asyncio.gather(*(store.create({"user_id": 1, "ip": "x"}) for _ in range(sessions)))
            kept = {session_id for n, session_id in enumerate(ids) if n in keep}
            others, left = Others(another, Keyspace(admin, "rss"), ids, kept), list(steps)

            async def between(_: Position) -> None:
                for step in [left.pop() for _ in range(min(at_once, len(left)))]:
                    await others.step(*step)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(operations, "_PAGE", "1")
                between_pages(store, patch, between)
                between_pages(second, patch, between)
                others.second = second
                await store.delete_by("user_id", 1, keep=kept)

            assert {session_id for session_id in others.ids if await another.get(session_id)} == others.safe
            users = {session_id: (await another.get(session_id)).get("user_id") for session_id in others.safe}
            assert sorted(await another.ids_by("user_id", 1)) == sorted(i for i, user in users.items() if user == 1)
            fence = await admin.hgetall("rss:_fence:user_id:{1}")
            assert [*fence.values()] == ["done"]
            await others.keyspace.dump()  # Every key has a TTL.

    asyncio.run(run())


RANDOMLY: dict[str, st.SearchStrategy[Any]] = {
    "steps": st.lists(STEPS, max_size=40),
    "sessions": st.integers(2, 60),
    "keep": st.sets(st.integers(0, 50), max_size=20),
    "at_once": st.integers(1, 10),
}


def test_whatever_others_do_between_pages(url: str) -> None:
    """`delete_by` ends exactly the sessions that were there and are not kept, whatever others do meanwhile."""
    given(**RANDOMLY)(_interleave)(url=url)


BUGS = {
    "a session that joins is not marked": ("if round and (i <= joined or", "if round and (false or"),
    "a session that is rotated loses its mark": ("or plan.stays and plan.stays[fence]) then", ") then"),
    "a session that leaves lives on": ("if not spares(mark, tonumber(number))", "if false"),
    "a session that came meanwhile ends": ("(mark and spares(mark, round))", "false"),
    "a session that is kept is not marked": ('spread("HSET", fence, marks, 1, #marks)', ""),
    "the fence forgets nothing": ('redis.call("UNLINK", fence)', ""),
}


@pytest.mark.timeout(300)  # Some bugs are found after several hundred examples.
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_fences_is_found(url: str, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """A bug planted in the scripts of fences is found by random steps."""
    (right, wrong), read = BUGS[bug], scripts.read
    names = [*(operation.script for operation in operations.ALL), *(f"_{part}" for part in scripts.PARTS)]
    assert any(right in read(name) for name in names)
    monkeypatch.setattr(scripts, "read", lambda name: read(name).replace(right, wrong))
    how = settings(
        max_examples=1000,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        derandomize=True,
        report_multiple_bugs=False,
    )
    with found():
        how(given(**RANDOMLY)(_interleave))(url=url)
