"""The layout of keys and ids. No other module knows their grammar."""

import abc
import binascii
import functools
import itertools
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Final

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


@dataclass(frozen=True, slots=True)
class Layout(abc.ABC):
    """The names of the keys of a store, and its ids.

    Scripts also build keys, of sets and sessions that they find. They get the pieces from here.
    """

    prefix: str
    id_bytes: int
    #: The number of partitions. All keys of a session are in one of them.
    partitions: int = 1

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
        """The key of the hash that describes the store. It has no TTL."""
        return f"{self.prefix}:_meta"

    @abc.abstractmethod
    def place(self, session_id: str) -> tuple[str, int]:
        """Return the key of a session, and its partition."""

    @abc.abstractmethod
    def stems(self, partition: int) -> tuple[str, str]:
        """Return the beginnings of the keys of sessions and of reference sets in a partition."""

    @abc.abstractmethod
    def references(self, texts: Iterable[tuple[str, str]], partition: int) -> list[str]:
        """Return the keys of reference sets in a partition. Each pair is a field and the text of a value."""

    def reference(self, field: str, value: object, partition: int = 0) -> str:
        """Return the key of a reference set in a partition."""
        return self.references([(str.__str__(field), reference_value(value, field))], partition)[0]

    def fence(self, field: str, value: object, partition: int = 0) -> str:
        """Return the key of the fence of a reference set. `_fence.lua` describes fences."""
        return self.references([(f"_fence:{str.__str__(field)}", reference_value(value, field))], partition)[0]

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
    id determines its partition.
    """

    before_value: ClassVar[str] = ":"
    ending: ClassVar[str] = ""

    def __post_init__(self) -> None:
        Layout.__post_init__(self)
        if type(self.partitions) is not int or not 1 <= self.partitions <= _MOST_PARTITIONS:
            raise ValueError(f"partitions must be an integer from 1 to {_MOST_PARTITIONS:,}")

    @property
    def slots(self) -> list[int]:
        """The slot of each partition on a Redis Cluster."""
        return [slot(tag) for tag in tags(self.partitions)]

    def place(self, session_id: str) -> tuple[str, int]:
        plain = text(session_id, "session_id")
        number = binascii.crc_hqx(plain.encode(), 0) % self.partitions
        return f"{self.prefix}:{{{tags(self.partitions)[number]}}}:s:{plain}", number

    def stems(self, partition: int) -> tuple[str, str]:
        tag = tags(self.partitions)[partition]
        return f"{self.prefix}:{{{tag}}}:s:", f"{self.prefix}:{{{tag}}}:r:"

    def references(self, texts: Iterable[tuple[str, str]], partition: int) -> list[str]:
        tag = tags(self.partitions)[partition]
        return [f"{self.prefix}:{{{tag}}}:r:{field}:{value}" for field, value in texts]

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
