"""Fixtures that give tests a real Redis: `pytest_plugins = ["rss.pytest_plugin"]` in the top conftest.py.

The fixtures are not async, so they work with pytest-asyncio and with anyio's plugin.
"""

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from rss.cookies import CookiePolicy
from rss.session import Sessions
from rss.store import SessionStore, StoreOptions
from rss.testing import Cluster, RedisServer, cluster, redis_server

_USED = pytest.StashKey[str]()


@pytest.fixture(scope="session", name="redis_server")
def _redis_server(pytestconfig: pytest.Config) -> Iterator[RedisServer]:
    """A server for the whole test run. `rss.testing.redis_server` says how it is chosen."""
    with redis_server() as server:
        pytestconfig.stash[_USED] = server.origin
        # A worker of pytest-xdist sends this dict to the process that writes the report.
        getattr(pytestconfig, "workeroutput", {})["rss"] = server.origin
        yield server


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    """The URL of the server. If it was not started for the tests, it may hold other data: use a prefix of your own."""
    return redis_server.url


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[Cluster]:
    """A Redis Cluster of three masters for the whole test run. `redis_cluster.url` is its URL."""
    with cluster() as made:
        yield made


@pytest.fixture
def session_options() -> StoreOptions:
    """The options of `session_store`, such as its references. Override this fixture to set them."""
    return {}


@pytest.fixture
def session_store(redis_url: str, session_options: StoreOptions) -> Iterator[SessionStore[Any]]:
    """A store with a unique prefix, so other tests do not see its keys. The keys are removed after the test."""
    prefix = f"test-{secrets.token_hex(8)}"
    options: StoreOptions = {**session_options, "prefix": prefix}
    yield SessionStore.from_url(redis_url, **options)
    kind = redis.RedisCluster if "+cluster" in redis_url else redis.Redis
    with kind.from_url(redis_url.replace("+cluster", "")) as client:
        for key in client.scan_iter(match=f"{prefix}:*", count=1000):
            client.unlink(key)


@pytest.fixture
def sessions(session_store: SessionStore[Any]) -> Sessions[Any]:
    """The sessions of an application. The cookie is not Secure, because test clients on plain http would drop it."""
    return Sessions(session_store, cookie=CookiePolicy(secure=False))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Remember the server that a worker of pytest-xdist used."""
    if origin := getattr(node, "workeroutput", {}).get("rss"):
        node.config.stash[_USED] = origin


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Report the server that was used."""
    if _USED in config.stash:
        terminalreporter.write_line(f"Redis: {config.stash[_USED]}")
