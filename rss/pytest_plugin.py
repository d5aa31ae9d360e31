"""Fixtures that give tests a real Redis: `pytest_plugins = ["rss.pytest_plugin"]` in the top conftest.py.

They are not async, so they work with pytest-asyncio and with anyio's plugin.
"""

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from rss import CookiePolicy, Sessions, SessionStore
from rss.store import StoreOptions
from rss.testing import RedisServer, redis_server

_USED = pytest.StashKey[str]()


@pytest.fixture(scope="session", name="redis_server")
def _redis_server(pytestconfig: pytest.Config) -> Iterator[RedisServer]:
    """A server for the whole session: see `rss.testing.redis_server` for which one it is."""
    with redis_server() as server:
        pytestconfig.stash[_USED] = server.origin
        # pytest-xdist has a dict here in a worker, and sends it to the process that writes the report.
        getattr(pytestconfig, "workeroutput", {})["rss"] = server.origin
        yield server


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    """Its URL. If it was not started for the tests, it holds the data of others: use a prefix of your own."""
    return redis_server.url


@pytest.fixture
def session_options() -> StoreOptions:
    """The options of `session_store`, such as its references. Override this fixture to set them."""
    return {}


@pytest.fixture
def session_store(redis_url: str, session_options: StoreOptions) -> Iterator[SessionStore[Any]]:
    """A store with a prefix of its own, so no other test sees its keys. They are removed at the end."""
    prefix = f"test-{secrets.token_hex(8)}"
    options: StoreOptions = {**session_options, "prefix": prefix}
    yield SessionStore.from_url(redis_url, **options)
    with redis.Redis.from_url(redis_url) as client:
        for key in client.scan_iter(match=f"{prefix}:*", count=1000):
            client.unlink(key)


@pytest.fixture
def sessions(session_store: SessionStore[Any]) -> Sessions[Any]:
    """The sessions of an application. Their cookie is not Secure, so test clients on plain http keep it."""
    return Sessions(session_store, cookie=CookiePolicy(secure=False))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over from a worker of pytest-xdist which server it was."""
    if origin := getattr(node, "workeroutput", {}).get("rss"):
        node.config.stash[_USED] = origin


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which server it was."""
    if _USED in config.stash:
        terminalreporter.write_line(f"Redis: {config.stash[_USED]}")
