"""Codecs: they convert the values of fields to the data that Redis stores."""

import json
import re
from typing import Any, Protocol


class Codec(Protocol):
    """Converts the value of a field to the data in Redis, and back. Write your own for msgspec or compression.

    A codec that encodes equal values to different data, as encryption does, also has an attribute `plaintext_codec`:
    the codec whose data it encrypts. The web layer compares values by that codec, to write only what has changed. The
    store refuses `expect` and `increment` for encrypted fields. `rss.encryption` has such a codec.
    """

    def encode(self, field: str, value: Any, /) -> str | bytes:
        """Return the data to store. Raise TypeError or ValueError if the value cannot be stored."""
        ...

    def decode(self, field: str, data: bytes, /) -> Any:
        """Return the value of stored data. Raise ValueError if the data is not readable."""
        ...


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


_loads = json.JSONDecoder(parse_constant=_refuse).decode
_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

# The characters that a JSON text can begin with. A pattern recognises numbers, because a failed parse costs more. Most
# texts that begin with a digit are addresses, dates or ids.
_JSON_STARTS = frozenset('"[{-0123456789tfn \t\n\r')
_NUMBER_STARTS = frozenset("-0123456789")
_ZERO = ord("0")
_is_number = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+[ \t\n\r]*+").fullmatch


def _is_like_json(text: str) -> bool:
    # Quote every such text: the scripts have another parser, which accepts more texts as JSON than this one.
    if text[0] in '"[{':
        return True
    try:
        _loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class JSONCodec:
    """Keeps types, and stays readable in redis-cli.

    A str that could be mistaken for JSON is quoted. Any other str is stored unchanged. All other values are stored as
    compact JSON. So 1 is `1`, "1" is `"1"` with the quotes, "alice" is `alice`, None is `null`, [1] is `[1]`.

    Every JSON value is read back exactly. A value that would not be, such as a tuple, a set, bytes or NaN, is refused.
    """

    def encode(self, field: str, value: Any, /) -> str | bytes:
        if type(value) is int:
            return str(value)
        if type(value) is str:
            first = value[:1]
            like_json = first in _JSON_STARTS and (
                _is_number(value) if first in _NUMBER_STARTS else _is_like_json(value)
            )
            text = _dumps(value) if like_json else value
        else:
            try:
                text = _dumps(value)
                exact = _loads(text) == value
            except RecursionError:
                raise ValueError("nested too deeply") from None
            if not exact:
                raise TypeError("JSON has only str keys, and lists for tuples")
        return text if text.isascii() else text.encode()

    def decode(self, field: str, data: bytes, /) -> Any:
        try:
            if data.isdigit() and (data[0] != _ZERO or len(data) == 1):
                return int(data)
            text = data.decode()
            first = text[:1]
            if first not in _JSON_STARTS or (first in _NUMBER_STARTS and not _is_number(text)):
                return text
            return _loads(text)
        except (ValueError, RecursionError):
            return data.decode()  # It begins like JSON, but is not.


class TextCodec:
    """Stores a str unchanged and an int as its digits. Reads every value as a str, as the Node original does."""

    def encode(self, field: str, value: Any, /) -> str | bytes:
        if type(value) is not str and type(value) is not int:
            raise TypeError("only str and int can be stored as text")
        return str(value).encode()

    def decode(self, field: str, data: bytes, /) -> Any:
        return data.decode()
