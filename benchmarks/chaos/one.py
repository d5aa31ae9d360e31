"""The faults of one Redis, and of the network before it."""

import asyncio
import random
import signal
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Final

import redis
import redis.exceptions

from benchmarks.chaos.deployment import Options, play
from benchmarks.chaos.network import Network, network
from benchmarks.chaos.scene import Fault, Scene
from benchmarks.chaos.servers import Server, servers
from rss import SessionNotFound, SessionStore

# Sessions that expire while they are written.
_SHORT: Final = 20


async def run(options: Options) -> list[Scene]:
    """Break one Redis directly, and then through the network before it."""
    with servers() as started:
        server = started.start(Server, "--appendonly", "yes", "--appendfsync", "everysec")
        scenes, faults = list[Scene](), Troubles(server, options).plan()
        async with SessionStore.from_url(f"redis://127.0.0.1:{server.port}", **options.store) as store:

            def plan(scene: Scene) -> list[Fault]:
                return faults + _of_callers(scene, store, options)

            scenes.append(await play(store, options, lambda: [server], plan))
        # A short deadline, because a connection that is silent for a third of it is replaced.
        more = {**options.store, "timeout": 3}
        async with (
            network(server.port) as between,
            SessionStore.from_url(f"redis://127.0.0.1:{between.port}", **more) as store,
        ):
            plan = partial(_of_network, between, options)
            scenes.append(await play(store, options, lambda: [server], plan))
        return scenes


class Troubles:
    """The faults of the server itself."""

    def __init__(self, server: Server, options: Options) -> None:
        self._server = server
        self._seconds = options.seconds
        self._random = random.Random(1)

    def plan(self) -> list[Fault]:
        """Return the faults in order."""
        return [
            Fault("kill -9, appendfsync always", partial(self.kill, "always")),
            Fault("kill -9, appendfsync everysec", partial(self.kill, "everysec"), lossy=True),
            Fault("SCRIPT FLUSH every 50 ms", partial(self.again, 0.05, "SCRIPT", "FLUSH")),
            Fault("CLIENT KILL every 100 ms", partial(self.again, 0.1, "CLIENT", "KILL", "TYPE", "normal")),
            Fault("CLIENT PAUSE ALL", partial(self.pause, "ALL")),
            Fault("CLIENT PAUSE WRITE", partial(self.pause, "WRITE")),
            Fault("SIGSTOP", self.stop),
            Fault("a slow script (BUSY)", self.hang),
            Fault("out of memory", partial(self.configure, "maxmemory", 1, 0), refuses=True),
            Fault("min-replicas-to-write", partial(self.configure, "min-replicas-to-write", 1, 0)),
            Fault("REPLICAOF and back", self.demote),
            Fault("maxclients", self.crowd),
        ]

    def again(self, pause: float, *command: str) -> None:
        """Run a command again and again."""
        until = time.monotonic() + self._seconds
        while time.monotonic() < until:
            self._server(*command)
            time.sleep(pause)

    def kill(self, policy: str) -> None:
        """Kill the server while it works, and start it again, three times."""
        for _ in range(max(1, round(self._seconds))):
            self._server("CONFIG", "SET", "appendfsync", policy)
            time.sleep(0.5)
            self._server.kill()
            time.sleep(0.1)
            self._server.start()
        self._server("CONFIG", "SET", "appendfsync", "everysec")

    def pause(self, what: str) -> None:
        """Let the server serve nobody, or no writer."""
        seconds = self._random.uniform(0.5, self._seconds)
        self._server("CLIENT", "PAUSE", round(seconds * 1000), what)
        time.sleep(seconds)

    def stop(self) -> None:
        """Stop the process of the server for a while."""
        self._server.signal(signal.SIGSTOP)
        time.sleep(self._random.uniform(self._seconds, self._seconds * 5 / 3))
        self._server.signal(signal.SIGCONT)

    def hang(self) -> None:
        """Let a script of another client hang."""
        limit = "busy-reply-threshold" if self._server("CONFIG", "GET", "busy-reply-threshold") else "lua-time-limit"
        self._server("CONFIG", "SET", limit, 50)
        other = redis.Connection(port=self._server.port)  # type: ignore[no-untyped-call]
        other.send_command("EVAL", "while true do end", 0)  # type: ignore[no-untyped-call]
        time.sleep(self._seconds / 2)
        self._server("SCRIPT", "KILL")
        with suppress(redis.exceptions.ResponseError):
            other.read_response()
        other.disconnect()  # type: ignore[no-untyped-call]

    def configure(self, name: str, value: int, usual: int) -> None:
        """Change a setting for a while."""
        self._server("CONFIG", "SET", name, value)
        time.sleep(self._seconds / 2)
        self._server("CONFIG", "SET", name, usual)

    def demote(self) -> None:
        """Let the server be the replica of a master that nobody reaches."""
        self._server("REPLICAOF", "127.0.0.1", 1)
        time.sleep(self._seconds / 2)
        self._server("REPLICAOF", "NO", "ONE")

    def crowd(self) -> None:
        """Let the server accept no new connection, and cut those that exist."""
        self._server("CONFIG", "SET", "maxclients", 1)
        self._server("CLIENT", "KILL", "TYPE", "normal")
        time.sleep(self._seconds / 2)
        self._server("CONFIG", "SET", "maxclients", 10_000)


