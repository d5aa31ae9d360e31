"""Encryption of the fields of sessions. It needs the extra `[encryption]`."""

import base64
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from rss.codec import Codec, JSONCodec
from rss.fields import listed

_KEY_BYTES: Final = 32
_KEY_TEXT: Final = re.compile(r"[A-Za-z0-9_-]{43}=?")
# Neither UTF-8 nor MessagePack begins with this byte.
_VERSION: Final = b"\xc1"
_LABEL: Final = b"redis-session-sets EncryptingCodec 1"
_ID_BYTES: Final = 4
_NONCE_BYTES: Final = 12
_HEADER_END: Final = len(_VERSION) + _ID_BYTES
_NONCE_END: Final = _HEADER_END + _NONCE_BYTES


class EncryptingCodec:
    """Encrypts fields with AES-256-GCM. Refuses data that was changed, or moved to another field.

    *keys*: the newest key first. The first one encrypts, and all of them decrypt. A key is 32 random bytes, or a text
    of `generate_key`.
    *codec*: encodes the values before they are encrypted.
    *plaintext*: how to begin or end encryption while sessions are alive. None: refuse a value that is not encrypted.
    "read": read it. "write": read it, and do not encrypt new values. In both of these, the data of *codec* must not
    begin with the byte C1; JSON and text never do.

    References, `id` and the fields of the library are not encrypted, since the scripts read them. Redis can neither
    compare an encrypted field nor add to it: `expect` and `increment` raise ValueError.

    The data is the byte C1, the id of the key (4 bytes), a random nonce (12 bytes), the ciphertext, and the tag
    (16 bytes). The associated data is the name of the field. HKDF-SHA256 derives the key of AES (32 bytes) and the id
    from the given key, without salt, with the info "redis-session-sets EncryptingCodec 1". So other uses of the given
    key do no harm.

    Raises TypeError or ValueError for bad arguments. No error holds a key or a value.
    """

    def __init__(
        self,
        keys: Iterable[str | bytes],
        codec: Codec = JSONCodec(),  # noqa: B008 - it has no state
        *,
        plaintext: Literal["read", "write"] | None = None,
    ) -> None:
        given = listed(keys, "keys")
        if not given:
            raise ValueError("keys must not be empty")
        ciphers = dict(map(_cipher, given))
        if len(ciphers) != len(given):
            raise ValueError("keys must differ")
        if plaintext not in (None, "read", "write"):
            raise ValueError("plaintext must be 'read', 'write' or None")
        #: Encodes the values before they are encrypted.
        self.plaintext_codec = codec
        self._plaintext = plaintext
        self._ciphers = ciphers
        self._header, self._newest = next(iter(ciphers.items()))

    @staticmethod
    def generate_key() -> str:
        """Return a new random key as text: base64url without padding."""
        return secrets.token_urlsafe(_KEY_BYTES)

    def encode(self, field: str, value: Any, /) -> str | bytes:
        data = self.plaintext_codec.encode(field, value)
        if self._plaintext == "write":
            return data
        nonce = secrets.token_bytes(_NONCE_BYTES)
        plain = data.encode() if isinstance(data, str) else data
        return self._header + nonce + self._newest.encrypt(nonce, plain, field.encode())

    def decode(self, field: str, data: bytes, /) -> Any:
        if self._plaintext is None or data.startswith(_VERSION):
            data = self._decrypt(field, data)
        with suppress(TypeError, ValueError):
            return self.plaintext_codec.decode(field, data)
        # Do not raise the error of that codec, nor keep it as the context: it may hold the value.
        raise ValueError("the codec inside cannot read the data")

    def _decrypt(self, field: str, data: bytes) -> bytes:
        cipher = self._ciphers.get(data[:_HEADER_END])
        if cipher is None:
            raise ValueError("none of the keys has encrypted the data")
        try:
            return cipher.decrypt(data[_HEADER_END:_NONCE_END], data[_NONCE_END:], field.encode())
        except (InvalidTag, ValueError):
            raise ValueError("the data was changed, or is that of another field") from None


def _cipher(key: str | bytes) -> tuple[bytes, AESGCM]:
    """Return the header of the data that a key encrypts, and its cipher."""
    if isinstance(key, str) and _KEY_TEXT.fullmatch(key):
        key = base64.urlsafe_b64decode(key.rstrip("=") + "=")
    elif not isinstance(key, str | bytes):
        raise TypeError(f"a key must be bytes or a str, not {type(key).__name__}")
    if isinstance(key, str) or len(key) != _KEY_BYTES:
        raise ValueError(f"a key must be {_KEY_BYTES} bytes, or a text of generate_key()")
    derived = HKDF(SHA256(), _KEY_BYTES + _ID_BYTES, salt=None, info=_LABEL).derive(key)
    return _VERSION + derived[_KEY_BYTES:], AESGCM(derived[:_KEY_BYTES])
