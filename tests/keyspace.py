"""A view of all keys that a store has in Redis."""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from redis.asyncio import Redis

from rss.keys import Layout, Partitioned, tags
from tests.servers import everywhere

#: The content of a key: the fields of a hash, the ids in a set, or else the type.
Content = dict[str, str] | set[str] | str


#: A reference set may live as long as its longest-lived member, times SLACK, plus SPARE.
SLACK = 33 / 32
#: Milliseconds; see SLACK.
SPARE = 100

# Reads all keys in one script. On Redis 6.2 and 7.0 time passes inside a script. So the clock is read before and after
# each TTL, until both readings are the same. A key does not vanish during a script: a PTTL of 0 means that it has
# expired.
_LOOK = """
local function clock()
  local time = redis.call("TIME")
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local now = clock()
local function expires(key)
  while true do
    local before = clock()
    local ttl = redis.call("PTTL", key)
    if ttl < 0 then return ttl end
    if ttl == 0 then return now end
    if before == clock() then return before + ttl end
  end
end

local found = { now }
for i, key in ipairs(redis.call("KEYS", ARGV[1])) do
  local kind = redis.call("TYPE", key).ok
  local command = kind == "hash" and "HGETALL" or kind == "set" and "SMEMBERS"
  found[i + 1] = { key, kind, expires(key), command and redis.call(command, key) or {} }
end
return found
"""


def texts(value: object) -> list[str]:
    """Return the texts of the values that a reference field holds."""
    listed: list[object] = value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(str(one) for one in listed))


def parts(layout: Layout, name: str) -> list[str]:
    """Return the names that a snapshot has for a set, or for its fence, in each partition that may have it."""
    if not isinstance(layout, Partitioned):
        return [name]
    field, value = name.removesuffix("}").split(":{", 1)
    return [f"{name}@{partition}" for partition in layout.with_value(field, value)]


@dataclass
class Snapshot:
    """A snapshot of all keys of a store, named as in a dump.

    If the store has partitions, names of sets and fences end with the partition: "user_id:{1}@3".
    """

    #: The time, in milliseconds.
    now: int
    #: The fields of sessions and tombstones, by their ids.
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    #: The ids in reference sets.
    sets: dict[str, set[str]] = field(default_factory=dict)
    #: The fields of fences, by the names of their sets.
    fences: dict[str, dict[str, str]] = field(default_factory=dict)
    #: When each key expires, in milliseconds; -1 means never.
    expires: dict[str, int] = field(default_factory=dict)

    def alive(self) -> dict[str, dict[str, str]]:
        """Return the fields of sessions that are alive."""
        there = {i: fields for i, fields in self.hashes.items() if self.expires[f"{{{i}}}"] > self.now}
        return {i: fields for i, fields in there.items() if "_ended" not in fields and "_arriving" not in fields}

    def copies(self) -> set[str]:
        """Return the ids of sessions that arrive from another partition, or did not get there."""
        return {i for i, fields in self.hashes.items() if "_arriving" in fields}

    def check(self, named: Mapping[str, set[str]], stale: Container[tuple[str, str]]) -> None:
        """Check promises 1 and 2: which ids are in sets, and how long keys live.

        *named*: the sets that each live session must be in, by session id.

        *stale*: pairs of a set and an id that the set may hold because the session with this id has expired.
        """
        endless = {name for name, when in self.expires.items() if when < 0}
        assert not endless, f"keys without a TTL: {endless}"
        members: dict[str, set[str]] = {}
        for session_id, sets in named.items():
            for name in sets:
                members.setdefault(name, set()).add(session_id)
        ends = {session_id: self.expires[f"{{{session_id}}}"] for session_id in named}
        for name in self.sets.keys() | members.keys():
            held, wanted = self.sets.get(name, set()), members.get(name, set())
            lacks = {session_id for session_id in wanted - held if ends[session_id] > self.now}
            assert not lacks, f"{name} lacks {lacks}"
            extra = {session_id for session_id in held - wanted if (name, session_id) not in stale}
            assert not extra, f"{name} holds {extra}"
            late = {session_id for session_id in wanted & held if ends[session_id] > self.expires[name]}
            assert not late, f"{name} expires before {late}"


