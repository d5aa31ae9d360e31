"""What can go wrong. No text here ever holds a session id, a value or a key."""


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
        super().__init__(f"the session was ended: {reason}")
        self.reason = reason


class Conflict(SessionError):
    """Raised by `set` when a field does not hold what `expect` says; nothing was written."""


class LimitExceeded(SessionError):
    """Raised when a reference refuses one more session for a value; nothing was written."""

    #: The field of that reference.
    field: str

    def __init__(self, field: str) -> None:
        super().__init__(f"no more sessions are allowed for this value of {field!r}")
        self.field = field


class StoreUnavailable(SessionError):
    """Raised when Redis gave no answer, or refused to work, until the deadline. Never means that there is no session.

    The operation may or may not have taken effect.
    """
