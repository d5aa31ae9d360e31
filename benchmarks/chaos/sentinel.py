"""The faults of a master and its replica behind Sentinels."""

import signal
import time
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Final

import redis.exceptions
from redis.asyncio.sentinel import Sentinel

from benchmarks.chaos.deployment import Options, play
from benchmarks.chaos.scene import Fault, Scene
from benchmarks.chaos.servers import NAME, SentinelServer, Server, servers, wait
from rss import SessionStore

_SENTINELS: Final = 3
_QUORUM: Final = 2
_ARGUMENTS: Final = ("--appendonly", "no", "--repl-diskless-sync-delay", "0")


async def run(options: Options) -> list[Scene]:
    """Break a master and its replica behind three sentinels."""
    with servers() as started:
        pair = [started.start(Server, *_ARGUMENTS) for _ in range(2)]
        sentinels = [started.start(SentinelServer) for _ in range(_SENTINELS)]
        troubles = Troubles(pair, sentinels)
        troubles.follow()
        for one in sentinels:
            one.watch(troubles.master, _QUORUM)
        troubles.heal()
        asked = Sentinel([("127.0.0.1", one.port) for one in sentinels])  # type: ignore[no-untyped-call]
        async with AsyncExitStack() as stack:
            for client in asked.sentinels:
                stack.push_async_callback(client.aclose)
            master = await stack.enter_async_context(asked.master_for(NAME))
            store = await stack.enter_async_context(SessionStore(master, **{**options.store, "timeout": 15}))
            return [await play(store, options, lambda: [troubles.master], troubles.plan, durable=True)]


class Troubles:
    """The faults, each of which ends with another master that has a replica."""

    def __init__(self, pair: list[Server], sentinels: list[SentinelServer]) -> None:
        self._pair = pair
        self._sentinels = sentinels
        self._scene: Scene | None = None

    @property
    def master(self) -> Server:
        """The first of the pair, which is the master."""
        return self._pair[0]

    def plan(self, scene: Scene) -> list[Fault]:
        """Return the faults in order."""
        self._scene = scene
        # A durable call that is sent behind another one waits with it for a replica. So it may run after its deadline.
        return [
            Fault("kill -9 of the master", self.kill, lossy=True, late=True),
            Fault("SENTINEL FAILOVER", self.fail_over, lossy=True, late=True),
            Fault("SIGSTOP of the master, and its return", self.stop, lossy=True, late=True),
            Fault("silent demotion of the master", self.demote, lossy=True, late=True),
        ]

    def kill(self) -> None:
        """Kill the master, and start it again as a replica."""
        old, new = self._pair
        old.kill()
        self._end_risk()
        self._wait_for(new)
        old.arguments = (*_ARGUMENTS, "--replicaof", "127.0.0.1", str(new.port))
        old.start()
        self._swap()

    def fail_over(self) -> None:
        """Ask a sentinel for a failover."""
        old, new = self._pair
        while not new.is_master:
            with suppress(redis.exceptions.ResponseError, TimeoutError):  # A sentinel may give a failover up.
                self._sentinels[0]("SENTINEL", "FAILOVER", NAME)
                wait(lambda: new.is_master, 5)
            time.sleep(0.1)
        self._wait_for(new)
        wait(lambda: not old.is_master)  # Until then it acknowledges writes, which are lost.
        self._end_risk()
        self._swap()

    def stop(self) -> None:
        """Stop the process of the master until it is replaced, and let it go on."""
        old, new = self._pair
        old.signal(signal.SIGSTOP)
        self._end_risk()
        try:
            self._wait_for(new)
            time.sleep(1)
        finally:
            old.signal(signal.SIGCONT)
        wait(lambda: not old.is_master)
        self._swap()

    def demote(self) -> None:
        """Exchange the two without a word. All connections stay open."""
        old, new = self._pair
        new("REPLICAOF", "NO", "ONE")
        old("REPLICAOF", "127.0.0.1", new.port)
        self._end_risk()
        for one in self._sentinels:  # All at first: one that knows the old master would tell the others.
            one("SENTINEL", "REMOVE", NAME)
        for one in self._sentinels:
            one.watch(new, _QUORUM)
        self._swap()

    def follow(self) -> None:
        """Let the second server be the replica of the first one."""
        self._pair[1]("REPLICAOF", "127.0.0.1", self._pair[0].port)
        wait(lambda: self._pair[1].follows)

    def heal(self) -> None:
        """Wait until the replica follows, and the sentinels could replace the master."""
        wait(lambda: self._pair[1].follows)
        for one in self._sentinels:
            wait(partial(one.agrees, self.master, _SENTINELS - 1))

    def _swap(self) -> None:
        self._pair.reverse()
        self.heal()

    def _wait_for(self, new: Server) -> None:
        wait(lambda: new.is_master)
        for one in self._sentinels:
            wait(partial(one.agrees, new))

    def _end_risk(self) -> None:
        assert self._scene
        self._scene.end_risk()