def _of_callers(scene: Scene, store: SessionStore, options: Options) -> list[Fault]:
    """Return the faults that callers cause."""

    async def cancel() -> None:
        scene.cancelled = 0.5
        await asyncio.sleep(options.seconds)
        scene.cancelled = 0.0

    async def expire() -> None:
        until = time.monotonic() + options.seconds
        await asyncio.gather(*(_expire(store, number, until) for number in range(_SHORT)))

    return [Fault("half of the operations cancelled", cancel), Fault("sessions of 1 to 50 ms", expire)]


async def _expire(store: SessionStore, number: int, until: float) -> None:
    """Write to sessions that are about to expire."""
    chance = random.Random(number)
    while time.monotonic() < until:
        age = timedelta(milliseconds=chance.randrange(1, 51))
        session_id = await store.create({"user_id": f"short-{number}", "ip": "short", "n": 0}, age)
        with suppress(SessionNotFound):
            while True:
                await asyncio.sleep(chance.random() / 50)
                kind = chance.randrange(4)
                if kind == 0 and not await store.touch(session_id):
                    break
                if kind == 1:
                    await store.set(session_id, {"ip": f"short-{chance.randrange(3)}"}, create=False)
                if kind == 2:
                    session_id = await store.rotate(session_id, {"user_id": f"short-{number}-{chance.randrange(2)}"})
                if kind == 3:
                    await store.increment(session_id, "n")
                if chance.random() < 0.2:
                    await store.delete(session_id)


def _of_network(between: Network, options: Options, scene: Scene) -> list[Fault]:
    """Return the faults of the network."""

    async def reset_idle() -> None:
        for _ in range(5):
            scene.open.clear()
            await asyncio.gather(*(worker.rest() for worker in scene.workers))
            between.reset()
            await asyncio.sleep(0.05)  # The store must notice it, before it sends a call that must not run twice.
            scene.open.set()
            await asyncio.sleep(options.seconds / 10)

    async def break_replies() -> None:
        until = time.monotonic() + options.seconds
        while time.monotonic() < until:
            between.break_reply = True
            await asyncio.sleep(0.1)
        between.break_reply = False

    async def split() -> None:
        between.split = True
        await asyncio.sleep(options.seconds)
        between.split = False

    async def hold() -> None:
        between.held = True
        await asyncio.sleep(0.2)
        # Calls that are in flight are held. The store connects again, and their sessions are changed and ended.
        between.held = False
        await asyncio.sleep(5)
        between.deliver()
        await asyncio.sleep(0.5)

    return [
        Fault("RST, idle", reset_idle),
        Fault("RST in a reply every 100 ms", break_replies),
        Fault("segments of 1 byte", split),
        Fault("a segment delivered after 5 s", hold, late=True, repeats=True, refuses=True),
    ]
