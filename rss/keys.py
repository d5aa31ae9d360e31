"""The layout of keys and ids. No other module knows their grammar."""

import abc
import binascii
import functools
import itertools
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, NamedTuple

#: The number of slots of a Redis Cluster.
SLOTS: Final = 16_384
_MOST_PARTITIONS: Final = 4096
_URL_SAFE: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_TAG_LETTERS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def text(value: object, name: str) -> str:
    """Return *value* as a str that can be part of a key. Raises TypeError or ValueError, which hold *name*."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} must be valid Unicode") from None
    return value if value.__class__ is str else str.__str__(value)


def reference_value(value: object, field: str) -> str:
    """Return the text of a reference value, a str or an int. The values 1 and "1" have the same text.

    Raises TypeError for other types, and ValueError if the text is empty or longer than 512 bytes.
    """
    if isinstance(value, str):
        plain = str.__str__(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        plain = int.__repr__(value)
    else:
        raise TypeError(f"a value of the reference {field!r} must be a str or an int, not {type(value).__name__}")
    if plain.isascii() and 0 < len(plain) <= 512:  # The common case, without an encode.
        return plain
    if len(text(plain, f"a value of the reference {field!r}").encode()) > 512:
        raise ValueError(f"a value of the reference {field!r} must not be longer than 512 bytes")
    return plain


class Parsed(NamedTuple):
    """The parts of the name of a key.

    *kind*: a session; the reference set or the fence of a value; a key of the library itself; a key that the grammar
    does not know, which is stray; or one that is in another partition than its name says, or in an unknown one.
    *name*: the id of a session, or the field of a reference. *value*: the value of the set or the fence.
    """

    kind: Literal["session", "set", "fence", "own", "stray", "misplaced"]
    partition: int = 0
    name: str = ""
    #: The text of the value of a reference.
    value: str = ""


_OWN: Final = ("_meta", "_marker", "_sweeper")


@dataclass(frozen=True, slots=True)
class Layout(abc.ABC):
    """The names of the keys of a store, and its ids.

    Scripts also build keys, of sets and sessions that they find. They get the pieces from here.
    """

    prefix: str
    id_bytes: int
    #: The number of partitions. All keys of a session are in one of them.
    partitions: int = 1
    #: The reference whose value determines the partition of a session. None: each session may be in any partition.
    identity: str | None = None

    #: The characters between field and value in the key of a reference set, and the last characters of every key.
    before_value: ClassVar[str]
    ending: ClassVar[str]

    def __post_init__(self) -> None:
        text(self.prefix, "prefix")
        if "{" in self.prefix or "}" in self.prefix:
            raise ValueError("prefix must not hold a brace: they delimit ids and values")
        if type(self.id_bytes) is not int or not 16 <= self.id_bytes <= 256:
            raise ValueError("id_bytes must be an integer from 16 to 256")

    @property
    def meta(self) -> str:
        """The key of the hash that describes the stores with this prefix. It has no TTL."""
        return f"{self.prefix}:_meta"

    @abc.abstractmethod
    def place(self, session_id: str) -> tuple[str, int]:
        """Return the key of a session, and its partition."""

    @abc.abstractmethod
    def parse(self, key: str) -> Parsed:
        """Return what the name of a key says."""

    @abc.abstractmethod
    def stems(self, partition: int) -> tuple[str, str]:
        """Return the beginnings of the keys of sessions and of reference sets in a partition."""

    @abc.abstractmethod
    def references(self, texts: Iterable[tuple[str, str]], partition: int) -> list[str]:
        """Return the keys of reference sets in a partition. Each pair is a field and the text of a value."""

    def home(self, texts: Iterable[tuple[str, str]]) -> int | None:
        """Return the partition of a session with these reference values. Return None if it may be in any."""
        if self.identity is None:
            return None
        values = (value for field, value in texts if field == self.identity)
        return next((binascii.crc_hqx(value.encode(), 0) % self.partitions for value in values), None)

    def with_value(self, field: str, value: object) -> Sequence[int]:
        """Return the partitions that may have sessions with a value of a reference."""
        home = self.home([(field, reference_value(value, field))])
        return range(self.partitions) if home is None else (home,)

    def reference(self, field: str, value: object, partition: int = 0) -> str:
        """Return the key of a reference set in a partition."""
        return self.references([(str.__str__(field), reference_value(value, field))], partition)[0]

    def fence(self, field: str, value: object, partition: int = 0) -> str:
        """Return the key of the fence of a reference set. `_fence.lua` describes fences."""
        return self.references([(f"_fence:{str.__str__(field)}", reference_value(value, field))], partition)[0]

    def mark(self, partition: int) -> str:
        """Return the key of the hash that names the incomplete references. It has no TTL, and seldom exists."""
        return f"{self.stems(partition)[1]}_meta"

    def sweeper(self) -> str:
        """Return the key that exists while no other process may begin to sweep. It is in the first partition."""
        return f"{self.stems(0)[1]}_sweeper"

    def events(self, partition: int) -> str:
        """Return the channel to which the scripts publish the events of a partition."""
        return f"{self.stems(partition)[1]}_events"

    def marker(self, partition: int) -> str:
        """Return the key that a durable operation writes. It vanishes after a millisecond."""
        return f"{self.stems(partition)[1]}_marker"

    def mint(self, partition: int | None = None) -> str:
        """Return a new random URL-safe id of a session in this partition. None: in any."""
        del partition
        return secrets.token_urlsafe(self.id_bytes)


@dataclass(frozen=True, slots=True)
class Plain(Layout):
    """The layout of one Redis, as the Node original names keys: `<prefix>:{<id>}` and `<prefix>:<field>:{<value>}`.

    It has one partition, number 0.
    """

    before_value: ClassVar[str] = ":{"
    ending: ClassVar[str] = "}"

    def place(self, session_id: str) -> tuple[str, int]:
        if session_id.__class__ is str and session_id and session_id.isascii():  # The common case, without a call.
            return f"{self.prefix}:{{{session_id}}}", 0
        return f"{self.prefix}:{{{text(session_id, 'session_id')}}}", 0

    def parse(self, key: str) -> Parsed:
        if not key.startswith(f"{self.prefix}:"):
            return Parsed("stray")
        name = key[len(self.prefix) + 1 :]
        if name in _OWN:
            return Parsed("own")
        if name.startswith("{") and name.endswith("}") and len(name) > 2:
            return Parsed("session", name=name[1:-1])
        field, found, value = name.removeprefix("_fence:").partition(":{")
        if not found or not field or not name.endswith("}"):
            return Parsed("stray")
        return Parsed("fence" if name.startswith("_fence:") else "set", 0, field, value[:-1])

    def stems(self, partition: int) -> tuple[str, str]:
        del partition
        return f"{self.prefix}:{{", f"{self.prefix}:"

    def references(self, texts: Iterable[tuple[str, str]], partition: int) -> list[str]:
        del partition
        return [f"{self.prefix}:{field}:{{{value}}}" for field, value in texts]


@dataclass(frozen=True, slots=True)
class Partitioned(Layout):
    """A layout in partitions: `<prefix>:{<tag>}:s:<id>` and `<prefix>:{<tag>}:r:<field>:<value>`.

    Each partition has a tag of its own. So all keys of a partition are in one slot of a Redis Cluster. The CRC16 of an
    id determines its partition. A session with an identity has an id in the partition that the CRC16 of the identity
    determines.
    """

    before_value: ClassVar[str] = ":"
    ending: ClassVar[str] = ""
    _stems: tuple[tuple[str, str], ...] = field(init=False, repr=False, compare=False)
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        Layout.__post_init__(self)
        if type(self.partitions) is not int or not 1 <= self.partitions <= _MOST_PARTITIONS:
            raise ValueError(f"partitions must be an integer from 1 to {_MOST_PARTITIONS:,}")
        before = [f"{self.prefix}:{{{tag}}}:" for tag in tags(self.partitions)]
        object.__setattr__(self, "_stems", tuple((f"{one}s:", f"{one}r:") for one in before))
        object.__setattr__(self, "_numbers", {tag: number for number, tag in enumerate(tags(self.partitions))})

    @property
    def slots(self) -> list[int]:
        """The slot of each partition on a Redis Cluster."""
        return [slot(tag) for tag in tags(self.partitions)]

    def place(self, session_id: str) -> tuple[str, int]:
        if session_id.__class__ is not str or not session_id or not session_id.isascii():  # The rare case.
            session_id = text(session_id, "session_id")
        number = binascii.crc_hqx(session_id.encode(), 0) % self.partitions
        return self._stems[number][0] + session_id, number

    def parse(self, key: str) -> Parsed:
        match = re.fullmatch(r"(.*?):\{(\w+)\}:([sr]):(.+)", key, re.DOTALL)
        if not match or match[1] != self.prefix:
            return Parsed("own" if key == self.meta else "stray")
        number, name = self._numbers.get(match[2], -1), match[4]
        if number < 0 or (match[3] == "s" and self.place(name)[1] != number):
            return Parsed("misplaced")
        if match[3] == "s":
            return Parsed("session", number, name)
        field, found, value = name.removeprefix("_fence:").partition(":")
        if not found or not field:
            return Parsed("own" if name in _OWN else "stray", number)
        return Parsed("fence" if name.startswith("_fence:") else "set", number, field, value)

    def stems(self, partition: int) -> tuple[str, str]:
        return self._stems[partition]

    def references(self, texts: Iterable[tuple[str, str]], partition: int) -> list[str]:
        _, stem = self._stems[partition]
        return [f"{stem}{name}:{value}" for name, value in texts]

    def mint(self, partition: int | None = None) -> str:
        while True:
            session_id = secrets.token_urlsafe(self.id_bytes)
            if partition is None:
                return session_id
            # Draw only the last two characters again: drawing all takes five times as long.
            stem, drawn = session_id[:-2], secrets.randbelow(64 * 64)
            crc = binascii.crc_hqx(stem.encode(), 0)
            for number in range(drawn, drawn + 64 * 64):
                pair = bytes((_URL_SAFE[number // 64 % 64], _URL_SAFE[number % 64]))
                if binascii.crc_hqx(pair, crc) % self.partitions == partition:
                    return stem + pair.decode()


def slot(tag: str) -> int:
    """Return the slot of a Redis Cluster for keys with this hash tag."""
    return binascii.crc_hqx(tag.encode(), 0) % SLOTS


def tag_in(key: str) -> str:
    """Return the part of a key that determines its slot: what is in its first braces, or the whole key."""
    start = key.find("{")
    end = key.find("}", start + 1)
    return key[start + 1 : end] if start >= 0 and start + 1 < end else key


@functools.lru_cache(maxsize=8)
def tags(partitions: int) -> tuple[str, ...]:
    """Return the hash tag of each partition: the first text whose slot is in the middle of the partition's range.

    Each partition has an equal range of the slots. So masters with equal ranges have equally many partitions, or one
    more. Keys contain the tags, so this function must never return others.
    """
    wanted = {(2 * number + 1) * SLOTS // (2 * partitions): number for number in range(partitions)}
    found = [""] * partitions
    for length in itertools.count(1):  # pragma: no branch - short texts reach every slot
        for letters in itertools.product(_TAG_LETTERS, repeat=length):
            tag = "".join(letters)
            number = wanted.pop(slot(tag), None)
            if number is not None:
                found[number] = tag
                if not wanted:
                    return tuple(found)
    raise AssertionError  # pragma: no cover - the loop above does not end
