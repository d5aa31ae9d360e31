"""Errors of Redis into ours, and which of them a retry can help."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

import redis.exceptions

from rss.errors import (
    Blocked,
    Conflict,
    IdentityChanged,
    LimitExceeded,
    SessionEnded,
    SessionError,
    SessionNotFound,
    StoreUnavailable,
)

# The script did not run. _PASSING: retry until the deadline. _LASTING: an operator must act, so retrying cannot help.
_PASSING: Final = {"NOSCRIPT", "BUSY", "LOADING", "READONLY", "NOREPLICAS", "MASTERDOWN"}
_LASTING: Final = {"OOM", "MISCONF", "AUTH"}
#: The server is no master (any more). A new connection may find the one that is.
DEMOTED: Final = {"READONLY", "MASTERDOWN"}

# redis-py takes the code off the text of errors that have a class. They occur while it makes a connection.
_CLASSES: Final[dict[type[Exception], str]] = {
    redis.exceptions.AuthenticationError: "AUTH",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.MasterDownError: "MASTERDOWN",
}
_ALIASES: Final = {"NOAUTH": "AUTH", "WRONGPASS": "AUTH"}
# Redis 6.2 and 7.0 put the code of an error inside a script behind some words of their own.
_CODE: Final = re.compile(rf"(?:^|[ :]-|ERR )({'|'.join([*_PASSING, *_LASTING, *_ALIASES])})\b")
_FORBIDDEN: Final = re.compile(r"^NOPERM|ACL failure|has no permissions|can't run this command")
_COMMAND: Final = re.compile(r"'([\w|]+)' command")


def _blocked(rest: str) -> Blocked:
    until, reason, field = rest.split(" ", 2)
    return Blocked(field, reason, datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=int(until)))


# The errors that the scripts return: the first word, and what the rest makes.
_REFUSALS: Final[dict[str, Callable[[str], Exception]]] = {
    "RSSNOTFOUND": lambda _: SessionNotFound("there is no such session"),
    "RSSENDED": SessionEnded,
    "RSSCONFLICT": lambda _: Conflict("a field does not hold what was expected; nothing was written"),
    "RSSIDENTITY": lambda _: IdentityChanged("a session keeps its identity: rotate it to sign somebody in or out"),
    "RSSLIMIT": LimitExceeded,
    "RSSBLOCKED": _blocked,
    "RSSINTEGER": lambda _: ValueError("the field does not hold an integer, or the sum does not fit into 64 bits"),
}


def code_of(error: BaseException) -> str:
    """Return the code of an error of Redis, such as "OOM", if it is one of those listed above; else ""."""
    for kind, code in _CLASSES.items():  # redis-py wraps what happens while it connects into a ConnectionError.
        if isinstance(error, kind) or isinstance(error.__cause__, kind):
            return code
    if not isinstance(error, redis.exceptions.ResponseError):
        return ""
    if "unauthenticated" in str(error):  # The reply to a large command, in place of NOAUTH.
        return "AUTH"
    match = _CODE.search(str(error))
    return _ALIASES.get(match[1], match[1]) if match else ""


def error_for(error: BaseException) -> Exception | None:
    """Return what a caller gets for an error of Redis: a new exception each time. None if a retry may help."""
    code, text = code_of(error), str(error).removeprefix("ERR ")
    if code in _PASSING or (not code and not isinstance(error, redis.exceptions.ResponseError)):
        return None
    if code:
        return unavailable(f"Redis refuses: {code}", error)
    word, _, rest = text.partition(" ")
    if refusal := _REFUSALS.get(word):
        return refusal(rest)
    if "unknown command" in text:  # No cause: it would show keys.
        return SessionError("Redis does not know the command EVALSHA: it has no Lua")
    if "WRONGTYPE" in text:
        ours = SessionError("a key of ours holds another type of data; nothing was written. Is the prefix shared?")
    elif _FORBIDDEN.search(text):
        command = _COMMAND.search(text)
        what = f"the command {command[1]}" if command else "a command or a key of the scripts"
        ours = SessionError(f"this user of Redis has no permission for {what}: see the ACL rule in the README")
    else:
        ours = SessionError("Redis refused the operation: the cause says why")
    ours.__cause__ = error
    return ours


def final_error_for(error: BaseException) -> Exception:
    """Return what a caller gets who is told at once, even if a retry might help."""
    return error_for(error) or unavailable(f"Redis refuses: {code_of(error)}", error)


def unavailable(why: str, cause: BaseException | None) -> StoreUnavailable:
    """Return the error for a call that Redis did not answer; *cause* is the last failure."""
    ours = StoreUnavailable(why)
    ours.__cause__ = cause
    return ours


def mistake(error: BaseException) -> SessionError:
    """Return the error for a mistake in this library, or in redis-py."""
    ours = SessionError(f"a mistake in redis-session-sets: {type(error).__name__}")
    ours.__cause__ = error
    return ours


def lost(error: BaseException | None) -> redis.exceptions.RedisError:
    """Return the error for a connection that broke; *error* is what asyncio says about it, if anything."""
    if isinstance(error, redis.exceptions.RedisError):
        return error
    ours = redis.exceptions.ConnectionError("the connection was lost")
    ours.__cause__ = error
    return ours
