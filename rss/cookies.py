"""The session cookie: read it from a request, write it into a response, sign it."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal

_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_DOMAIN: Final = re.compile(r"\.?[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*")
_PATH: Final = re.compile(
    r"/[!-:<-~]*"
)  # A semicolon, a space or a control character would begin another attribute or header.


@dataclass(frozen=True, slots=True)
class CookiePolicy:
    """The name and the attributes of the session cookie.

    *name*: use "__Host-session-id" in production. Browsers then accept the cookie only from this host, over TLS, so a
    sibling domain cannot plant one. Such a name requires *secure*, the path "/" and no *domain*.
    *persistent*: whether the cookie outlives the browser. If not, the browser drops it when it closes.
    *partitioned*: whether the cookie belongs to the site that embeds this one (CHIPS). It requires *secure*.

    Raises ValueError for a combination that browsers would refuse, and for characters that could inject a header.
    """

    name: str = "session-id"
    path: str = "/"
    domain: str | None = None
    secure: bool = True
    http_only: bool = True
    same_site: Literal["lax", "strict", "none"] = "lax"
    persistent: bool = True
    partitioned: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError("the name of the cookie must be a token: at most 256 letters, digits and marks")
        if not isinstance(self.path, str) or not _PATH.fullmatch(self.path) or len(self.path) > 1024:
            raise ValueError("the path of the cookie must begin with a slash and be a part of a URL")
        if self.domain is not None and not _DOMAIN.fullmatch(self.domain):
            raise ValueError("the domain of the cookie must be the name of a host")
        if self.same_site not in ("lax", "strict", "none"):
            raise ValueError("same_site must be 'lax', 'strict' or 'none'")
        if self.same_site == "none" and not self.secure:
            raise ValueError("browsers refuse a cookie with same_site 'none' that is not secure")
        if self.partitioned and not self.secure:
            raise ValueError("browsers refuse a cookie that is partitioned and not secure")
        prefix = self.name.lower()
        if prefix.startswith("__secure-") and not self.secure:
            raise ValueError("browsers refuse a cookie named __Secure-... that is not secure")
        if prefix.startswith("__host-") and not (self.secure and self.path == "/" and self.domain is None):
            raise ValueError("browsers refuse a cookie named __Host-... that is not secure, or has a domain or a path")

    def read(self, header: str) -> list[str]:
        """Return the distinct values of the cookie in a Cookie header: usually one, or none.

        There are several if a sibling domain, or a page on another path, set a cookie of the same name. Their order
        does not tell which value is right. Quotes around a value stay. Malformed cookies of other names are ignored.
        """
        values: dict[str, None] = {}
        if self.name in header:
            for pair in header.split(";"):
                name, equals, value = pair.partition("=")
                if equals and name.strip(" \t") == self.name:
                    values[value.strip(" \t")] = None
        return [*values]

    def write(self, value: str, max_age: timedelta) -> str:
        """Return the Set-Cookie header for this value. If the cookie is persistent, browsers keep it for *max_age*."""
        # Round up: Max-Age=0 would delete the cookie.
        return self._line(value, f"; Max-Age={math.ceil(max_age.total_seconds())}" if self.persistent else "")

    def clear(self) -> str:
        """Return the Set-Cookie header that deletes the cookie."""
        return self._line("", "; Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT")

    def _line(self, value: str, age: str) -> str:
        domain = f"; Domain={self.domain}" if self.domain else ""
        flags = ("; HttpOnly" if self.http_only else "") + ("; Secure" if self.secure else "")
        partitioned = "; Partitioned" if self.partitioned else ""
        site = self.same_site.capitalize()
        return f"{self.name}={value}; Path={self.path}{domain}{age}{flags}; SameSite={site}{partitioned}"


class Signer:
    """Signs the values of cookies with itsdangerous. The first key signs; all keys verify."""

    def __init__(self, secret_keys: Sequence[str]) -> None:
        try:
            import itsdangerous  # noqa: PLC0415 - only the extra [signed] installs it
        except ImportError:
            raise RuntimeError("secret_keys needs itsdangerous: pip install redis-session-sets[signed]") from None
        if not secret_keys or not all(isinstance(key, str) and len(key) >= 16 for key in secret_keys):
            raise ValueError("secret_keys must be one or more texts of at least 16 characters")
        self._forged = itsdangerous.BadSignature
        self._signer = itsdangerous.Signer(
            [*reversed(secret_keys)], salt="rss.cookies", key_derivation="hmac", digest_method=hashlib.sha256
        )

    def sign(self, value: str) -> str:
        """Return a value with its signature."""
        return self._signer.sign(value).decode()

    def unsign(self, signed: str) -> str | None:
        """Return a value without its signature. Return None if no key verifies the signature."""
        try:
            return self._signer.unsign(signed).decode()
        except (self._forged, UnicodeError):  # A signed value is Unicode.
            return None
