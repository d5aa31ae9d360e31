"""The layout of keys and ids. No other module knows their grammar."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


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
class Plain:
    """The layout of one Redis, as the Node original names keys: `<prefix>:{<id>}` and `<prefix>:<field>:{<value>}`.

    Scripts also build keys, of sets and sessions that they find. They get the pieces from here.
    """

    prefix: str
    id_bytes: int

    #: The characters between field and value in the key of a reference set, and the last characters of every key.
    before_value: ClassVar[str] = ":{"
    ending: ClassVar[str] = "}"

    def __post_init__(self) -> None:
        text(self.prefix, "prefix")
        if "{" in self.prefix or "}" in self.prefix:
            raise ValueError("prefix must not hold a brace: they delimit ids and values")
        if type(self.id_bytes) is not int or not 16 <= self.id_bytes <= 256:
            raise ValueError("id_bytes must be an integer from 16 to 256")

    def stems(self, partition: int) -> tuple[str, str]:
        """Return the beginnings of the keys of sessions and of reference sets. The only *partition* is 0."""
        del partition
        return f"{self.prefix}:{{", f"{self.prefix}:"

    def mint(self) -> str:
        """Return a new random URL-safe id."""
        return secrets.token_urlsafe(self.id_bytes)

    def session(self, session_id: str) -> str:
        """Return the key of a session."""
        if session_id.__class__ is str and session_id and session_id.isascii():  # The common case, without a call.
            return f"{self.prefix}:{{{session_id}}}"
        return f"{self.prefix}:{{{text(session_id, 'session_id')}}}"

    def reference(self, field: str, value: object) -> str:
        """Return the key of a reference set."""
        return self.references([(str.__str__(field), reference_value(value, field))])[0]

    def references(self, texts: Iterable[tuple[str, str]]) -> list[str]:
        """Return the keys of reference sets. Each pair is a field and the text of a value."""
        return [f"{self.prefix}:{field}:{{{value}}}" for field, value in texts]

    def fence(self, field: str, value: object) -> str:
        """Return the key of the fence of a reference set. `_fence.lua` describes fences."""
        return f"{self.prefix}:_fence:{str.__str__(field)}:{{{reference_value(value, field)}}}"
