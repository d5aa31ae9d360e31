"""The names of keys, and the ids in them: the only place that builds either."""

import secrets
from dataclasses import dataclass


def text(value: object, name: str) -> str:
    """Return *value* if it is a text that can stand in a key; else raise TypeError or ValueError with its *name*."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} must be valid Unicode") from None
    return value


def reference_value(value: object, field: str) -> str:
    """Return the text that stands for a reference value: str and int, 1 to 512 bytes; 1 and "1" are the same."""
    if isinstance(value, str):
        plain = str.__str__(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        plain = int.__repr__(value)
    else:
        raise TypeError(f"a value of the reference {field!r} must be a str or an int, not {type(value).__name__}")
    if not 0 < len(plain) <= 128 and len(text(plain, f"a value of {field!r}").encode()) > 512:
        raise ValueError(f"a value of the reference {field!r} must not be longer than 512 bytes")
    if not plain.isascii():
        text(plain, f"a value of {field!r}")
    return plain


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one store: `<prefix>:{<id>}` and `<prefix>:<field>:{<value>}`, as the Node original names them."""

    prefix: str
    id_bytes: int

    def __post_init__(self) -> None:
        text(self.prefix, "prefix")
        if "{" in self.prefix or "}" in self.prefix:
            raise ValueError("prefix must not hold a brace: they delimit ids and values")
        if type(self.id_bytes) is not int or not 16 <= self.id_bytes <= 256:
            raise ValueError("id_bytes must be an integer from 16 to 256")

    def mint(self) -> str:
        """Return a new random id, URL-safe."""
        return secrets.token_urlsafe(self.id_bytes)

    def session(self, session_id: str) -> str:
        return f"{self.prefix}:{{{text(session_id, 'session_id')}}}"

    def reference(self, field: str, value: object) -> str:
        return f"{self.prefix}:{field}:{{{reference_value(value, field)}}}"

    def fence(self, field: str, value: object) -> str:
        """Return the key of what `delete_by` notes while it works through a large reference set."""
        return self.reference(f"_fence:{field}", value)
