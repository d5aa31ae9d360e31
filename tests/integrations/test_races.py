"""Requests that race a login, in each framework: at the end the browser has the login's cookie."""

import asyncio
import os
from typing import Final

import aiohttp
import pytest
from redis.asyncio import Redis

from rss import Reference, Sessions, SessionStore
from tests.integrations.serving import cookie_of
from tests.integrations.sites import SITES, Site
from tests.keyspace import Keyspace
from tests.test_session import id_of

#: How often each race is run: `ROUNDS=500 make test ARGS=tests/integrations/test_races.py` runs it longer.
ROUNDS: Final = int(os.environ.get("ROUNDS", "10"))

# The allowed statuses: 409 if the request came with the cookie from before the login.
RACERS: Final = {
    "reader": ("read", {200}),
    "writer": ("write", {200, 409}),
    "counter": ("read-write", {200, 409}),
    "another login": ("sign-in", {200}),
    "logout": ("sign-out", {200, 409}),
    "flash": ("pop", {200}),  # It pops the only item of a dict.
}
# The racers that end the session if they come before the login.
ENDING: Final = ("logout", "flash")


@pytest.fixture(name="sessions")
def _sessions(client: Redis, keyspace: Keyspace) -> Sessions:
    """Sessions with an identity, so that an item of a dict session can sign in."""
    return Sessions(SessionStore(client, references={"user_id": Reference(identity=True)}, prefix=keyspace.prefix))


async def visit(visitor: aiohttp.ClientSession, site: Site, action: str) -> tuple[int, str | None]:
    """Make a request, and return its status and the token that its response sets."""
    async with visitor.get(f"{site.root}/{action}") as response:
        await response.read()
        cookie = response.cookies.get("session-id")
        return response.status, cookie.value if cookie else None


@pytest.mark.parametrize(
    ("racer", "site"),
    [(racer, site) for racer in RACERS for site in SITES if racer != "flash" or site.keeps_a_dict],
    ids=str,
)
async def test_a_race_with_a_login(visitor: aiohttp.ClientSession, site: Site, sessions: Sessions, racer: str) -> None:
    """A request with the old cookie neither undoes the login, nor makes a session of its own."""
    action, statuses = RACERS[racer]
    store = sessions.store
    for turn in range(ROUNDS):
        visitor.cookie_jar.clear()
        await visit(visitor, site, "write")
        before = id_of(cookie_of(visitor))
        first, second = ("sign-in", action) if turn % 2 else (action, "sign-in")
        answers = await asyncio.gather(visit(visitor, site, first), visit(visitor, site, second))
        (status, login), (answer, cookie) = answers if turn % 2 else answers[::-1]
        assert status == 200
        assert answer in statuses
        assert await store.get(before) == {}
        token = cookie_of(visitor)
        if racer in ENDING and not token:  # The response of the racer came last.
            assert cookie == ""
            assert await store.ended(before) != "rotated"
        else:
            assert (await store.get(id_of(token)))["user_id"] == 7
        if racer != "another login":
            assert await store.ids_by("user_id", 7) == [id_of(str(login))]
            assert not cookie
        assert await store.delete_by("user_id", 7) in ({1, 2} if racer == "another login" else {1})


async def test_a_race_of_a_login_with_the_end_of_all_sessions(
    visitor: aiohttp.ClientSession, site: Site, sessions: Sessions
) -> None:
    """A login that races `delete_by` keeps its cookie, and each earlier session has ended."""
    store = sessions.store
    for _ in range(ROUNDS):
        visitor.cookie_jar.clear()
        await visit(visitor, site, "write")
        other = await store.create({"user_id": 7})
        (status, token), _ = await asyncio.gather(visit(visitor, site, "sign-in"), store.delete_by("user_id", 7))
        assert status == 200
        assert token == cookie_of(visitor)
        assert await store.get(other) == {}
        assert set(await store.ids_by("user_id", 7)) <= {id_of(str(token))}
        await store.delete_by("user_id", 7)
