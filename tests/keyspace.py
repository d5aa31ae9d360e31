"""A look at everything a store has in Redis."""

from redis.asyncio import Redis

#: A session or tombstone as its fields, a reference set as its ids; anything else as its type.
Content = dict[str, str] | set[str] | str


#: A reference set may live so many times as long as its longest-lived member.
SLACK = 33 / 32


class Keyspace:
    """All keys that begin with a prefix."""

    def __init__(self, client: Redis, prefix: str) -> None:
        """Take a client that decodes responses."""
        self.client = client
        self.prefix = prefix

    async def keys(self) -> list[str]:
        """Return the names of all keys."""
        return sorted([key async for key in self.client.scan_iter(match=f"{self.prefix}:*", count=1000)])

    async def dump(self) -> dict[str, Content]:
        """Return all keys, without prefix and colon, and what they hold, but for what is noted of its times.

        Fails if a key has no TTL, or a session does not say when it was created.
        """
        found: dict[str, Content] = {}
        for key in await self.keys():
            kind = await self.client.type(key)
            name = key.removeprefix(self.prefix + ":")
            if kind == "hash":
                fields = {str(k): str(v) for k, v in (await self.client.hgetall(key)).items()}
                if "id" in fields:
                    assert int(fields.pop("_created")) > 0
                    assert int(fields.pop("_max_age", "1")) > 0
                found[name] = fields
            elif kind == "set":
                found[name] = {str(member) for member in await self.client.smembers(key)}
            else:
                found[name] = str(kind)
            assert await self.client.pttl(key) > 0, f"the key {name} has no TTL"
        return found

    async def ttl(self, name: str) -> int:
        """Return the TTL of a key, named as in a dump, in milliseconds."""
        return int(await self.client.pttl(f"{self.prefix}:{name}"))

    async def expire(self, name: str) -> None:
        """Let a key expire, named as in a dump, as Redis does it in its own time."""
        await self.client.pexpire(f"{self.prefix}:{name}", 1)
        while await self.client.exists(f"{self.prefix}:{name}"):
            pass

    async def shorten(self, milliseconds: int) -> None:
        """Take that from the TTL of every session, as if it had been renewed so much earlier."""
        for key in await self.keys():
            if not key.startswith(f"{self.prefix}:{{"):
                continue
            await self.client.pexpire(key, await self.client.pttl(key) - milliseconds)

    async def clear(self) -> None:
        """Remove all keys."""
        if keys := await self.keys():
            await self.client.unlink(*keys)
