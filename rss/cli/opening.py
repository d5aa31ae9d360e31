"""Open the store of a prefix as its applications do, and change nothing by opening it."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import click
import redis.exceptions
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from rss.codec import JSONCodec, TextCodec
from rss.engine.failures import failure_of
from rss.engine.meta import FORMAT, Held, held_by
from rss.store import SessionStore

# Seconds for one operation.
_TIMEOUT: Final = 10


class Refusal(click.ClickException):
    """Raised if the command was given something that it cannot do. The message is one sentence."""

    exit_code = 2


Client = Redis | RedisCluster
#: A store of the command.
Store = SessionStore[dict[str, Any]]


def client_of(url: str) -> Client:
    """Return a client. Raises `Refusal`, without the secrets in the URL, if the URL is none."""
    try:
        scheme = urlsplit(url).scheme
        if scheme == "redis+sentinel":
            return _behind_sentinels(url)
        if scheme.endswith("+cluster"):
            return RedisCluster.from_url(url.replace("+cluster", "", 1))
        return Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=None)
    except (ValueError, redis.exceptions.RedisError):
        raise Refusal(
            "the URL must be redis://host:port/db, rediss://..., unix://path, redis+cluster://host:port or "
            "redis+sentinel://host:port,host:port/service"
        ) from None


def _behind_sentinels(url: str) -> Redis:
    """Return a client of `redis+sentinel://user:password@host:port,host:port/service`.

    The user and the password are those of the master.
    """
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    addresses = [host.rpartition(":") if ":" in host else (host, ":", "26379") for host in hosts.split(",")]
    service = unquote(parts.path.strip("/"))
    if not service or not all(host for host, _, _ in addresses):
        raise ValueError("no service or no host")
    once: dict[str, Any] = {"retry": Retry(NoBackoff(), 0)}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [(host, int(port)) for host, _, port in addresses], sentinel_kwargs={**once, "socket_timeout": 1}
    )
    options: dict[str, Any] = {**once, "username": unquote(user) or None, "password": unquote(password) or None}
    client: Redis = sentinel.master_for(service, socket_timeout=None, **options)
    return client


async def close(client: Client) -> None:
    """Close a client, and those of its Sentinels."""
    await client.aclose()
    if isinstance(client, Redis) and isinstance(client.connection_pool, SentinelConnectionPool):
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()


async def read_meta(client: Client, prefix: str) -> Held | None:
    """Return what the meta key of a prefix says. Return None if no store has used the prefix.

    Raises `SessionError` if Redis does not answer, or refuses to.
    """
    try:
        store = SessionStore(client, prefix=prefix, timeout=_TIMEOUT)
    except ValueError as error:
        raise Refusal(str(error)) from None
    engine = store.operations.engine
    engine.references = None
    try:
        await engine.connect()
        async with asyncio.timeout(store.operations.timeout):
            await engine.servers.ready()
            return await held_by(store.operations.layout, engine.servers.master_of)
    except (OSError, redis.exceptions.RedisError) as error:
        raise failure_of(error) from error
    finally:
        await store.aclose()


def store_of(client: Client, prefix: str, held: Held, without: Collection[str] = ()) -> Store:
    """Return a store that reads what those with this meta key wrote. It is not compared with them, so it marks nothing.

    *without*: references to leave out.
    """
    if held.format != FORMAT:
        raise Refusal(f"the sessions with the prefix {prefix!r} have a format that this version does not know")
    if held.json is None:
        raise Refusal(
            f"the options of the references of {prefix!r} are not known, because an older version of "
            "redis-session-sets wrote them: start the application with this version first"
        )
    store: Store = SessionStore(
        client,
        references={name: kind for name, kind in held.references.items() if name not in without},
        prefix=prefix,
        partitions=held.partitions,
        codec=JSONCodec() if held.json else TextCodec(),
        timeout=_TIMEOUT,
    )
    store.operations.engine.references = None
    return store


@asynccontextmanager
async def opened(url: str, prefix: str, without: Collection[str] = ()) -> AsyncIterator[tuple[Store, Client]]:
    """Open the store of a prefix, and yield it with a client. Raises `Refusal` if no store used the prefix."""
    client = client_of(url)
    try:
        held = await read_meta(client, prefix)
        if held is None:
            raise Refusal(f"no store has used the prefix {prefix!r} in this Redis: see --prefix and --url")
        if unknown := set(without) - set(held.references):
            raise Refusal(f"the prefix has no reference {min(unknown)!r}")
        async with store_of(client, prefix, held, without) as store:
            yield store, client
    finally:
        await close(client)
