"""A real Redis Cluster on the loopback, for tests that move its slots, stop its servers and let it fail over."""

import shutil
import signal
import socket
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
from rss.testing import server_binary
from tests.servers import free_port

_OPTIONS: Final = ("--cluster-node-timeout", "1500", "--repl-diskless-sync-delay", "0")


class Server:
    """One server of a cluster."""

    def __init__(self, folder: Path, binary: str) -> None:
        """Choose a port whose bus port is free too."""
        self.port = _free_pair()
        self.folder = folder / str(self.port)
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        self._client = redis.Redis(port=self.port, socket_timeout=30)

    def start(self) -> None:
        """Start it, with the state that its folder has, and wait until it answers."""
        self.folder.mkdir(exist_ok=True)
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--logfile", str(self.folder / "log"), "--save", "", "--appendonly", "no"]
        command += ["--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", *_OPTIONS]
        self._process = subprocess.Popen(command)
        deadline = time.monotonic() + 20
        while True:
            with suppress(redis.exceptions.RedisError):
                if self("PING"):
                    break
            assert self.alive, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert self.info("server")["process_id"] == self._process.pid, "another program has taken the port"

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

    def signal(self, number: signal.Signals) -> None:
        """Send its process a signal."""
        assert self._process
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
    """The servers of a cluster: the first ones begin as masters."""

    def __init__(self, masters: int, replicas: int) -> None:
        """Choose ports. *replicas*: of each master."""
        binary = server_binary()
        assert binary
        self._binary = binary
        self._folder = Path(tempfile.mkdtemp(prefix="rss-cluster-"))
        self._masters, self._replicas = masters, replicas
        self.servers = [Server(self._folder, binary) for _ in range(masters * (1 + replicas))]

    @property
    def url(self) -> str:
        """The URL of the first server."""
        return f"redis://127.0.0.1:{self.servers[0].port}"

    def start(self) -> None:
        """Start all servers, and wait until they are a cluster."""
        for number, server in enumerate(self.servers):
            server.start()
            server("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for number, server in enumerate(self.servers[: self._masters]):
            first, last = SLOTS * number // self._masters, SLOTS * (number + 1) // self._masters - 1
            try:
                server("CLUSTER", "ADDSLOTSRANGE", first, last)
            except redis.exceptions.ResponseError:  # Redis 6.2 lacks it.
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

    def wait(self, ready: Callable[[Server], bool], seconds: float = 30) -> None:
        """Wait until all living servers are ready."""
        deadline = time.monotonic() + seconds
        for server in [server for server in self.servers if server.alive]:
            while not ready(server):
                assert time.monotonic() < deadline, (server.folder / "log").read_text()[-2000:]
                time.sleep(0.05)

    def stop(self) -> None:
        """Kill all servers, and remove their folders."""
        for server in self.servers:
            server.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add_master(self) -> Server:
        """Let an empty server join. It has no slots."""
        server = Server(self._folder, self._binary)
        self.servers.append(server)
        server.start()
        server("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port)
        self.wait(lambda one: one is not server or one.info("cluster")["cluster_state"] == "ok")
        return server

    def owner(self, slot: int) -> Server:
        """Return the master of a slot, as some living server reports it."""
        server = next(server for server in self.servers if server.alive)
        for first, last, master, *_ in server("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(one for one in self.servers if one.port == master[1])
        raise AssertionError("the slot has no master")

    def begin_migration(self, slot: int, target: Server) -> Server:
        """Let a slot begin to move, and return its master."""
        source = self.owner(slot)
        assert source is not target
        target("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        return source

    def move_keys(self, slot: int, target: Server, count: int = 10) -> int:
        """Move some keys of a moving slot, and return how many these were."""
        source = self.owner(slot)
        keys = source("CLUSTER", "GETKEYSINSLOT", slot, count)
        if keys:
            source("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def move(self, slot: int, target: Server, *keys: str) -> None:
        """Move these keys of a moving slot."""
        if keys:
            self.owner(slot)("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)

    def end_migration(self, slot: int, target: Server) -> None:
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

    def migrate(self, slot: int, target: Server) -> None:
        """Move a slot key by key, as redis-cli does."""
        if self.owner(slot) is not target:
            self.begin_migration(slot, target)
            self.end_migration(slot, target)


@contextmanager
def cluster(masters: int = 3, replicas: int = 0) -> Iterator[Cluster]:
    """Run a cluster."""
    made = Cluster(masters, replicas)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def _free_pair() -> int:
    """Return a free port whose bus port, 10,000 above, is free too."""
    while True:
        port = free_port()
        with suppress(OSError, OverflowError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port + 10_000))
            return port
