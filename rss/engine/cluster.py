"""A Redis Cluster: the master of each partition, and the right place for calls that a master refuses.

A call goes to the master that has its partition according to the last topology. A master that does not have the slot
refuses the call, and names another one. So only the first calls wait for the topology.
"""

import asyncio
import contextlib
import contextvars
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import redis.exceptions
from redis.asyncio import RedisCluster
from redis.asyncio.connection import AbstractConnection, ConnectionPool

from rss.engine.coalesce import Batch, Elsewhere, Queue, asking
from rss.engine.failures import DEMOTED, LATER, code_of, with_cause
from rss.engine.lane import Lane, Node
from rss.engine.meta import ask, connected, open_store
from rss.engine.scripts import Scripts
from rss.errors import StoreUnavailable
from rss.keys import Layout, Partitioned, slot, tag_in

_Address = tuple[str, int]

# Seconds for one server to report the topology, which takes several round trips: at first, and at most. It grows with
# each server that is too slow until a first one has answered, and later with each look in which none was fast enough.
_PATIENCE: Final = 0.5
_LONG_PATIENCE: Final = 3.0
# Seconds between two looks at the topology: at least, and at most while nothing changes.
_PAUSE: Final = 0.1
_LONG_PAUSE: Final = 1.0
# Seconds for which the calls of a moving partition are sent one by one.
_SPLIT: Final = 1.0
# The codes of a server that may not be the master of the slot for long.
_TROUBLE: Final = DEMOTED | {"CLUSTERDOWN", "LOADING"}
# The options of a client that its connections do not take, or that are the business of its own pool.
_NOT_OURS: Final = (
    "connection_class",
    "response_callbacks",
    "max_connections",
    "oss_cluster_maint_notifications_handler",
)


