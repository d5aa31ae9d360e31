"""The watch over secrets in the tests of the web layer notices a leak, and a cluster in trouble leaks nothing."""

import asyncio
import logging
import re
import secrets
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from rss import Reference, Session, SessionError, Sessions, SessionStore
from rss.keys import Partitioned
from rss.testing import Cluster, ClusterServer
from tests.keyspace import Keyspace
from tests.secrecy import Secrecy
from tests.servers import everywhere, restart
from tests.test_session import signed_in

LOGGER = logging.getLogger("somebody's")
VALUE = "a-value-that-is-nobody's-business"


@pytest.mark.parametrize(
    ("client", "keyspace", "server"),
    [({}, None, "redis_url"), ("cluster", "cluster", "cluster_url")],
    ids=["redis_url", "a cluster"],
    indirect=["client", "keyspace"],
)
async def test_a_leak_is_seen(
    store: SessionStore, keyspace: Keyspace, server: str, request: pytest.FixtureRequest
) -> None:
    """A token in a command is noticed on each master, and so are tokens, ids and CSRF secrets in the log."""
    secrecy = Secrecy()
    sessions = Sessions(store)
    with secrecy.learn(), secrecy.watch(request.getfixturevalue(server)), secrecy.listen():
        token = await signed_in(sessions)
        session = sessions.create_session(f"session-id={token}")
        await session.create_csrf_token()
        await everywhere(keyspace.client, "ECHO", "nothing")
        assert secrecy.tokens == {token}
        assert secrecy.leaks() == []
        for secret in (token, session.id, Session._csrf_secret(session), Session._csrf_secret(session).hex()):
            secrecy.logged.clear()
            LOGGER.debug("%s", secret)
            assert secrecy.leaks() == ["the log"]
        secrecy.logged.clear()
        LOGGER.debug("it failed", exc_info=ValueError(token))
        assert secrecy.leaks() == ["the log"]
        secrecy.logged.clear()
        masters = await everywhere(keyspace.client, "ECHO", f"x:{token}")
    assert secrecy.leaks() == ["a command"]
    assert len([command for command in secrecy.commands if token.encode() in command]) == len(masters)
    assert not logging.getLogger().isEnabledFor(logging.DEBUG)
    with pytest.raises(AssertionError):
        assert secrecy.leaks() == []


# ---------------------------------------------------------------------- a cluster in trouble


def both(servers: Cluster, slot: int) -> tuple[ClusterServer, ClusterServer]:
    """Return the master of a slot and another one."""
    owner = servers.owner(slot)
    return owner, next(server for server in servers.servers if server is not owner)


# A trouble begins at the first step of an iterator, and ends at the second one.


def moved(servers: Cluster, slot: int) -> Iterator[None]:
    """Let two masters each say that the other has a slot, which must be empty."""
    owner, other = both(servers, slot)
    owner("CLUSTER", "SETSLOT", slot, "NODE", other.id)
    yield
    owner("CLUSTER", "SETSLOT", slot, "NODE", owner.id)


def asking(servers: Cluster, slot: int) -> Iterator[None]:
    """Let an empty slot move to a master that knows nothing of it."""
    owner, other = both(servers, slot)
    owner("CLUSTER", "SETSLOT", slot, "MIGRATING", other.id)
    yield
    owner("CLUSTER", "SETSLOT", slot, "STABLE")


def half_moved(servers: Cluster, slot: int) -> Iterator[None]:
    """Let half of the keys of a slot be on another master."""
    other = both(servers, slot)[1]
    servers.begin_migration(slot, other)
    assert servers.move_keys(slot, other, 3)
    yield
    servers.end_migration(slot, other)


def unserved(servers: Cluster, slot: int) -> Iterator[None]:
    """Let no master have a slot, which must be empty."""
    owner = servers.owner(slot)
    owner("CLUSTER", "DELSLOTS", slot)
    yield
    owner("CLUSTER", "ADDSLOTS", slot)


def still(servers: Cluster, slot: int) -> Iterator[None]:
    """Let the master of a slot stand still."""
    owner = servers.owner(slot)
    owner.signal(signal.SIGSTOP)
    yield
    owner.signal(signal.SIGCONT)


def dead(servers: Cluster, slot: int) -> Iterator[None]:
    """Let the master of a slot be dead."""
    owner = servers.owner(slot)
    owner.kill()
    yield
    restart(servers, owner)


def full(servers: Cluster, slot: int) -> Iterator[None]:
    """Let the master of a slot have no memory left."""
    owner = servers.owner(slot)
    owner("CONFIG", "SET", "maxmemory", 1)
    yield
    owner("CONFIG", "SET", "maxmemory", 0)


def spoilt(servers: Cluster, slot: int) -> Iterator[None]:
    """Let the keys of a slot hold another type of data."""
    owner = servers.owner(slot)
    for key in owner("CLUSTER", "GETKEYSINSLOT", slot, 100):
        owner("SET", key, VALUE)
    yield


