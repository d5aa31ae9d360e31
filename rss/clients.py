"""Clients of redis-py for the URLs of this library."""

import re
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

Client = Redis | RedisCluster

# The address of a Sentinel: a name or an IP address, and the port, which may be left out.
_ADDRESS: Final = re.compile(r"([^:\[\]]+|\[[^\[\]]+\])(?::(\d+))?")
_PORT: Final = 26379


def client_of(url: str) -> Client:
    """Return a client for a URL.

    | URL | server |
    |---|---|
    | redis://user:password@host:port/db, rediss://… with TLS, unix://path | one Redis |
    | redis+cluster://…, rediss+cluster://… | a Redis Cluster, by the address of any of its servers |
    | redis+sentinel://user:password@host:port,host:port/service/db, rediss+sentinel://… | a Redis behind Sentinels |

    Raises ValueError for another one, or what redis-py raises for a bad option.
    """
    # Every call of the engine has a deadline, so the client needs no socket timeout and no retries.
    once: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "socket_timeout": None}
    scheme = urlsplit(url).scheme if isinstance(url, str) else ""
    if scheme.endswith("+sentinel"):
        return _behind_sentinels(url, once)
    if scheme.endswith("+cluster"):
        return RedisCluster.from_url(url.replace("+cluster", "", 1))
    return Redis.from_url(url, **once)


def _behind_sentinels(url: str, once: dict[str, Any]) -> Redis:
    """Return a client of the master of a service. The user and the password are those of the master."""
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    addresses = [_ADDRESS.fullmatch(address) for address in hosts.split(",")]
    service, _, db = parts.path.strip("/").partition("/")
    tls = {"redis+sentinel": False, "rediss+sentinel": True}.get(parts.scheme)
    if tls is None or parts.query or not service or None in addresses:
        raise ValueError("the URL must be redis+sentinel://host:port,host:port/service or /service/db, without options")
    once = {**once, "ssl": True} if tls else once
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [(one[1].strip("[]"), int(one[2] or _PORT)) for one in addresses if one],
        sentinel_kwargs={**once, "socket_timeout": 1},
    )
    options: dict[str, Any] = {**once, "username": unquote(user) or None, "password": unquote(password) or None}
    client: Redis = sentinel.master_for(unquote(service), db=int(db or 0), **options)
    return client


async def close(client: Client) -> None:
    """Close a client, and those of its Sentinels."""
    await client.aclose()
    if isinstance(client, Redis) and isinstance(client.connection_pool, SentinelConnectionPool):
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()
