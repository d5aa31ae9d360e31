"""The same operations on sessions, done by this library, by redis-py, and by the algorithm of the Node original.

A session has three fields. Two of them are references, each with a set of session ids for each value.
"""

import asyncio
import itertools
import json
import secrets
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rss import Reference, SessionStore

OPERATIONS = ("get", "set", "move", "touch", "rotate", "create", "delete")
MAX_AGE = 28 * 86400
REFERENCES = ("user_id", "ip")
_MILLISECONDS = str(MAX_AGE * 1000)
_ELSEWHERE = 2**20


def new_id() -> str:
    """Return a session id as this library makes it."""
    return secrets.token_urlsafe(24)


class Contender:
    """One way to keep sessions. A subclass has a method for each of OPERATIONS that it can do; all can `create`.

    * get: read a session.
    * set: write all fields; one that is no reference has changed.
    * move: write all fields; one of the two references has changed, too.
    * touch: renew a session.
    * delete: end a session.
    * rotate: give a session another id.
    """

    name: ClassVar[str]
    #: The features that a contender lacks, for the reader of the results.
    lacks: ClassVar[str] = ""

    def __init__(self, url: str, prefix: str, padding: int = 0) -> None:
        """Prepare a client. *padding*: bytes of one more field, if not 0."""
        self.url = url
        self.prefix = prefix
        self.more = {"note": "x" * padding} if padding else {}
        #: How many sessions share a value of each reference.
        self.sharing: tuple[int, int] = (10, 20)
        self.ids: dict[int, str] = {}
        self.moved: set[int] = set()
        self._visits = itertools.count()

    @classmethod
    def operations(cls) -> list[str]:
        """Return the operations that the contender can do."""
        return [name for name in OPERATIONS if hasattr(cls, name)]

    async def aclose(self) -> None:
        """Close all connections."""

    def create(self, n: int) -> Awaitable[str]:
        """Make a session with the values of the n-th and return its id."""
        raise NotImplementedError

    async def fill(self, numbers: Sequence[int]) -> None:
        """Make these sessions, a hundred at a time; forget those that were made before."""
        self.ids, self.moved = {}, set()
        for start in range(0, len(numbers), 100):
            some = numbers[start : start + 100]
            self.ids.update(zip(some, await asyncio.gather(*(self.create(n) for n in some)), strict=True))

    def values(self, n: int) -> dict[str, Any]:
        """Return the values of the n-th session, with a new number of visits."""
        return {"user_id": self.user(n), "ip": self.address(n), "visits": next(self._visits), **self.more}

    def user(self, n: int) -> int:
        """Return the first reference of the n-th session."""
        return n // self.sharing[0]

    def address(self, n: int) -> str:
        """Return the second reference of the n-th session, an address."""
        host = n // self.sharing[1] + (_ELSEWHERE if n in self.moved else 0)
        return f"10.{host >> 16}.{host >> 8 & 255}.{host & 255}"

    def move_away(self, n: int) -> None:
        """Change the second reference of the n-th session, or change it back."""
        self.moved ^= {n}


class Store(Contender):
    """The library itself."""

    name = "redis-session-sets"

    def __init__(
        self,
        url: str,
        prefix: str,
        padding: int = 0,
        references: Iterable[str] | Mapping[str, Reference] = REFERENCES,
        **options: Any,
    ) -> None:
        """Make a store. *options*: more arguments of the store."""
        super().__init__(url, prefix, padding)
        self.store: SessionStore = SessionStore.from_url(url, references=references, prefix=prefix, **options)

    async def aclose(self) -> None:
        """Close the store."""
        await self.store.aclose()

    def get(self, n: int) -> Awaitable[Any]:
        """Read a session."""
        return self.store.get(self.ids[n])

    def set(self, n: int) -> Awaitable[Any]:
        """Write all fields."""
        return self.store.set(self.ids[n], self.values(n))

    def move(self, n: int) -> Awaitable[Any]:
        """Write all fields, one reference with another value."""
        self.move_away(n)
        return self.store.set(self.ids[n], self.values(n))

    def touch(self, n: int) -> Awaitable[Any]:
        """Renew a session."""
        return self.store.touch(self.ids[n])

    def create(self, n: int) -> Awaitable[str]:
        """Make a session, in both reference sets."""
        return self.store.create(self.values(n))

    def delete(self, n: int) -> Awaitable[Any]:
        """End a session, which leaves both reference sets."""
        return self.store.delete(self.ids[n])

    async def rotate(self, n: int) -> None:
        """Give a session another id."""
        self.ids[n] = await self.store.rotate(self.ids[n])