class Cluster:
    """The masters of a Redis Cluster, for one event loop.

    Only the configuration of the client is used. So the client may drop its connections without effect on the store.
    """

    def __init__(
        self,
        client: RedisCluster,
        scripts: Scripts,
        layout: Layout,
        description: Mapping[str, str] | None,
        timeout: float,
    ) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        #: Partitions whose slots move, and the loop's time until which each call of them is a batch of its own.
        self.split: dict[int, float] = {}
        self._client = client
        self._scripts = scripts
        self._layout = cast("Partitioned", layout)
        self._description = description
        self._timeout = timeout
        self._slots = self._layout.slots
        self._nodes: dict[_Address, Node] = {}
        self._seeds = [(seed.host, int(seed.port)) for seed in client.nodes_manager.startup_nodes.values()]
        self._known: list[_Address] = []  # The masters and replicas of the last topology. Empty: none was seen yet.
        self._masters: dict[range, _Address] = {}  # The master of each range of slots.
        self._replicas: dict[_Address, list[_Address]] = {}  # The replicas of each master.
        self._lock = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None
        self._doubts = set[Node]()
        self._pause = _PAUSE
        self._patience = _PATIENCE
        #: The master of each partition. Before the first look at the topology: the first seed.
        self.owners: list[Node] = [self._node(self._seeds[0])] * layout.partitions

    @property
    def nodes(self) -> Sequence[Node]:
        """All servers that were used and may still have calls."""
        return list(self._nodes.values())

    @property
    def masters(self) -> Sequence[Node]:
        """The servers that together have all keys."""
        return [self._node(address) for address in dict.fromkeys(self._masters.values())]

    def master_of(self, key: str) -> Node:
        """Return the master of a key. Raises `ClusterDownError` of redis-py if there is none."""
        number = slot(tag_in(key))
        address = next((address for slots, address in self._masters.items() if number in slots), None)
        if address is None:
            raise redis.exceptions.ClusterDownError("CLUSTERDOWN a slot has no master")
        return self._node(address)

    @property
    def volleys(self) -> int:
        """One volley: while Python handles it, other masters run theirs. Two would make smaller batches."""
        return 1

    # The topology.

    async def ready(self) -> None:
        """Wait until the topology is known, and the layout is checked.

        Raises `SessionError` if the keys have another layout, and the errors of redis-py.
        """
        if not self._known:
            async with self._lock:
                while not self._known:
                    patience = self._patience
                    try:
                        await self._look()
                    except TimeoutError:
                        if self._patience <= patience:  # Otherwise the next look has more.
                            raise

    async def confirm(self, node: Node) -> bool:
        """Ask each replica of a server for the topology, then any server: a replica that took over knows that first.

        If none answers, the server stays the master.
        """
        replicas = [self._replicas.get(address, []) for address, one in self._nodes.items() if one is node]
        async with self._lock:
            for candidates in (*([replica] for replica in itertools.chain(*replicas)), None):
                self._doubts.add(node)
                with contextlib.suppress(Exception):  # Also of a hook of the user.
                    await self._look(candidates)
                if node not in self.owners:
                    return False
        return True

    def doubt(self, node: Node) -> None:
        """Look at the topology soon: a server does not answer, does not work, or does not have a partition."""
        self._doubts.add(node)
        if self._looking is None and self._known:
            self._looking = asyncio.Task(self._look_soon(), loop=self.loop, context=contextvars.Context())
            self._looking.add_done_callback(self._looked, context=contextvars.Context())

    async def aclose(self) -> None:
        """Close the connections, and wait until they are closed."""
        looking = self._looking
        self.close()
        if looking:
            await asyncio.wait([looking])
        for node in self.nodes:
            await node.aclose()

    def close(self) -> None:
        """Close the connections. Calls without a reply get `StoreUnavailable`."""
        self._known = []  # So `doubt` starts no other look at the topology.
        if self._looking:
            self._looking.cancel()
        for node in self.nodes:
            node.close()

    async def _look_soon(self) -> None:
        await asyncio.sleep(self._pause)
        before = list(self.owners)
        with contextlib.suppress(Exception):  # Also of a hook of the user. The next look may succeed.
            async with self._lock:
                await self._look()
        self._pause = _PAUSE if self.owners != before else min(self._pause * 2, _LONG_PAUSE)

    def _looked(self, _: asyncio.Task[None]) -> None:
        self._looking = None

    async def _look(self, candidates: Iterable[_Address] | None = None) -> None:
        """Ask a server for the topology, and move the waiting calls to the masters of their partitions.

        *candidates*: the servers to try. None: all that are known.
        """
        doubts, self._doubts = self._doubts, set()
        error: Exception | None = None
        for address in self._candidates(doubts) if candidates is None else candidates:
            node, began = self._node(address), self.loop.time()
            try:
                async with asyncio.timeout(self._patience), connected(node) as connection:
                    masters, replicas = self._read(address[0], await ask(connection, "CLUSTER", "SLOTS"))
            except Exception as failure:  # noqa: BLE001 - another server may give a topology that can be read
                if not isinstance(error, TimeoutError):  # It may answer if more patience is given.
                    error = failure
                if isinstance(failure, TimeoutError) and not self._known:
                    self._patience = min(2 * self._patience, _LONG_PATIENCE)
                continue
            self._patience = min(max(_PATIENCE, 3 * (self.loop.time() - began)), _LONG_PATIENCE)
            if masters:
                await self._adopt(masters, replicas)
                return
        if candidates is None and self._known and isinstance(error, TimeoutError):
            self._patience = min(2 * self._patience, _LONG_PATIENCE)
        raise error or redis.exceptions.ConnectionError("no server of the cluster is known")

    def _candidates(self, doubts: set[Node]) -> Iterator[_Address]:
        """Iterate over the addresses of the servers that may report the topology, the most promising first."""
        addresses = dict.fromkeys([*random.sample(self._known, len(self._known)), *self._seeds])
        doubtful = {address for address, node in self._nodes.items() if node in doubts}
        yield from sorted(addresses, key=doubtful.__contains__)

    def _read(self, host: str, ranges: list[Any]) -> tuple[dict[range, _Address], dict[_Address, list[_Address]]]:
        """Return the master of each range of slots, and the replicas of each master, by the server at *host*."""
        masters: dict[range, _Address] = {}
        replicas: dict[_Address, list[_Address]] = {}
        for first, last, *servers in ranges:
            addresses = [self._remap(name.decode() or host if name else host, port) for name, port, *_ in servers]
            masters[range(first, last + 1)] = addresses[0]
            replicas[addresses[0]] = addresses[1:]
        return masters, replicas

    async def _adopt(self, masters: dict[range, _Address], replicas: dict[_Address, list[_Address]]) -> None:
        """Note a topology. A partition without a master in it keeps its last one."""
        self._masters = masters
        if not self._known:
            await self._open()
        self._known = list(dict.fromkeys(itertools.chain(replicas, *replicas.values())))
        self._replicas = replicas
        for partition, number in enumerate(self._slots):
            for slots, address in masters.items():
                if number in slots:
                    self.owners[partition] = self._node(address)
        self._move_calls()
        self._forget()

    async def _open(self) -> None:
        """Compare the store with those before it."""
        if self._description is None:
            return
        try:
            await open_store(self._layout, self._description, self.master_of)
        except redis.exceptions.AskError as error:  # MovedError is a kind of it.
            raise redis.exceptions.TryAgainError("TRYAGAIN the slot of the meta key moves") from error

    def _move_calls(self) -> None:
        """Move the waiting calls to the masters of their partitions."""
        for node in self.nodes:
            gone = {partition for partition, owner in enumerate(self.owners) if owner is not node}
            if len(gone) == len(self.owners):
                node.watch.leave()
            for number, lane in enumerate(node.lanes):
                for batch in lane.release(gone):
                    self.owners[batch.queue.kind[1]].lanes[number].accept(batch)

    def _forget(self) -> None:
        """Close the connections to servers that have left the cluster, and have no call."""
        for address, node in list(self._nodes.items()):
            if address not in self._known and node not in self.owners and not any(any(lane) for lane in node.lanes):
                del self._nodes[address]
                node.close()

    def _remap(self, host: str, port: int) -> _Address:
        return self._client.nodes_manager.remap_host_port(host, int(port))

    def _node(self, address: _Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            options = dict(self._client.get_connection_kwargs())
            kind = cast("type[AbstractConnection]", options["connection_class"])
            for name in _NOT_OURS:
                options.pop(name, None)
            options.update(host=address[0], port=address[1], socket_timeout=None)
            pool = ConnectionPool(connection_class=kind, **options)
            node = Node(pool.make_connection, self._scripts, self._layout, self._timeout, self)
            self._nodes[address] = node
        return node

    # Refused calls.

    def redirect(self, lane: Lane, batch: Batch, error: Exception) -> bool:
        """Put the calls of a batch that a server refused where they belong. Return False if they stay in their lane."""
        code, (operation, partition, shared) = code_of(error), batch.queue.kind
        if code == "MOVED":
            self.owners[partition] = self._named(error, lane.node)
            self.doubt(lane.node)
            self._return(lane, batch, error)
        elif code == "ASK" and len(batch.calls) == 1 and not operation.on_owner:
            asked = Batch(Queue((asking(operation), partition, shared)), batch.calls)
            self._named(error, lane.node).lanes[lane.number].accept(asked)
        elif code == "ASK" or code in ("TRYAGAIN", LATER):
            self._wait(lane, batch, error)
        else:
            if code not in _TROUBLE:
                return False
            self.doubt(lane.node)
            if not operation.on_owner:
                return False
            self._return(lane, batch, error)
        return True

    def _wait(self, lane: Lane, batch: Batch, error: Exception) -> None:
        """Send the calls of a moving partition again, one by one. A call that was alone waits for the move.

        A batch needs keys of both masters, where one session may need only those of one. A batch never follows ASK,
        because Redis 6.2 also answers ASK if it still has some of the keys. Under ASKING, these would seem absent.
        """
        operation, partition, _ = batch.queue.kind
        # The scripts raise LATER before they write. Another error for such a key may come after a write.
        wrote = code_of(error) == LATER and LATER not in str(error)
        if wrote and not operation.repeatable:
            for call in batch.calls:
                call.fail(with_cause(StoreUnavailable("the slot moved: it is not known what was done"), error))
            return
        for call in batch.calls if wrote else ():
            call.losses = call.losses or 1  # It may have made its session here, so it must not make another elsewhere.
        self.split[partition] = self.loop.time() + _SPLIT
        if len(batch.calls) > 1:
            lane.accept(batch)
        elif operation.anywhere and not batch.calls[0].losses:
            batch.calls[0].fail(Elsewhere())
        else:
            self._return(lane, batch, error)

    def _return(self, lane: Lane, batch: Batch, error: Exception) -> None:
        """Put the calls of a batch into the lane of their master."""
        operation, partition, shared = batch.queue.kind
        plain = Batch(Queue((operation.on_owner or operation, partition, shared)), batch.calls)
        self.owners[partition].lanes[lane.number].accept(plain, error)

    def _named(self, error: Exception, node: Node) -> Node:
        """Return the server that an error of *node* names: "MOVED 42 127.0.0.1:7001". No host means the same host."""
        host, _, port = str(error).split()[2].rpartition(":")
        own = next(address for address, other in self._nodes.items() if other is node)
        return self._node(self._remap(host or own[0], int(port)))
