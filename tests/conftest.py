"""Fixtures of all tests: a server, a store with its own prefix, and a view of all its keys."""

import asyncio
import faulthandler
import functools
import gc
import importlib.metadata
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from typing import Any

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from hypothesis import settings
from redis.asyncio import Redis, RedisCluster

from rss import SessionStore
from rss.engine import cluster as masters
from rss.engine import lane, scripts
from rss.engine.servers import OneServer
from rss.testing import Cluster, cluster
from tests.keyspace import Keyspace
from tests.secrecy import Secrecy
from tests.servers import client_of, own_server, require_all

pytest_plugins = ["rss.pytest_plugin"]

# The numbers for `SECRECY_REPORT`, added up over the workers.
SECRECY = pytest.StashKey[Counter[str]]()
SECRECY_REPORT = (
    "Secrecy: {tokens} cookie tokens in {commands} commands of MONITOR, and with "
    "{others} ids and CSRF secrets in {records} log records: {leaks} seen"
)

# CI uses `--hypothesis-profile=thorough`, which takes a few minutes.
settings.register_profile("quick", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=700)
settings.load_profile("quick")

# Cached for speed: redis-py looks up its own version for each connection, and each store reads all scripts.
for module, name in ((importlib.metadata, "version"), (scripts, "read")):
    setattr(module, name, functools.cache(getattr(module, name)))

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
try:
    import uvloop
except ImportError:  # There is no uvloop for Windows.
    pass
else:
    LOOPS["uvloop"] = uvloop.new_event_loop


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run the contract of the store on every event loop, and all other tests on asyncio's own."""
    return LIMITED if item.path.name == "test_store.py" else {"asyncio": LIMITED["asyncio"]}


def loop_with_limit(new: Callable[[], asyncio.AbstractEventLoop]) -> asyncio.AbstractEventLoop:
    """Make an event loop that stops when the time limit of a test raises in one of its callbacks.

    uvloop runs every handler of a signal in a callback. Without this, the loop would log the error and keep waiting.
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        if isinstance(context.get("exception"), pytest.fail.Exception):
            loop.stop()

    loop = new()
    loop.set_exception_handler(handle)
    return loop


def pytest_collection_finish() -> None:
    """Exclude imported and collected objects from garbage collection, which some tests run a hundred times."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """End the process if a teardown hangs. pytest's own limit no longer applies after a test has failed."""
    limit, stderr = float(item.config.getini("faulthandler_timeout")), item.config.stash[fault_handler_stderr_fd_key]
    faulthandler.dump_traceback_later(limit, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def send_singly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch coalescing off: every call is a script of its own."""
    monkeypatch.setattr(lane, "ROOM", 1)
    monkeypatch.setattr(lane, "VOLLEYS", 32)
    for kind in (OneServer, masters.Cluster):
        monkeypatch.setattr(kind, "volleys", 32)


# All tests use the same objects, since tests share asynchronous fixtures only if their loop factories are equal.
LIMITED = {name: functools.partial(loop_with_limit, new) for name, new in LOOPS.items()}


@pytest.fixture(scope="module", name="url")
def _url() -> Iterator[str]:
    """A server for one test file alone, which may flush, pause and fill it; its statistics count no other tests."""
    with own_server() as url:
        yield url


@pytest.fixture(scope="session", name="secrecy")
def _secrecy(pytestconfig: pytest.Config) -> Iterator[Secrecy]:
    """Collects secrets in all tests that use it, and fails at the end if one of them was seen."""
    secrecy = Secrecy()
    with secrecy.learn():
        yield secrecy
    leaks = secrecy.leaks()
    counts = Counter(
        tokens=len(secrecy.tokens),
        commands=len(secrecy.commands),
        others=len(secrecy.others),
        records=len(secrecy.logged),
        leaks=len(leaks),
    )
    # pytest-xdist has a dict here in a worker, and sends it to the process that writes the report.
    output: dict[str, Any] | None = getattr(pytestconfig, "workeroutput", None)
    if output is None:
        pytestconfig.stash[SECRECY] = counts
    else:
        output["secrecy"] = dict(counts)
    assert leaks == []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add up the numbers of the workers of pytest-xdist."""
    # A worker that crashed has no output.
    counts = getattr(node, "workeroutput", {}).get("secrecy")
    if counts:
        node.config.stash.setdefault(SECRECY, Counter()).update(counts)


@pytest.fixture(name="kept_secret")
def _kept_secret(secrecy: Secrecy, redis_url: str) -> Iterator[None]:
    """Watches the log and the commands to Redis for secrets during this test."""
    with secrecy.listen(), secrecy.watch(redis_url):
        yield


@pytest.fixture(scope="module", name="watched_url")
def _watched_url(url: str, secrecy: Secrecy) -> Iterator[str]:
    """A server for one test file alone, whose commands are watched for secrets."""
    with secrecy.watch(url):
        yield url


@pytest.fixture(scope="module", name="servers")
def _servers() -> Iterator[Cluster]:
    """A cluster of three masters for one test file alone. Without one of them, the others go on."""
    with cluster() as made:
        require_all(made, "no")
        yield made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how much was searched for secrets."""
    if SECRECY in config.stash:
        terminalreporter.write_line(SECRECY_REPORT.format(**config.stash[SECRECY]))


@pytest.fixture(scope="session", name="cluster_url")
def _cluster_url() -> Iterator[str]:
    """A cluster of three masters, for tests that leave it as it is."""
    with cluster() as made:
        yield made.url


@pytest.fixture(name="client")
async def _client(redis_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Redis | RedisCluster]:
    """The client that the store gets; a test may be parametrized with options for it, or with "cluster"."""
    options = getattr(request, "param", {})
    if options == "cluster":
        redis_url, options = request.getfixturevalue("cluster_url"), {}
    async with client_of(redis_url, **options) as client:
        yield client


@pytest.fixture(name="keyspace")
async def _keyspace(redis_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Keyspace]:
    """All keys of this test, under its own prefix; they are removed at its end.

    A test may be parametrized with the number of partitions, or with "cluster".
    """
    partitions, url = getattr(request, "param", None), redis_url
    if partitions == "cluster":
        partitions, url = None, request.getfixturevalue("cluster_url")
    async with client_of(url, decode_responses=True) as connected:
        keyspace = Keyspace(connected, f"test-{secrets.token_hex(8)}", 64 if "+cluster" in url else partitions)
        yield keyspace
        await keyspace.clear()


@pytest.fixture(name="store")
def _store(client: Redis, keyspace: Keyspace) -> SessionStore:
    """A store as most tests use it."""
    references = ["user_id", "ip"]
    return SessionStore(client, references=references, prefix=keyspace.prefix, partitions=keyspace.partitions)