class Client(Contender):
    """A contender that uses redis-py directly."""

    def __init__(self, url: str, prefix: str, padding: int = 0) -> None:
        """Make a client with a connection for each task."""
        super().__init__(url, prefix, padding)
        self.client = Redis.from_url(url, max_connections=1000)

    async def aclose(self) -> None:
        """Close the client."""
        await self.client.aclose()

    def key(self, session_id: str) -> str:
        """Return the key of a session."""
        return f"{self.prefix}:{{{session_id}}}"

    def sets(self, n: int) -> list[str]:
        """Return the keys of the n-th session's reference sets."""
        return [f"{self.prefix}:user_id:{{{self.user(n)}}}", f"{self.prefix}:ip:{{{self.address(n)}}}"]


class Whole(Client):
    """A contender that always writes a whole session."""

    def write(self, session_id: str, n: int) -> Awaitable[Any]:
        """Write the values of the n-th session under an id."""
        raise NotImplementedError

    def set(self, n: int) -> Awaitable[Any]:
        """Write under the same id."""
        return self.write(self.ids[n], n)

    async def create(self, n: int) -> str:
        """Write under a new id."""
        session_id = new_id()
        await self.write(session_id, n)
        return session_id


# Each script does what the operation needs and nothing else: no checks, no TTLs of sets, no tombstones.
_SCRIPTS = {
    "get": "return redis.call('HGETALL', KEYS[1])",
    "set": """
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('PEXPIRE', KEYS[1], ARGV[1])""",
    "move": """
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('SREM', KEYS[2], ARGV[2])
redis.call('SADD', KEYS[3], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[1])""",
    "touch": "return redis.call('PEXPIRE', KEYS[1], ARGV[1])",
    "create": """
redis.call('HSET', KEYS[1], 'id', ARGV[2], unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('SADD', KEYS[3], ARGV[2])""",
    "delete": """
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('SREM', KEYS[3], ARGV[1])""",
    "rotate": """
redis.call('RENAME', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[2], 'id', ARGV[2])
for i = 3, 4 do
  redis.call('SREM', KEYS[i], ARGV[1])
  redis.call('SADD', KEYS[i], ARGV[2])
end""",
}


class _Scripts(Client):
    """A minimal script for each operation, with values as JSON, as an application would write them itself."""

    lacks = (
        "batches; deadlines; repetition; refusing late writes; TTLs of sets; "
        "finding the sets of a session: the caller must know its references"
    )

    def run(self, script: str, keys: Sequence[str], args: Sequence[str]) -> Awaitable[Any]:
        """Run one of _SCRIPTS."""
        raise NotImplementedError

    def fields(self, n: int) -> list[str]:
        """Return fields and values in turn."""
        flat: list[str] = []
        for field, value in self.values(n).items():
            flat += (field, json.dumps(value))
        return flat

    async def get(self, n: int) -> Any:
        """HGETALL."""
        flat = iter(await self.run("get", [self.key(self.ids[n])], ()))
        held = {field.decode(): value for field, value in zip(flat, flat, strict=True)}
        return {field: value.decode() if field == "id" else json.loads(value) for field, value in held.items()}

    def set(self, n: int) -> Awaitable[Any]:
        """HSET and PEXPIRE."""
        return self.run("set", [self.key(self.ids[n])], [_MILLISECONDS, *self.fields(n)])

    def move(self, n: int) -> Awaitable[Any]:
        """HSET, SREM, SADD and PEXPIRE."""
        _, old = self.sets(n)
        self.move_away(n)
        _, new = self.sets(n)
        return self.run("move", [self.key(self.ids[n]), old, new], [_MILLISECONDS, self.ids[n], *self.fields(n)])

    def touch(self, n: int) -> Awaitable[Any]:
        """PEXPIRE."""
        return self.run("touch", [self.key(self.ids[n])], [_MILLISECONDS])

    async def create(self, n: int) -> str:
        """HSET, PEXPIRE and two SADD."""
        session_id = new_id()
        await self.run("create", [self.key(session_id), *self.sets(n)], [_MILLISECONDS, session_id, *self.fields(n)])
        return session_id

    def delete(self, n: int) -> Awaitable[Any]:
        """DEL and two SREM."""
        return self.run("delete", [self.key(self.ids[n]), *self.sets(n)], [self.ids[n]])

    async def rotate(self, n: int) -> None:
        """RENAME, HSET, two SREM and two SADD."""
        old, new = self.ids[n], new_id()
        await self.run("rotate", [self.key(old), self.key(new), *self.sets(n)], [old, new])
        self.ids[n] = new


