"""The faults of a Redis Cluster: its slots move, and its masters are replaced, stop and die.

A master acknowledges a write before its replicas have it. So a master that stops or dies may lose writes that it has
just acknowledged, and these are counted. A write that was acknowledged later must not be lost. Twenty tasks do plain
commands through redis-py on the same cluster.
"""

import asyncio
import signal
import time
from typing import Final, cast

import redis.exceptions
from redis.asyncio import RedisCluster
from redis.crc import key_slot

from benchmarks.chaos.deployment import Options, play
from benchmarks.chaos.others import Runner
from benchmarks.chaos.scene import Fault, Scene
from rss import SessionStore
from rss.keys import Partitioned
from rss.testing import Cluster, ClusterServer, cluster

_PLAIN_TASKS: Final = 20


async def run(options: Options) -> list[Scene]:
    """Break a cluster of three masters, each with a replica."""
    with cluster(3, 1) as servers:
        client = RedisCluster.from_url(servers.url.replace("+cluster", ""))
        async with client, SessionStore.from_url(servers.url, **options.store) as store:
            slots = cast("Partitioned", store.operations.layout).slots

            def plan(scene: Scene) -> list[Fault]:
                return Troubles(servers, scene, slots, every=4 if options.quick else 1).plan()

            def beside(scene: Scene) -> list[Runner]:
                return [PlainTask(client, scene, number) for number in range(_PLAIN_TASKS)]

            def masters() -> list[ClusterServer]:
                return [server for server in servers.servers if server.alive and server.is_master]

            return [await play(store, options, masters, plan, beside=beside)]


class PlainTask:
    """A task that does plain commands through redis-py, and knows what its hash must hold."""

    def __init__(self, client: RedisCluster, scene: Scene, number: int) -> None:
        self._client = client
        self._scene = scene
        self._key = f"plain:{scene.layout.prefix}:{number}"
        self._count = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Work until the event."""
        while not stop.is_set():
            try:
                async with asyncio.timeout(10):
                    count = await self._client.hincrby(self._key, "n")
            except Exception:  # noqa: BLE001 - whatever an application would see
                self._scene.now.plain["errors"] += 1
                await self._again()
                continue
            self._scene.now.plain["operations"] += 1
            self._count += 1
            if count != self._count:
                at_risk = count < self._count and key_slot(self._key.encode()) in self._scene.at_risk
                self._scene.now.plain["lost" if at_risk else "wrong"] += 1
                self._count = count

    async def _again(self) -> None:
        while True:
            try:
                async with asyncio.timeout(10):
                    self._count = int(await self._client.hget(self._key, "n") or 0)
            except Exception:  # noqa: BLE001 - whatever an application would see
                await asyncio.sleep(0.05)
                continue
            return


class Troubles:
    """The changes and failures of the cluster, one for each phase. *every*: move only each so many-th slot."""

    def __init__(self, servers: Cluster, scene: Scene, slots: list[int], every: int) -> None:
        self._servers = servers
        self._scene = scene
        self._slots = slots[::every]

    def plan(self) -> list[Fault]:
        """Return the faults in order."""
        about = self._servers.servers[0].info("server")
        atomic = int(str(about.get("valkey_version", "0")).split(".")[0]) >= 9
        return [
            Fault("all slots move", self.migrate),
            Fault("MIGRATESLOTS", self.migrate_atomically, lacks=None if atomic else "needs Valkey 9"),
            Fault("SCRIPT FLUSH", self.flush),
            Fault("CLIENT KILL", self.cut),
            Fault("CLUSTER FAILOVER", self.fail_over),
            # On one machine, another master makes everything slower, since batches are smaller.
            Fault("a new master", self.grow, recovered=0.75),
            Fault("SIGSTOP of a master", self.stop),
            Fault("kill -9 of a master", self.kill),
        ]

    def migrate(self) -> None:
        """Move the slot of each partition, key by key."""
        for number, slot in enumerate(self._slots):
            others = [master for master in self._masters() if master is not self._servers.owner(slot)]
            while True:
                try:
                    self._servers.migrate(slot, others[number % 2])
                    break
                except redis.exceptions.ResponseError as error:  # A busy machine may take a master for dead.
                    if "CLUSTERDOWN" not in str(error):
                        raise
                    time.sleep(0.1)

    def migrate_atomically(self) -> None:
        """Move a third of the slots as Valkey 9 does."""
        for slot in self._slots[::3]:
            source = self._servers.owner(slot)
            target = self._masters(but=source)[0]
            source("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", target.id)
            while self._servers.owner(slot) is not target:
                time.sleep(0.02)

    def flush(self) -> None:
        """Let all scripts vanish, five times."""
        self._each("SCRIPT", "FLUSH")

    def cut(self) -> None:
        """Cut all connections, five times."""
        self._each("CLIENT", "KILL", "TYPE", "normal")

    def fail_over(self) -> None:
        """Let a replica take over from its living master."""
        replica = next(server for server in self._servers.servers if server.alive and not server.is_master)
        replica("CLUSTER", "FAILOVER")
        while not replica.is_master:
            time.sleep(0.02)

    def grow(self) -> None:
        """Let another master join, and give it six slots."""
        target = self._servers.add_master()
        for slot in self._slots[:6]:
            self._servers.migrate(slot, target)

    def stop(self) -> None:
        """Stop a master until its replica has taken over."""
        victim = self._endangered()
        victim.signal(signal.SIGSTOP)
        try:
            self._wait_for_another(victim)
        finally:
            victim.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill a master."""
        victim = self._endangered()
        victim.kill()
        self._wait_for_another(victim)

    def _masters(self, but: object = None) -> list[ClusterServer]:
        servers = (server for server in self._servers.servers if server is not but)
        return [server for server in servers if server.alive and server.is_master]

    def _each(self, *command: str) -> None:
        for _ in range(5):
            for server in self._masters():
                server(*command)
            time.sleep(0.3)

    def _endangered(self) -> ClusterServer:
        """Return a master that has a replica. From now on its acknowledged writes are at risk."""
        rows = self._masters()[0]("CLUSTER", "SLOTS")
        port = next(row[2][1] for row in rows if len(row) > 3)
        self._scene.at_risk = {slot for row in rows if row[2][1] == port for slot in range(row[0], row[1] + 1)}
        self._scene.end_risk()
        return next(server for server in self._servers.servers if server.port == port)

    def _wait_for_another(self, victim: ClusterServer) -> None:
        while victim.port in {row[2][1] for row in self._masters(but=victim)[0]("CLUSTER", "SLOTS")}:
            time.sleep(0.05)
