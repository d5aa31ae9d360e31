"""The same work on sessions, done by this library and by others: a session has three fields, two of them references."""

import asyncio
import functools
import json
import secrets
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from aiohttp_session import Session
from aiohttp_session.redis_storage import RedisStorage
from litestar.serialization import decode_json, encode_json
from litestar.stores.redis import RedisStore as LitestarStore
from redis.asyncio import Redis
from starsessions.serializers import JsonSerializer
from starsessions.stores.redis import RedisStore as StarsessionsStore

from rss import SessionStore
from rss.scripts import SCRIPTS

#: What every key has in it, so that it is known which to remove: the server may be somebody's.
RUN = f"bench-{secrets.token_hex(4)}"
MAX_AGE = 28 * 86400
REFERENCES = ("user_id", "ip")


@functools.cache
def session_id(n: int) -> str:
    """Return the id of the n-th session, as long as a real one."""
    return f"{n:032d}"


class Contender:
    """One way to keep sessions, with a client and a prefix of its own."""

    name: ClassVar[str]
    #: What it does not do.
    lacks: ClassVar[str] = ""
    #: What is measured.
    operations: ClassVar[Sequence[str]] = ("get", "set")

    def __init__(self, url: str, prefix: str) -> None:
        """Make a client; it connects when it is used."""
        self.client = Redis.from_url(url, max_connections=2000)
        self.prefix = prefix
        #: Fields that every session has besides.
        self.more: dict[str, str] = {}

    def values(self, n: int, visits: int) -> dict[str, Any]:
        """Return what the n-th session holds."""
        return {"user_id": n // 2, "ip": f"10.0.{n // 250}.{n % 250}", "visits": visits, **self.more}

    async def aclose(self) -> None:
        """Close the client."""
        await self.client.aclose()

    async def get(self, n: int) -> Any:
        """Read the n-th session."""
        raise NotImplementedError

    async def set(self, n: int, visits: int) -> Any:
        """Write all fields of the n-th session: one of them changes, which is no reference."""
        raise NotImplementedError


class Nothing(Contender):
    """What the harness itself costs."""

    name = "no-op: the harness"
    lacks = "everything"

    async def get(self, n: int) -> Any:
        """Do nothing."""

    async def set(self, n: int, visits: int) -> Any:
        """Do nothing, but make the values."""
        self.values(n, visits)


class Coalesced(Contender):
    """The library as it is."""

    name = "redis-session-sets"
    operations = ("get", "set", "touch", "create", "delete")

    def __init__(self, url: str, prefix: str) -> None:
        """Make a store."""
        super().__init__(url, prefix)
        self.store = SessionStore.from_url(url, references=REFERENCES, prefix=prefix)

    async def aclose(self) -> None:
        """Close the store too."""
        await self.store.aclose()
        await super().aclose()

    async def get(self, n: int) -> Any:
        """Read it with its types."""
        return await self.store.get(session_id(n))

    async def set(self, n: int, visits: int) -> Any:
        """Write it, and keep its references."""
        return await self.store.set(session_id(n), self.values(n, visits))

    async def touch(self, n: int) -> Any:
        """Renew the n-th session."""
        return await self.store.touch(session_id(n))

    async def create(self, n: int) -> Any:
        """Make another session of the n-th user: it joins reference sets."""
        return await self.store.create(self.values(n, 0))

    async def delete(self, n: int) -> Any:
        """End the n-th session: it leaves them."""
        return await self.store.delete(session_id(n))


class Single(Coalesced):
    """The library with coalescing off."""

    name = "redis-session-sets, not coalesced"
    lacks = "coalescing"

    def __init__(self, url: str, prefix: str) -> None:
        """Send each call alone, all at once, on as many connections as redis-py has."""
        super().__init__(url, prefix)
        self.store = SessionStore(self.client, references=REFERENCES, prefix=prefix)
        self.store._calls.max_batch, self.store._calls.max_in_flight = 1, 2000


class Plain(Coalesced):
    """The library's scripts through redis-py: encoding and decoding are the same, the way to Redis is not."""

    name = "redis-py, the same scripts"
    lacks = "coalescing, a deadline, repetition"

    def __init__(self, url: str, prefix: str) -> None:
        """Call each script by EVALSHA, on a connection of redis-py's pool."""
        super().__init__(url, prefix)
        self.shas: dict[str, str] = {}
        self.head = self.store._calls._head
        self.store._calls = self  # type: ignore[assignment]

    async def drain(self) -> None:
        """Do nothing: no call waits for another."""

    async def run(
        self,
        name: str,
        keys: Sequence[str],
        args: Sequence[str],
        *,
        shared: Sequence[str] = (),
        repeatable: bool = True,
    ) -> Any:
        """Run a script for one session."""
        del repeatable
        if name not in self.shas:
            self.shas[name] = await self.client.script_load(SCRIPTS[name])
        (reply,) = await self.client.evalsha(self.shas[name], len(keys), *keys, *self.head, *shared, *args)
        return reply


class Original(Contender):
    """The algorithm of the Node package: what it writes with, MULTI."""

    name = "the original's algorithm, redis-py"
    lacks = "types; removing old references; TTLs of sets; refusing late writes"
    operations = ("get", "set", "touch")

    def key(self, n: int) -> str:
        """Return the key of a session."""
        return f"{self.prefix}:{{{session_id(n)}}}"

    async def get(self, n: int) -> Any:
        """HGETALL."""
        held: dict[bytes, bytes] = await self.client.hgetall(self.key(n))  # type: ignore[assignment]
        return {field.decode(): value.decode() for field, value in held.items()}

    async def set(self, n: int, visits: int) -> Any:
        """HSET, PEXPIRE and a SADD for each reference in MULTI."""
        held: Any = {"id": session_id(n), **self.values(n, visits)}
        async with self.client.pipeline(transaction=True) as multi:
            multi.hset(self.key(n), mapping=held)
            multi.pexpire(self.key(n), MAX_AGE * 1000)
            for field in REFERENCES:
                multi.sadd(f"{self.prefix}:{field}:{{{held[field]}}}", session_id(n))
            await multi.execute()

    async def touch(self, n: int) -> Any:
        """PEXPIRE."""
        return await self.client.pexpire(self.key(n), MAX_AGE * 1000)


class Blob(Contender):
    """What applications write themselves: the session is one JSON text."""

    name = "GET and SET of JSON"
    lacks = "references; writing single fields"

    async def get(self, n: int) -> Any:
        """GET."""
        return json.loads(cast("bytes", await self.client.get(self.prefix + session_id(n))))

    async def set(self, n: int, visits: int) -> Any:
        """SET."""
        await self.client.set(self.prefix + session_id(n), json.dumps(self.values(n, visits)), ex=MAX_AGE)


class Starsessions(Contender):
    """Sessions for Starlette and FastAPI: its Redis store and JSON serializer."""

    name = "starsessions"
    lacks = "references; writing single fields; refusing late writes"

    def __init__(self, url: str, prefix: str) -> None:
        """Make its store."""
        super().__init__(url, prefix)
        self.store = StarsessionsStore(connection=self.client, prefix=prefix)
        self.serializer = JsonSerializer()

    async def get(self, n: int) -> Any:
        """Read all of it."""
        return self.serializer.deserialize(await self.store.read(session_id(n), MAX_AGE))

    async def set(self, n: int, visits: int) -> Any:
        """Write all of it."""
        await self.store.write(session_id(n), self.serializer.serialize(self.values(n, visits)), MAX_AGE, MAX_AGE)


class AiohttpSession(Contender):
    """Sessions for aiohttp: its Redis storage, with a request and a response for each session."""

    name = "aiohttp-session"
    lacks = "references; writing single fields; refusing late writes (but it sets the cookie)"

    def __init__(self, url: str, prefix: str) -> None:
        """Make its storage."""
        super().__init__(url, prefix)
        self.storage = RedisStorage(self.client, cookie_name=prefix, max_age=MAX_AGE)
        self.requests: dict[int, tuple[web.Request, web.Response]] = {}

    def exchange(self, n: int) -> tuple[web.Request, web.Response]:
        """Return the request that brings the n-th session's cookie, and the response to it."""
        if n not in self.requests:
            cookie = {"Cookie": f"{self.prefix}={session_id(n)}"}
            self.requests[n] = make_mocked_request("GET", "/", headers=cookie), web.Response()
        return self.requests[n]

    async def get(self, n: int) -> Any:
        """Read all of it."""
        return await self.storage.load_session(self.exchange(n)[0])

    async def set(self, n: int, visits: int) -> Any:
        """Write all of it."""
        held = Session(
            session_id(n), data={"session": self.values(n, visits), "created": 0}, new=False, max_age=MAX_AGE
        )
        await self.storage.save_session(*self.exchange(n), held)


class Litestar(Contender):
    """Sessions for Litestar: its Redis store and JSON serializer."""

    name = "Litestar"
    lacks = "references; writing single fields; refusing late writes"

    def __init__(self, url: str, prefix: str) -> None:
        """Make its store."""
        super().__init__(url, prefix)
        self.store = LitestarStore(self.client, namespace=prefix)

    async def get(self, n: int) -> Any:
        """Read all of it."""
        data = await self.store.get(session_id(n))
        return data and decode_json(data)

    async def set(self, n: int, visits: int) -> Any:
        """Write all of it."""
        await self.store.set(session_id(n), encode_json(self.values(n, visits)), expires_in=MAX_AGE)


OURS: Sequence[type[Coalesced]] = (Coalesced, Single, Plain)
PEERS: Sequence[type[Contender]] = (Original, Starsessions, AiohttpSession, Litestar, Blob)
ALL: Sequence[type[Contender]] = (*OURS, *PEERS, Nothing)


async def prepare(contender: Contender, numbers: range) -> None:
    """Make sessions, a hundred at a time. *contender* is one with the same prefix, the fastest."""
    for start in range(numbers.start, numbers.stop, 100):
        await asyncio.gather(*(contender.set(n, 0) for n in range(start, min(start + 100, numbers.stop))))