class Keyspace:
    """All keys that begin with a prefix.

    Its methods name keys as `Plain` does, without prefix and colon. If the store has partitions, a set in several of
    them is one set here.
    """

    def __init__(self, client: Redis, prefix: str, partitions: int | None = None) -> None:
        """Take a client that decodes responses, and the number of partitions of the store."""
        self.client = client
        self.prefix = prefix
        self.partitions = partitions
        self._layout = Partitioned(prefix, 24, partitions) if partitions else None

    def _name(self, key: str) -> str:
        """Return the plain name of a key."""
        name = key.removeprefix(self.prefix + ":")
        if not self._layout:
            return name
        match = re.fullmatch(r"\{\w+\}:(?:s:(.*)|r:((?:_fence:)?[^:]*):(.*))", name, re.DOTALL)
        assert match, f"the key {name} is in no partition"
        return f"{{{match[1]}}}" if match[1] is not None else f"{match[2]}:{{{match[3]}}}"

    def named(self, name: str) -> list[str]:
        """Return the keys with this plain name: one, or one in each partition."""
        if not self._layout:
            return [f"{self.prefix}:{name}"]
        if name.startswith("{"):
            return [self._layout.place(name[1:-1])[0]]
        field, value = name[:-1].split(":{", 1)
        return [self._layout.references([(field, value)], p)[0] for p in range(self._layout.partitions)]

    async def keys(self) -> list[str]:
        """Return the names of all keys, except those that describe the store, which have no TTL."""
        return sorted(key for key in await self._found() if not key.endswith(":_meta"))

    async def _found(self) -> set[str]:
        return {str(key) async for key in self.client.scan_iter(match=f"{self.prefix}:*", count=1000)}

    async def dump(self) -> dict[str, Content]:
        """Return the content of all keys, by their names without prefix and colon.

        The fields _created and _max_age of sessions are left out. Fails if a key has no TTL, or if a session does not
        say when it was created.
        """
        found: dict[str, Content] = {}
        for key in await self.keys():
            kind = await self.client.type(key)
            name = self._name(key)
            if kind == "hash":
                fields = {str(k): str(v) for k, v in (await self.client.hgetall(key)).items()}
                if "id" in fields:
                    assert int(fields.pop("_created")) > 0
                    assert int(fields.pop("_max_age", "1")) > 0
                if fields.get("_ended") == "rotated" and "_to" in fields:  # It has moved to another partition.
                    assert int(fields.pop("_expires")) > 0
                    fields = {"_ended": "rotated"}
                found[name] = fields
            elif kind == "set":
                before = found.get(name, set())
                assert isinstance(before, set)
                found[name] = before | {str(member) for member in await self.client.smembers(key)}
            else:
                found[name] = str(kind)
            assert await self.client.pttl(key) > 0, f"the key {name} has no TTL"
        return found

    async def copies(self) -> list[str]:
        """Return the ids of the sessions that arrive from another partition."""
        return [name[1:-1] for name, held in (await self.dump()).items() if "_arriving" in held]

    async def look(self) -> Snapshot:
        """Return a snapshot of all keys and their content. Fails if a key is neither a hash nor a set.

        The masters of a cluster are not read at the same moment. The time is the latest of theirs.
        """
        found = await everywhere(self.client, "EVAL", _LOOK, 0, f"{self.prefix}:*")
        seen = Snapshot(max(now for now, *_ in found))
        for key, kind, expires, content in [key for _, *keys in found for key in keys]:
            if key.endswith(":_meta"):
                continue
            name = self._name(key)
            seen.expires[name] = expires
            if self._layout and not name.startswith("{"):
                name = f"{name}@{self._partition(key)}"
                seen.expires[name] = seen.expires.pop(self._name(key))
            if kind == "set":
                seen.sets[name] = set(content)
                continue
            assert kind == "hash", f"the key {name} is a {kind}"
            fields = dict(zip(content[::2], content[1::2], strict=True))
            if name.startswith("_fence:"):
                seen.fences[name.removeprefix("_fence:")] = fields
            else:
                seen.hashes[name[1:-1]] = fields
        return seen

    def _partition(self, key: str) -> int:
        """Return the partition of a key."""
        assert self._layout
        return tags(self._layout.partitions).index(key.removeprefix(f"{self.prefix}:{{").partition("}")[0])

    def beside(self, session_id: str, name: str) -> str:
        """Return the name that a snapshot has for the set of this name in the partition of a session."""
        return f"{name}@{self._layout.place(session_id)[1]}" if self._layout else name

    async def ttl(self, name: str) -> int:
        """Return the TTL of a key, named as in a dump, in milliseconds."""
        return max([int(await self.client.pttl(key)) for key in self.named(name)])

    async def expire(self, name: str) -> None:
        """Let a key, named as in a dump, expire, and wait until Redis has removed it."""
        for key in self.named(name):
            await self.client.pexpire(key, 1)
            while await self.client.exists(key):
                pass

    async def shorten(self, milliseconds: int) -> None:
        """Shorten the TTL of every session, as if that much time had passed since its last renewal."""
        for key in await self.keys():
            if not self._name(key).startswith("{"):
                continue
            await self.client.pexpire(key, await self.client.pttl(key) - milliseconds)

    async def clear(self) -> None:
        """Remove all keys."""
        for key in await self._found():  # One by one: in a cluster they are in several slots.
            await self.client.unlink(key)
