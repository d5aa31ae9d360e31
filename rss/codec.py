"""How the value of a field stands in the hash."""

import json
import re
from typing import Any, Protocol


class Codec(Protocol):
    """What turns the value of a field into what Redis keeps, and back: plug in encryption, msgspec, ..."""

    def encode(self, field: str, value: Any, /) -> str | bytes:
        """Return what to store; raise TypeError or ValueError if it cannot be stored."""
        ...

    def decode(self, field: str, data: bytes, /) -> Any:
        """Return the value; raise ValueError if the data is not readable."""
        ...


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


_loads = json.JSONDecoder(parse_constant=_refuse).decode
_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

# The characters that a JSON text can begin with. Most texts that begin with a digit are no numbers: they are addresses,
# dates or ids. So a pattern decides, not the parser.
_JSON_STARTS = frozenset('"[{-0123456789tfn \t\n\r')
_NUMBER_STARTS = frozenset("-0123456789")
_ZERO = ord("0")
_is_number = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+[ \t\n\r]*+").fullmatch


def _is_like_json(text: str) -> bool:
    # The scripts parse what begins like this with a parser of their own, which takes more for JSON than ours.
    if text[0] in '"[{':
        return True
    try:
        _loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class JSONCodec:
    """Keeps types, and stays readable in redis-cli.

    A str is stored as it is, unless it could be taken for JSON: then it is quoted. All else is compact JSON.
    So 1 is `1`, "1" is `"1"` with the quotes, "alice" is `alice`, None is `null`, [1] is `[1]`.
    Every JSON value comes back exactly; what would not, such as a tuple, a set, bytes or NaN, is refused.
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
            return data.decode()  # It only begins like JSON.


class TextCodec:
    """Stores str as it is and int as its digits, and reads all as str: as the Node original does."""

    def encode(self, field: str, value: Any, /) -> str | bytes:
        if type(value) is not str and type(value) is not int:
            raise TypeError("only str and int can be stored as text")
        return str(value).encode()

    def decode(self, field: str, data: bytes, /) -> Any:
        return data.decode()
