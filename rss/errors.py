"""The errors of this library. Their texts never hold a session id, a value or a key."""

from datetime import datetime
from pathlib import Path

import rss

# Other distributions have a package `rss` too. Installed in the same folder, such a package overwrites our __init__.py,
# and uninstalling it removes the file. Every module that needs Redis imports this one.
if getattr(rss, "__distribution__", "") != "redis-session-sets":  # pragma: no cover - a test breaks a copy
    raise ImportError(
        f"rss/__init__.py in {Path(__file__).parents[1]} is not that of redis-session-sets: another distribution with "
        "a package rss has overwritten or removed it. Uninstall that one, and install redis-session-sets again with "
        "pip install --force-reinstall"
    )


class SessionError(Exception):
    """The base of all errors of this library.

    It is raised itself for data that is unreadable or not of this library, for missing rights, and for bugs.
    """


class SessionNotFound(SessionError):
    """Raised when an operation needs a session that does not exist: it expired, or was never made."""


class SessionEnded(SessionNotFound):
    """Raised by a write to a session that was ended, while its tombstone lasts: usually five minutes."""

    #: Why the session was ended: "deleted", or the *reason* that the caller gave. "rotated": it got a new id.
    #: "evicted": a limit ended it. "expired": it is older than `max_lifetime`. "revoked": it is not in the set of a
    #: strict reference.
    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the session was ended: {self.reason}"


class Conflict(SessionError):
    """Raised by `set` when a field does not hold the value in *expect*. Nothing was written."""


class LimitExceeded(SessionError):
    """Raised when a value of a reference already has as many sessions as its limit allows. Nothing was written."""

    #: The field of the reference.
    field: str

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field

    def __str__(self) -> str:
        return f"no more sessions are allowed for this value of {self.field!r}"


class Blocked(LimitExceeded):
    """Raised when no session may join a value of a reference, because it is blocked. Nothing was written."""

    #: The *reason* that `block` or `delete_by` was given.
    reason: str
    #: The end of the block, in UTC, by the clock of Redis.
    until: datetime

    def __init__(self, field: str, reason: str, until: datetime) -> None:
        super().__init__(field)
        self.args: tuple[object, ...] = (field, reason, until)
        self.reason = reason
        self.until = until

    def __str__(self) -> str:
        return f"this value of {self.field!r} is blocked: {self.reason}"


class IdentityChanged(SessionError):
    """Raised by a write that would change the identity of a session without changing its id. Nothing was written.

    Use `rotate`: it gives the session a new id, and may change the identity.
    """


class StoreUnavailable(SessionError):
    """Raised when Redis did not answer before the deadline, or refused to work.

    It never means that the session does not exist. The operation may or may not have taken effect.
    """


class PartlyDone(StoreUnavailable):
    """Raised by `delete_by` and `block` when some partitions did not answer. Call again until it returns."""

    #: The number of sessions that were ended.
    ended: int
    #: The number of partitions that did not answer.
    unfinished: int
    #: The number of all partitions.
    partitions: int

    def __init__(self, ended: int, unfinished: int, partitions: int) -> None:
        super().__init__(ended, unfinished, partitions)
        self.ended = ended
        self.unfinished = unfinished
        self.partitions = partitions

    def __str__(self) -> str:
        return f"{self.unfinished} of {self.partitions} partitions did not answer; {self.ended:,} sessions were ended"


class IncompleteReference(SessionError):
    """Raised by `ids_by`, `find_by`, `count_by`, `delete_by` and `block` when they may have missed sessions.

    Stores with this prefix have, or had, different references. A store makes no entries for a reference that it lacks.
    So the sets of this reference may be incomplete, until they are made complete by `rss reindex`. The operation has
    done what it could.
    """

    #: The field of the reference.
    field: str
    #: The number of sessions that `delete_by` or `block` ended.
    ended: int
    #: The number of sessions that `ids_by` or `count_by` found; of `count_by` with *exact* False, the number of ids.
    found: int

    def __init__(self, field: str, ended: int = 0, found: int = 0) -> None:
        super().__init__(field, ended, found)
        self.field = field
        self.ended = ended
        self.found = found

    def __str__(self) -> str:
        done = f"; {self.ended:,} sessions were ended" if self.ended else ""
        return f"the reference {self.field!r} is incomplete, so sessions may be missing: reindex it{done}"
