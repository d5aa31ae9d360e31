"""The clients that are made of URLs."""

from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.sentinel import SentinelConnectionPool, SentinelManagedSSLConnection

from rss import SessionStore
from rss.clients import client_of
from rss.testing import free_port
from tests.servers import connections, own_server, sentinel


async def test_a_store_behind_sentinels(tmp_path: Path) -> None:
    """The URL names Sentinels, the service and the database. One Sentinel is away. Closing leaves no connection."""
    port = free_port()
    with own_server("--port", str(port), "--bind", "127.0.0.1") as url, sentinel(tmp_path, port) as number:
        hosts = f"127.0.0.1:1,127.0.0.1:{number}"
        async with SessionStore.from_url(f"redis+sentinel://{hosts}/main/3", references=["user_id"]) as store:
            session_id = await store.create({"user_id": 7})
        async with Redis.from_url(url, db=3) as admin, Redis(port=number) as watcher:
            assert await admin.exists(store.get_session_key(session_id))
            assert not [one for one in await connections(admin) if one["db"] == "3"]
            assert not [one for one in await connections(watcher) if one["cmd"].startswith("sentinel|get-master")]


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://host:1",
        "redis+sentinel://host:1/",
        "redis+sentinel://,host:1/main",
        "redis+sentinel://host:port/main",
        "redis+sentinel://me:SECRET/main",
        "redis+sentinel://[::1/main",
        "redis+sentinel://host:1/main/x",
        "redis+sentinel://host:1/main?db=1",
        "unix+sentinel://host:1/main",
    ],
)
def test_a_url_of_sentinels_that_is_none(url: str) -> None:
    """A URL that names no host, no service, no number or an option is refused."""
    with pytest.raises(ValueError, match=r"redis\+sentinel|int\(\)|Invalid IPv6 URL") as raised:
        client_of(url)
    assert "SECRET" not in str(raised.value)


def test_sentinels_by_addresses() -> None:
    """A Sentinel may have a name, or an address of IPv4 or IPv6."""
    client = client_of("redis+sentinel://[::1]:5,10.0.0.1,[fe80::2],host:7/main")
    assert isinstance(client, Redis)
    assert isinstance(client.connection_pool, SentinelConnectionPool)
    options = [one.connection_pool.connection_kwargs for one in client.connection_pool.sentinel_manager.sentinels]
    addresses = [(one["host"], one["port"]) for one in options]
    assert addresses == [("::1", 5), ("10.0.0.1", 26379), ("fe80::2", 26379), ("host", 7)]


def test_sentinels_with_tls() -> None:
    """The store and the Sentinels are asked by TLS, with the user and the password of Redis."""
    client = client_of("rediss+sentinel://me:hunt%3Aer@host,other:1/main")
    assert isinstance(client, Redis)
    pool = client.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.connection_class is SentinelManagedSSLConnection
    assert (pool.connection_kwargs["username"], pool.connection_kwargs["password"]) == ("me", "hunt:er")
    first, second = (one.connection_pool for one in pool.sentinel_manager.sentinels)
    assert (first.connection_kwargs["host"], first.connection_kwargs["port"]) == ("host", 26379)
    assert (second.connection_kwargs["host"], second.connection_kwargs["port"]) == ("other", 1)
    assert first.connection_kwargs["password"] is None
