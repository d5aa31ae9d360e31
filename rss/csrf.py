"""CSRF tokens: a form of the application carries one, and a form of another site cannot know one."""

import base64
import hmac
import re
import secrets
from typing import Final

_SIZE: Final = 32
_TOKEN: Final = re.compile(r"[0-9A-Za-z_-]{86}")  # Base64 of 64 bytes, without padding.


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one) ^ int.from_bytes(other)).to_bytes(_SIZE)


class CSRFTokens:
    """Makes tokens from a secret of 32 bytes, and checks them.

    Each token holds a random mask, and the secret masked with it. So each token differs, and the secret cannot be
    guessed from the length of compressed responses (BREACH).
    """

    def create(self, secret: bytes) -> str:
        """Return a new URL-safe token."""
        mask = secrets.token_bytes(_SIZE)
        return base64.urlsafe_b64encode(mask + _xor(mask, secret)).rstrip(b"=").decode()

    def verify(self, secret: bytes, token: str | None) -> bool:
        """Return whether a token was made from this secret. Return False for None, and for a malformed token."""
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            return False
        both = base64.urlsafe_b64decode(token + "==")
        return hmac.compare_digest(_xor(both[:_SIZE], both[_SIZE:]), secret)
