"""The same operations, done by the session stores of other libraries, as far as each has the operation."""

from collections.abc import Awaitable, Sequence
from typing import Any

from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from aiohttp_session import Session
from aiohttp_session.redis_storage import RedisStorage
from litestar.serialization import decode_json, encode_json
from litestar.stores.redis import RedisStore as LitestarStore
from redis_fastapi import RedisSessionStore, SessionRecord, SessionState
from starsessions.serializers import JsonSerializer
from starsessions.stores.redis import RedisStore as StarsessionsStore

from benchmarks.contenders import MAX_AGE, Client, Whole


class Starsessions(Whole):
    """Sessions for Starlette and FastAPI: its Redis store and its JSON serializer."""

    name = "starsessions"
    lacks = "references; writing single fields; refusing late writes"

    def __init__(self, url: str, prefix: str, padding: int = 0) -> None:
        """Make the store of the library."""
        super().__init__(url, prefix, padding)
        self.store = StarsessionsStore(connection=self.client, prefix=prefix)
        self.serializer = JsonSerializer()

    async def get(self, n: int) -> Any:
        """Read and parse a session."""
        return self.serializer.deserialize(await self.store.read(self.ids[n], MAX_AGE))

    def delete(self, n: int) -> Awaitable[Any]:
        """Remove a session."""
        return self.store.remove(self.ids[n])

    def write(self, session_id: str, n: int) -> Awaitable[Any]:
        """Write a whole session."""
        return self.store.write(session_id, self.serializer.serialize(self.values(n)), MAX_AGE, MAX_AGE)


class AiohttpSession(Whole):
    """Sessions for aiohttp: its Redis storage, with a request that brings the cookie."""

    name = "aiohttp-session"
    lacks = "references; writing single fields; refusing late writes (but it sets the cookie)"

    def __init__(self, url: str, prefix: str, padding: int = 0) -> None:
        """Make the storage of the library."""
        super().__init__(url, prefix, padding)
        self.storage = RedisStorage(self.client, cookie_name=prefix, max_age=MAX_AGE)
        self.requests: dict[int, web.Request] = {}
        self.exchange = make_mocked_request("GET", "/"), web.Response()

    async def fill(self, numbers: Sequence[int]) -> None:
        """Make a request with the cookie of each session, too."""
        await super().fill(numbers)
        for n in numbers:
            cookie = {"Cookie": f"{self.prefix}={self.ids[n]}"}
            self.requests[n] = make_mocked_request("GET", "/", headers=cookie)

    def get(self, n: int) -> Awaitable[Any]:
        """Load a session."""
        return self.storage.load_session(self.requests[n])

    def write(self, session_id: str, n: int) -> Awaitable[Any]:
        """Write a whole session."""
        data: Any = {"session": self.values(n), "created": 0}
        session = Session(session_id, data=data, new=False, max_age=MAX_AGE)
        return self.storage.save_session(*self.exchange, session)


class Litestar(Whole):
    """Sessions for Litestar: its Redis store and its JSON serializer."""

    name = "Litestar"
    lacks = "references; writing single fields; refusing late writes"

    def __init__(self, url: str, prefix: str, padding: int = 0) -> None:
        """Make the store of the library."""
        super().__init__(url, prefix, padding)
        self.store = LitestarStore(self.client, namespace=prefix)

    async def get(self, n: int) -> Any:
        """Read and parse a session."""
        data = await self.store.get(self.ids[n])
        return data and decode_json(data)

    def delete(self, n: int) -> Awaitable[Any]:
        """Remove a session."""
        return self.store.delete(self.ids[n])

    def write(self, session_id: str, n: int) -> Awaitable[Any]:
        """Write a whole session."""
        return self.store.set(session_id, encode_json(self.values(n)), expires_in=MAX_AGE)


class FastapiRedisSdk(Client):
    """Sessions for FastAPI: `RedisSessionStore` of fastapi-redis-sdk, called as its middleware calls it.

    The store needs HEXPIRE, which is new in Redis 7.4 and Valkey 9.
    """

    name = "fastapi-redis-sdk"
    lacks = "more than one reference; writing single fields; refusing late writes; one atomic step"

    def __init__(self, url: str, prefix: str, padding: int = 0) -> None:
        """Make the store of the library."""
        super().__init__(url, prefix, padding)
        self.store = RedisSessionStore(self.client, key_prefix=prefix, idle_ttl=MAX_AGE, absolute_ttl=MAX_AGE)

    async def get(self, n: int) -> Any:
        """Load a session without renewing it."""
        loaded = await self.store.load(self.ids[n], refresh=False)
        assert loaded is not None
        return loaded.record.data

    async def set(self, n: int) -> None:
        """Save a whole session, and its entry in the index."""
        record = self.store.new_record(self.values(n), created=0)
        await self.store.save(self.ids[n], record)
        await self._index(self.ids[n], n, record)

    def touch(self, n: int) -> Awaitable[Any]:
        """Renew a session."""
        return self.store.touch(self.ids[n])

    async def create(self, n: int) -> str:
        """Create a session, and add it to the index."""
        session_id = self.store.new_id()
        record = self.store.new_record(self.values(n))
        await self.store.create(session_id, record)
        await self._index(session_id, n, record)
        return session_id

    def delete(self, n: int) -> Awaitable[Any]:
        """Revoke a session: remove it and its entry in the index."""
        return self.store.revoke(self._state(n))

    async def rotate(self, n: int) -> None:
        """Remove a session and its entry, and create both again."""
        self.ids[n] = await self.store.rotate(self._state(n))

    def _state(self, n: int) -> SessionState:
        return SessionState(self.values(n), self.ids[n], str(self.user(n)), 0, MAX_AGE)

    def _index(self, session_id: str, n: int, record: SessionRecord) -> Awaitable[None]:
        return self.store.index(str(self.user(n)), session_id, record, absolute_remaining=MAX_AGE)
