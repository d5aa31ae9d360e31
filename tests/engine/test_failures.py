"""An error of Redis becomes the right error for the right caller."""

import pytest
import redis.exceptions
from redis.asyncio import Redis

from rss import LimitExceeded, Reference, SessionEnded, SessionStore, StoreUnavailable
from rss.engine.failures import code_of, error_for
from tests.engine.callers import outcomes


@pytest.mark.parametrize("reason", ["unauthenticated", "-BUSY", "-OOM", "READONLY", "NOSCRIPT"])
async def test_a_reason_is_not_taken_for_an_error_of_the_server(url: str, admin: Redis, reason: str) -> None:
    """A reason that looks like an error code of Redis still raises SessionEnded with that reason."""
    del admin
    async with SessionStore.from_url(url) as store:
        session_id = await store.create({"a": 1})
        await store.delete(session_id, reason=reason)
        with pytest.raises(SessionEnded) as told:
            await store.set(session_id, {"a": 2})
        assert told.value.reason == reason


async def test_a_field_is_not_taken_for_an_error_of_the_server(url: str, admin: Redis) -> None:
    """A reference whose name looks like an error code of Redis still raises LimitExceeded."""
    del admin
    references = {"unauthenticated": Reference(limit=1, on_limit="refuse")}
    async with SessionStore.from_url(url, references=references) as store:
        await store.create({"unauthenticated": 1})
        with pytest.raises(LimitExceeded, match="unauthenticated"):
            await store.create({"unauthenticated": 1})


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", "OOM"),
        ("ERR Error running script (call to f_1): @user_script:1: -READONLY You can't write", "READONLY"),
        ("NOAUTH Authentication required.", "AUTH"),
        ("ERR Protocol error: unauthenticated multibulk length", "AUTH"),
        ("ERR max number of clients reached", "MAXCLIENTS"),
        ("RSSENDED unauthenticated", ""),
        ("ERR RSSENDED -OOM", ""),
    ],
)
def test_the_code_of_an_error(text: str, code: str) -> None:
    """`code_of` finds the code where the versions of Redis put it, and not in our own errors."""
    assert code_of(redis.exceptions.ResponseError(text)) == code


def test_an_error_that_redis_py_has_a_class_for() -> None:
    """`code_of` finds the code if redis-py has a class for the error, and `error_for` if the error is wrapped."""
    assert code_of(redis.exceptions.OutOfMemoryError("no text")) == "OOM"
    assert code_of(redis.exceptions.ClusterDownError("The cluster is down")) == "CLUSTERDOWN"
    assert code_of(redis.exceptions.MasterDownError("no text")) == "MASTERDOWN"
    assert code_of(redis.exceptions.MovedError("1 127.0.0.1:7000")) == "MOVED"
    assert code_of(redis.exceptions.AskError("1 127.0.0.1:7000")) == "ASK"
    wrapped = redis.exceptions.ConnectionError("no text")
    wrapped.__cause__ = redis.exceptions.AuthenticationError("no text")
    assert isinstance(error_for(wrapped), StoreUnavailable)


async def test_a_hook_of_the_user_that_fails_is_retried(url: str, admin: Redis) -> None:
    """A failing `redis_connect_func` is retried until the deadline, and then the error names its exception."""
    del admin
    attempts = 0

    async def greet(connection: object) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= failures:
            raise ValueError
        await connection.on_connect()  # type: ignore[attr-defined]

    for failures in (2, 10**9):
        attempts = 0
        client = Redis.from_url(url, redis_connect_func=greet)
        store = SessionStore(client, timeout=1)
        if failures == 2:
            assert await outcomes(store.touch(str(n)) for n in range(5)) == [False] * 5
        else:
            with pytest.raises(StoreUnavailable, match="within the deadline: ValueError"):
                await store.touch("a")
        await store.aclose()
        await client.aclose()
