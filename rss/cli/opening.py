"""Open the store of a prefix as its applications do, and change nothing by opening it."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any, Final

import click
import redis.exceptions
from redis.asyncio import Redis

from rss.clients import Client, client_of, close
from rss.codec import JSONCodec, TextCodec
from rss.engine.failures import failure_of
from rss.engine.meta import FORMAT, Held, held_by
from rss.store import SessionStore

# Seconds for one operation.
_TIMEOUT: Final = 10


class Refusal(click.ClickException):
    """Raised if the command was given something that it cannot do. The message is one sentence."""

    exit_code = 2


#: A store of the command.
Store = SessionStore[dict[str, Any]]


def client_for(url: str) -> Client:
    """Return a client. Raises `Refusal` if the URL is invalid. The message does not hold the URL, which has secrets."""
    try:
        client = client_of(url)
        if isinstance(client, Redis):
            # Only this notices bad options in the URL.
            client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, redis.exceptions.RedisError, redis.exceptions.RedisClusterException):
        raise Refusal(
            "the URL must be redis://host:port/db, rediss://..., unix://path, redis+cluster://host:port or "
            "redis+sentinel://host:port,host:port/service, and its options those of redis-py"
        ) from None
    return client


async def read_meta(client: Client, prefix: str) -> Held | None:
    """Return what the meta key of a prefix says. Return None if no store has used the prefix.

    Raises `SessionError` if Redis does not answer, or refuses to.
    """
    try:
        store = SessionStore(client, prefix=prefix, timeout=_TIMEOUT)
    except ValueError as error:
        raise Refusal(str(error)) from None
    engine = store.operations.engine
    engine.description = None
    try:
        await engine.connect()
        async with asyncio.timeout(store.operations.timeout):
            await engine.servers.ready()
            held = await held_by(store.operations.layout, engine.servers.master_of)
    except ValueError:
        raise Refusal(f"the key {prefix}:_meta is damaged: another program has written to it") from None
    except (OSError, redis.exceptions.RedisError) as error:
        raise failure_of(error) from error
    finally:
        await store.aclose()
    if held and held.format != FORMAT:
        raise Refusal(f"the sessions with the prefix {prefix!r} have a format that this version does not know")
    if held and not held.complete:
        raise Refusal(
            f"the key {prefix}:_meta lacks options or lifetimes, because an older version of redis-session-sets wrote "
            "it: start the application with this version first"
        )
    return held


def store_of(client: Client, prefix: str, held: Held, without: Collection[str] = (), *, events: bool = True) -> Store:
    """Return a store that reads what those with this meta key wrote. It is not compared with them, so it marks nothing.

    *without*: references to leave out. *events*: whether to publish events if those stores do.
    """
    references = {name: kind for name, kind in held.references.items() if name not in without}
    if sum(kind.identity for kind in references.values()) > 1:  # The identity has changed, and the old one is known.
        references = {name: dataclasses.replace(kind, identity=False) for name, kind in references.items()}
    store: Store = SessionStore(
        client,
        references=references,
        max_age=held.max_age / 1000,
        max_lifetime=held.max_lifetime / 1000 or None,
        prefix=prefix,
        partitions=held.partitions,
        partition_by_identity=held.identity is not None,
        codec=JSONCodec() if held.json else TextCodec(),
        timeout=_TIMEOUT,
        events=events and held.events,
    )
    store.operations.engine.description = None
    return store


@asynccontextmanager
async def opened(
    url: str, prefix: str, without: Collection[str] = (), *, events: bool = True
) -> AsyncIterator[tuple[Store, Client, Held]]:
    """Open the store of a prefix, and yield it, a client and its meta key. See `store_of` for the other arguments.

    Raises `Refusal` if no store used the prefix.
    """
    client = client_for(url)
    try:
        held = await read_meta(client, prefix)
        if held is None:
            raise Refusal(f"no store has used the prefix {prefix!r} in this Redis: see --prefix and --url")
        if unknown := set(without) - set(held.references):
            raise Refusal(f"the prefix has no reference {min(unknown)!r}")
        async with store_of(client, prefix, held, without, events=events) as store:
            yield store, client, held
    finally:
        await close(client)
