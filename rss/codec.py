"""How the value of a field stands in the hash."""

import json
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

# What a JSON text can begin with.
_JSON_STARTS = frozenset('"[{-0123456789tfn \t\n\r')
_JSON_START_BYTES = frozenset(map(ord, _JSON_STARTS))


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
            text = _dumps(value) if self._is_like_json(value) else value
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
        text = data.decode()
        if data and data[0] in _JSON_START_BYTES:
            try:
                return _loads(text)
            except (ValueError, RecursionError):
                pass  # A plain text that only begins like JSON.
        return text

    def _is_like_json(self, text: str) -> bool:
        if not text or text[0] not in _JSON_STARTS:
            return False
        # The scripts parse what begins like this with a parser of their own, which takes more for JSON than ours.
        if text[0] in '"[{':
            return True
        try:
            _loads(text)
        except (ValueError, RecursionError):
            return False
        return True


class TextCodec:
    """Stores str as it is and int as its digits, and reads all as str: as the Node original does."""

    def encode(self, field: str, value: Any, /) -> str | bytes:
        if type(value) is not str and type(value) is not int:
            raise TypeError("only str and int can be stored as text")
        return str(value).encode()

    def decode(self, field: str, data: bytes, /) -> Any:
        return data.decode()
