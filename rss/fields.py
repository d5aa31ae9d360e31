"""The fields of sessions: encode and decode their values, and check the arguments of operations."""

import functools
from collections.abc import Callable, ItemsView, Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

from rss.codec import Codec, JSONCodec, TextCodec
from rss.errors import SessionError
from rss.keys import reference_value, text
from rss.references import Reference

_K = TypeVar("_K")
_V = TypeVar("_V")

# These limits keep Redis busy for less than 5 ms for one session.
_MOST_FIELDS: Final = 1000
_MOST_VALUES: Final = 128
_MOST_MEMBERS: Final = 1000
_MOST_LIMITED: Final = 10


class Encoded(NamedTuple):
    """The encoded fields of a write."""

    #: Fields and data in turn.
    pairs: list[str | bytes]
    #: For each value of a reference: the field, and the text of the value.
    references: list[tuple[str, str]]
    #: For each reference: the number of its values in `references`, or "keep" if its field is not written.
    counts: tuple[str, ...]
    #: The fields to remove.
    gone: tuple[str, ...] = ()


class Fields:
    """The fields of the sessions of one store: its references, and the codec of its values."""

    def __init__(self, references: Iterable[str] | Mapping[str, Reference], codec: Codec) -> None:
        self.references: dict[str, Reference] = _references(references)
        identities = (field for field, kind in self.references.items() if kind.identity)
        self.identity: str | None = next(identities, None)
        self.codec = codec
        plain = getattr(codec, "plaintext_codec", None)
        #: The same fields without encryption, whose data can be compared. This object itself if nothing is encrypted.
        self.plain: Fields = self if plain is None else Fields(self.references, plain).plain
        # For references: the scripts read these.
        self._own = self.plain.codec if isinstance(self.plain.codec, TextCodec) else JSONCodec()
        self._numbers = {field: str(n) for n, field in enumerate(self.references, 1)}
        self._encoders = _Cached(self._encoder)
        self._decoders = _Cached(self._decoder)

    def encode(self, values: Mapping[str, Any], gone: tuple[str, ...] = ()) -> Encoded:
        """Encode these values for a write.

        *gone*: the names of other fields to remove, each once.

        Raises TypeError or ValueError, which name the field.
        """
        items = _items(values, "values")
        if len(items) > _MOST_FIELDS:
            raise ValueError(f"values must not have more than {_MOST_FIELDS:,} fields")
        pairs: list[str | bytes] = []
        for field, value in items:
            pairs += (field, self.encode_value(field, value))
        if not self.references:
            return Encoded(pairs, [], (), gone)
        named: list[tuple[str, str]] = []
        counts: list[str] = []
        for field in self.references:
            if field not in values:
                counts.append("0" if field in gone else "keep")
            elif (value := values[field]) is None:
                counts.append("0")
            elif isinstance(value, list):
                texts = self._texts(field, value)
                named += [(field, one) for one in texts]
                counts.append(str(len(texts)))
            else:
                named.append((field, reference_value(value, field)))
                counts.append("1")
        if len(named) > _MOST_VALUES:
            raise ValueError(f"a write must not have more than {_MOST_VALUES} reference values")
        return Encoded(pairs, named, tuple(counts), gone)

    def _texts(self, field: str, values: list[Any]) -> list[str]:
        """Return the texts of several values of a reference, each once."""
        reference = self.references[field]
        if reference.identity:
            raise ValueError(f"{field!r} is the identity: it has one value, not a list")
        if any(isinstance(value, int) and abs(value) > 2**53 for value in values):
            raise ValueError(f"an integer in a list of the reference {field!r} must not be beyond 2**53")
        texts = list(dict.fromkeys(reference_value(value, field) for value in values))
        if reference.limit and len(texts) > min(_MOST_LIMITED, _MOST_MEMBERS // reference.limit):
            raise ValueError(
                f"{field!r} has a limit: a list must not have more than {_MOST_LIMITED} values, and their number "
                f"times the limit must not be more than {_MOST_MEMBERS:,}"
            )
        return texts

    def encode_value(self, field: str, value: Any) -> str | bytes:
        """Encode the value of one field. Raises TypeError or ValueError, which name the field."""
        encode = self._encoders[field]
        try:
            data = encode(field, value)
            if (type(data) is str and data.isascii()) or type(data) is bytes:
                return data
            return _checked(data)
        except (TypeError, ValueError) as error:
            # Do not show the error of the codec: its text may hold the value.
            kind = TypeError if isinstance(error, TypeError) else ValueError
            codec = type(self._codec(field)).__name__
        raise kind(
            f"{codec} cannot store this {type(value).__name__} in the field {field!r}: store a str, a number or other "
            "JSON, or give the store another codec"
        )

    def expect(self, values: Mapping[str, Any]) -> list[str | bytes]:
        """Encode expectations for the scripts: field, how, data for each.

        None expects that the field is absent, or holds None. Raises ValueError for a field that the codec encrypts.
        """
        expected: list[str | bytes] = []
        for field, value in _items(values, "expect"):
            self.refuse_encrypted(field_name(field), "compare")
            try:
                how, data = "holds" if value is not None else "lacks_or_holds", self.encode_value(field, value)
            except (TypeError, ValueError):
                if value is not None:
                    raise
                how, data = "lacks", ""  # This codec cannot store None.
            expected += (field, how, data)
        if len(expected) > 3 * _MOST_FIELDS:
            raise ValueError(f"expect must not have more than {_MOST_FIELDS:,} fields")
        return expected

    def refuse_encrypted(self, field: str, verb: str) -> None:
        """Raise ValueError, which says that Redis cannot *verb* the field, if the codec encrypts it."""
        if self.plain is not self and field not in self.references:
            raise ValueError(f"Redis cannot {verb} the field {field!r}: {type(self.codec).__name__} encrypts it")

    def decode(self, pairs: list[bytes]) -> dict[str, Any]:
        """Decode a list of field, data, ... to values. Raises SessionError, which names an unreadable field."""
        values: dict[str, Any] = {}
        decoders, turns = self._decoders, iter(pairs)
        for name, data in zip(turns, turns, strict=True):
            field, decode = decoders[name]
            if decode:
                try:
                    values[field] = decode(field, data)
                except (TypeError, ValueError):
                    raise SessionError(f"the field {field!r} holds data that is not readable") from None
        return values

    def as_stored(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values as a read would return them."""
        pairs = self.plain.encode(values).pairs
        return self.plain.decode([data.encode() if isinstance(data, str) else data for data in pairs])

    def comparable(self, encoded: Encoded, values: Mapping[str, Any]) -> Encoded:
        """Return *encoded*, which *values* were encoded to, without encryption: it is equal for equal values."""
        return encoded if self.plain is self else self.plain.encode(values, encoded.gone)

    def number(self, field: str) -> str:
        """Return the number of a reference, counted from 1. Raises ValueError if the field is no reference."""
        try:
            return self._numbers[field]
        except (KeyError, TypeError):
            raise ValueError(f"{field!r} is not one of the references of this store") from None

    def _codec(self, field: str) -> Codec:
        return self._own if field in self.references else self.codec

    def _encoder(self, field: str) -> Callable[[str, Any], str | bytes]:
        return self._codec(field_name(field)).encode

    def _decoder(self, name: bytes) -> tuple[str, Callable[[str, bytes], Any] | None]:
        """Return the name of a field and its decoder. The decoder is None for the internal fields of the library."""
        field = name.decode(errors="backslashreplace")
        decode = None if field.startswith("_") else self._codec(field).decode
        return field, _read_id if field == "id" else decode


class _Cached(dict[_K, _V]):
    """A bounded cache of a function. Its bound matters if names of fields hold ids, such as `item:<id>`."""

    def __init__(self, make: Callable[[_K], _V]) -> None:
        self._make = make

    def __missing__(self, key: _K) -> _V:
        if len(self) >= 1000:
            self.clear()
        value = self[key] = self._make(key)
        return value


def listed(values: Iterable[_V], name: str) -> list[_V]:
    """Return an iterable as a list. Raises TypeError, which holds *name*, for one str, or for another type."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be several str, in a list for one")
    return list(values)


def field_name(field: str) -> str:
    """Return the name of a field. Raises TypeError or ValueError if the name is reserved or invalid."""
    return _unreserved(field if field.__class__ is str else text(field, "a field"))


@functools.lru_cache(maxsize=1024)
def _unreserved(field: str) -> str:
    text(field, "a field")
    if field == "id" or field.startswith("_"):
        raise ValueError(f"the field {field!r} is reserved: 'id' and names that begin with '_' are the library's")
    return field


def field_names(fields: Iterable[str], *readable: str) -> list[str]:
    """Return the names of fields without those in *readable*.

    Raises TypeError or ValueError if there are no fields, too many, or if another name is reserved or invalid.
    """
    names = listed(fields, "fields")
    if not names:
        raise ValueError("fields must not be empty")
    if len(names) > _MOST_FIELDS:
        raise ValueError(f"fields must not be more than {_MOST_FIELDS:,}")
    return [field_name(name) for name in names if name not in readable]


def _items(values: Mapping[str, Any], name: str) -> ItemsView[str, Any]:
    if type(values) is not dict and not isinstance(values, Mapping):
        raise TypeError(f"{name} must be a mapping of fields to values, not {type(values).__name__}")
    return values.items()


def _checked(data: object) -> bytes:
    """Return the result of a codec as bytes. Raises TypeError if it is neither str nor bytes."""
    if isinstance(data, str):
        return data.encode()
    if isinstance(data, bytes):
        return bytes(data)
    raise TypeError("a codec must return str or bytes")


def _references(references: Iterable[str] | Mapping[str, Reference]) -> dict[str, Reference]:
    if not isinstance(references, Mapping):
        references = dict.fromkeys(listed(references, "references"), Reference())
    checked = {field_name(field): reference for field, reference in references.items()}
    for field, reference in checked.items():
        if any(mark in field for mark in ":{}"):
            raise ValueError("the field of a reference must not hold a colon or a brace: they delimit it in keys")
        if not isinstance(reference, Reference):
            raise TypeError("references must be fields, or a mapping of fields to Reference")
    if sum(reference.identity for reference in checked.values()) > 1:
        raise ValueError("at most one reference is the identity")
    return checked


def _read_id(_: str, data: bytes) -> str:
    return data.decode()