class RegisterScript(_Scripts):
    """redis-py, used as its documentation says."""

    name = "redis-py, register_script"

    def __init__(self, url: str, prefix: str, padding: int = 0) -> None:
        """Register the scripts."""
        super().__init__(url, prefix, padding)
        self.scripts = {name: self.client.register_script(text) for name, text in _SCRIPTS.items()}

    def run(self, script: str, keys: Sequence[str], args: Sequence[str]) -> Awaitable[Any]:
        """Call the script's object."""
        return self.scripts[script](keys=keys, args=args)


class EvalSha(_Scripts):
    """redis-py at its fastest: EVALSHA at once, without the timeouts and retries of redis-py."""

    name = "redis-py, evalsha"

    def __init__(self, url: str, prefix: str, padding: int = 0) -> None:
        """Make another client; `fill` loads the scripts."""
        super().__init__(url, prefix, padding)
        self.client = Redis.from_url(url, max_connections=1000, socket_timeout=None, retry=Retry(NoBackoff(), 0))
        self.shas: dict[str, str] = {}

    def run(self, script: str, keys: Sequence[str], args: Sequence[str]) -> Awaitable[Any]:
        """Call EVALSHA."""
        return self.client.evalsha(self.shas[script], len(keys), *keys, *args)

    async def fill(self, numbers: Sequence[int]) -> None:
        """Load the scripts first."""
        self.shas = {name: await self.client.script_load(text) for name, text in _SCRIPTS.items()}
        await super().fill(numbers)


class Original(Whole):
    """The algorithm of the Node package koa-redis-session-sets, `lib/store.js`.

    `delete` does what the original intends. `node/worker.js` uses the same algorithm.
    """

    name = "the original's algorithm, redis-py"
    lacks = "types; leaving the old set; TTLs of sets; refusing late writes; one atomic step to end a session"

    async def get(self, n: int) -> Any:
        """HGETALL."""
        held: dict[bytes, bytes] = await self.client.hgetall(self.key(self.ids[n]))  # type: ignore[assignment]
        return {field.decode(): value.decode() for field, value in held.items()}

    def move(self, n: int) -> Awaitable[Any]:
        """Write as `set` does: the old set keeps the id."""
        self.move_away(n)
        return self.write(self.ids[n], n)

    def touch(self, n: int) -> Awaitable[Any]:
        """PEXPIRE."""
        return self.client.pexpire(self.key(self.ids[n]), MAX_AGE * 1000)

    async def delete(self, n: int) -> None:
        """HMGET; then DEL and a SREM for each reference in MULTI."""
        session_id = self.ids[n]
        held: list[bytes] = await self.client.hmget(self.key(session_id), list(REFERENCES))  # type: ignore[assignment]
        async with self.client.pipeline(transaction=True) as multi:
            multi.delete(self.key(session_id))
            for field, value in zip(REFERENCES, held, strict=True):
                multi.srem(f"{self.prefix}:{field}:{{{value.decode()}}}", session_id)
            await multi.execute()

    async def write(self, session_id: str, n: int) -> None:
        """HSET, PEXPIRE and a SADD for each reference in MULTI."""
        held: Any = {"id": session_id, **self.values(n)}
        async with self.client.pipeline(transaction=True) as multi:
            multi.hset(self.key(session_id), mapping=held)
            multi.pexpire(self.key(session_id), MAX_AGE * 1000)
            for key in self.sets(n):
                multi.sadd(key, session_id)
            await multi.execute()


class Json(Whole):
    """A session as one JSON text, as applications write it themselves."""

    name = "GET and SET of JSON"
    lacks = "references; writing single fields; refusing late writes"

    async def get(self, n: int) -> Any:
        """GET."""
        text: Any = await self.client.get(self.key(self.ids[n]))
        return json.loads(text)

    def write(self, session_id: str, n: int) -> Awaitable[Any]:
        """SET."""
        return self.client.set(self.key(session_id), json.dumps(self.values(n)), ex=MAX_AGE)


class Nothing(Contender):
    """A contender that does nothing, to measure the cost of the worker itself."""

    name = "nothing: the harness"
    lacks = "everything"

    async def get(self, n: int) -> Any:
        """Do nothing."""

    async def create(self, n: int) -> str:
        """Return an id."""
        return f"{n:032d}"
