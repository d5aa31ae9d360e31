"""What can go wrong. No text here ever holds a session id, a value or a key."""

from datetime import datetime


class SessionError(Exception):
    """Base of all errors of this library; raised itself for data in Redis that is not ours, or not readable."""


class SessionNotFound(SessionError):
    """Raised when an operation needs a session and there is none: it expired, or never was."""


class SessionEnded(SessionNotFound):
    """Raised when a session that was ended is written to, for as long as its tombstone lasts."""

    #: Why it was ended: "deleted" or the *reason* given for it, "rotated", "evicted" (by a limit), "expired" (it is
    #: older than `max_lifetime`), or "revoked" (it is not in the set of a strict reference).
    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the session was ended: {self.reason}"


class Conflict(SessionError):
    """Raised by `set` when a field does not hold what *expect* says; nothing was written."""


class LimitExceeded(SessionError):
    """Raised when a reference refuses one more session for a value; nothing was written."""

    #: The field of that reference.
    field: str

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field

    def __str__(self) -> str:
        return f"no more sessions are allowed for this value of {self.field!r}"


class Blocked(LimitExceeded):
    """Raised when a value of a reference is blocked, so no session may join it; nothing was written."""

    #: Why, as `SessionStore.block` was told.
    reason: str
    #: Until when, by the clock of Redis, in UTC.
    until: datetime

    def __init__(self, field: str, reason: str, until: datetime) -> None:
        super().__init__(field)
        self.args = (field, reason, until)
        self.reason = reason
        self.until = until

    def __str__(self) -> str:
        return f"this value of {self.field!r} is blocked: {self.reason}"


class IdentityChanged(SessionError):
    """Raised by a write that would change who is signed in, under the same session id; nothing was written.

    `rotate` changes the identity of a session, and gives it a new id.
    """


class StoreUnavailable(SessionError):
    """Raised when Redis gave no answer, or refused to work, until the deadline. Never means that there is no session.

    The operation may or may not have taken effect.
    """
