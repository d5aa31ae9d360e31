"""Convert errors of Redis to errors of this library, and decide which of them are worth a retry."""

import re
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

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

_E = TypeVar("_E", bound=BaseException)

# The script did not run. _PASSING: retry until the deadline. _LASTING: an operator must act, so retrying cannot help.
_PASSING: Final = {
    "NOSCRIPT", "BUSY", "LOADING", "READONLY", "NOREPLICAS", "MASTERDOWN", "MAXCLIENTS", "CLUSTERDOWN", "TRYAGAIN",
    "RSSLATER",
}  # fmt: skip
_LASTING: Final = {"OOM", "MISCONF", "AUTH"}
#: The server is a node of a cluster. It does not have the slot, or will lose it, or there are several slots.
REDIRECTED: Final = {"MOVED", "ASK", "CROSSSLOT"}
#: The code of a script that needs a key which a moving slot may have on the other master.
LATER: Final = "RSSLATER"
#: The server is not the master. A new connection may reach the master.
DEMOTED: Final = {"READONLY", "MASTERDOWN"}

# If an error has its own class, redis-py removes the code from its text. This happens while redis-py connects.
_CLASSES: Final[dict[type[Exception], str]] = {
    redis.exceptions.AuthenticationError: "AUTH",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.MasterDownError: "MASTERDOWN",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",  # After the one above, which is a kind of it.
    redis.exceptions.TryAgainError: "TRYAGAIN",
    redis.exceptions.MovedError: "MOVED",  # Before the next one, for the same reason.
    redis.exceptions.AskError: "ASK",
}
_ALIASES: Final = {"NOAUTH": "AUTH", "WRONGPASS": "AUTH"}
# Redis 6.2 and 7.0 put other words before the code if a command inside a script fails.
_CODE: Final = re.compile(rf"(?:^|[ :]-|ERR )({'|'.join([*_PASSING, *_LASTING, *_ALIASES, *REDIRECTED])})\b")
# Errors without a code. Redis replies the first one instead of NOAUTH to a large command.
_WORDS: Final = {
    "unauthenticated": "AUTH",
    "max number of clients": "MAXCLIENTS",
    "non local key": LATER,
    "undeclared keys were accessed": LATER,  # Redis 8, if a command of a script has several keys.
}
# Parts of the texts of errors that a wrong configuration causes, and what to tell the operator.
_MISTAKES: Final = {
    "DB index": "this Redis has no database of that number",
    "cluster support disabled": "this Redis is not a Redis Cluster: give the store a Redis",
}
_FORBIDDEN: Final = re.compile(r"^NOPERM|ACL failure|has no permissions|can't run this command")
_COMMAND: Final = re.compile(r"'([\w|]+)' command")


def _blocked(rest: str) -> Blocked:
    until, reason, field = rest.split(" ", 2)
    return Blocked(field, reason, datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=int(until)))


# The errors that the scripts return. Each maps the first word to a function of the rest.
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
    """Return the code of an error of Redis, such as "OOM". Return "" if the code is not listed above."""
    if _first_word(error) in _REFUSALS:  # The rest may be user input, such as a reason.
        return ""
    for kind, code in _CLASSES.items():  # While connecting, redis-py wraps errors in a ConnectionError.
        if isinstance(error, kind) or isinstance(error.__cause__, kind):
            return code
    if not isinstance(error, redis.exceptions.ResponseError):
        return ""
    for words, code in _WORDS.items():
        if words in str(error):
            return code
    match = _CODE.search(str(error))
    return _ALIASES.get(match[1], match[1]) if match else ""


def error_for(error: BaseException) -> Exception | None:
    """Return a new exception for the caller, given an error of Redis. Return None if a retry may help."""
    code, text = code_of(error), str(error)
    if isinstance(error, SessionError):
        return with_cause(type(error)(*error.args), error.__cause__)
    if code in _PASSING or (not code and not isinstance(error, redis.exceptions.ResponseError)):
        return None
    if code and code not in REDIRECTED:
        return with_cause(StoreUnavailable(f"Redis refuses: {code}"), error)
    if refusal := _REFUSALS.get(_first_word(error)):
        return refusal(text.removeprefix("ERR ").partition(" ")[2])
    if "unknown command" in text:  # Without a cause, because its text shows keys.
        return SessionError("Redis does not know the command EVALSHA: it has no Lua")
    if "WRONGTYPE" in text:
        words = "a key of ours holds another type of data; nothing was written. Is the prefix shared?"
    elif code:
        words = "this is a node of a Redis Cluster: give the store a RedisCluster"
    elif _FORBIDDEN.search(text) or isinstance(error, redis.exceptions.NoPermissionError):
        command = _COMMAND.search(text)
        what = f"the command {command[1]}" if command else "a command or a key of the scripts"
        words = f"this user of Redis has no permission for {what}: see the ACL rule in the guide to the store"
    else:
        known = (words for part, words in _MISTAKES.items() if part in text)
        words = next(known, "Redis refused the operation: the cause says why")
    return with_cause(SessionError(words), error)


def _first_word(error: BaseException) -> str:
    return str(error).removeprefix("ERR ").partition(" ")[0]


def final_error_for(error: BaseException) -> Exception:
    """Return a new exception for the caller, given an error of Redis, even if a retry may help."""
    return error_for(error) or with_cause(StoreUnavailable(f"Redis refuses: {code_of(error)}"), error)


def failure_of(error: BaseException) -> Exception:
    """Return an error of this library for one of a command outside of the engine."""
    if isinstance(error, SessionError) or code_of(error) or isinstance(error, redis.exceptions.ResponseError):
        return final_error_for(error)
    return with_cause(StoreUnavailable("Redis does not answer"), error)


def tls_reason(error: BaseException | None) -> str:
    """Return why TLS failed, given an error of a connection. Return "" if it was something else."""
    while error and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return str(getattr(error, "verify_message", "") or getattr(error, "reason", "") or "") if error else ""


def with_cause(error: _E, cause: BaseException | None) -> _E:
    """Set the cause of an error, for its traceback, and return the error."""
    error.__cause__ = cause
    return error