# The trouble, whether the slot has keys, and what the errors tell.
PARTLY = "1 of 16 partitions did not answer"
TROUBLES: dict[str, tuple[Callable[[Cluster, int], Iterator[None]], bool, list[str]]] = {
    "MOVED": (moved, False, ["deadline: MOVED", PARTLY]),
    "ASK": (asking, False, ["deadline: (ASK|MOVED)", PARTLY]),
    "TRYAGAIN": (half_moved, True, ["deadline: (TRYAGAIN|RSSLATER)", PARTLY]),
    "CLUSTERDOWN": (unserved, False, ["deadline: CLUSTERDOWN", PARTLY]),
    "a master that stands still": (still, True, ["deadline: it takes too long", "partitions did not answer"]),
    "a master that is dead": (dead, True, ["deadline: ConnectionError", "partitions did not answer"]),
    "a master that is full": (full, True, ["OOM"]),
    "keys of another type": (spoilt, True, ["another type of data"]),
}


@contextmanager
def during(trouble: Iterator[None]) -> Iterator[None]:
    """Let the body have trouble."""
    next(trouble)
    try:
        yield
    finally:
        next(trouble, None)


async def errors_of(*calls: Awaitable[Any]) -> list[str]:
    """Make calls, and return the texts of their errors. Log everything about them that an application may log."""
    errors = []
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, SessionError)
            LOGGER.error("%r %r", outcome, vars(outcome), exc_info=outcome)
            errors.append(str(outcome))
    return errors


def new_store(servers: Cluster, **options: Any) -> SessionStore:
    """Return a store on the cluster."""
    usual: dict[str, Any] = {"references": ["user_id"], "timeout": 0.5, "partitions": 16}
    return SessionStore.from_url(servers.url, **(usual | options))


@pytest.mark.parametrize("name", TROUBLES)
async def test_a_cluster_in_trouble(servers: Cluster, name: str) -> None:
    """No token, id or value is in an error, a log or a repr when a cluster has trouble. No master ever gets a token."""
    trouble, filled, told = TROUBLES[name]
    secrecy, values = Secrecy(), {"user_id": VALUE, "name": VALUE}
    secrecy.others.add(VALUE)
    with secrecy.learn(), secrecy.listen(), secrecy.watch(servers.url):
        async with new_store(servers, prefix=f"test-{secrets.token_hex(8)}") as store:
            sessions, layout = Sessions(store), cast("Partitioned", store.operations.layout)
            token = await signed_in(sessions, values)
            session_id, cookie = sessions.id_of(token), f"session-id={token}"
            partition = layout.place(session_id)[1]
            more = [layout.mint(partition) for _ in range(4)]
            secrecy.others.update(more)
            for other in more:
                await store.set(other, values)
            if not filled:
                for server in servers.servers:
                    server("FLUSHALL")
            session, *visits = [sessions.create_session(cookie) for _ in range(6)]
            with during(trouble(servers, layout.slots[partition])):
                errors = await errors_of(
                    session.get(),
                    visits[0].set(values),
                    visits[1].rotate({"user_id": VALUE}),
                    visits[2].delete(),
                    visits[3].create_csrf_token(),
                    visits[4].unset(["name"]),
                    *(store.set(other, {"name": VALUE, "user_id": VALUE * 2}) for other in more),
                    store.set(session_id, values, expect=values),
                    store.increment(more[0], "n"),
                    store.pop(more[1], ["name"]),
                    store.rotate(more[2], values),
                    store.touch(more[3], "60 days"),
                    store.ids_by("user_id", VALUE),
                    store.delete_by("user_id", VALUE, keep=more[:1]),
                    store.block("user_id", VALUE, "1h"),
                )
                LOGGER.error("%r %r %r %r", store, sessions, session, store.operations.engine)
    assert all(re.search(words, "\n".join(errors)) for words in told), errors
    assert token in secrecy.tokens
    assert secrecy.leaks() == []
    assert VALUE.encode() in b"".join(secrecy.commands)


async def test_a_store_that_does_not_fit(servers: Cluster) -> None:
    """The error of a store with other partitions, or with another identity, tells no id and no value."""
    secrecy, prefix = Secrecy(), f"test-{secrets.token_hex(8)}"
    secrecy.others.add(VALUE)
    async with new_store(servers, prefix=prefix) as store:
        secrecy.others.add(await store.create({"user_id": VALUE}))
    with secrecy.listen():
        for options in ({"partitions": 32}, {"references": {"user_id": Reference(identity=True)}}):
            other = new_store(servers, prefix=prefix, **options)
            errors = await errors_of(
                other.get(VALUE), other.create({"user_id": VALUE}), other.delete_by("user_id", VALUE)
            )
            assert len(errors) == 3
            assert all("the sessions with this prefix" in error for error in errors)
            await other.aclose()
    assert secrecy.logged
    assert secrecy.leaks() == []
