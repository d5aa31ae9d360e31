"""Runs the scripts of `lua/` on Redis: loads them, repeats what is safe to repeat, and makes its errors ours."""

import asyncio
import hashlib
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import anyio
import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

from rss.errors import Conflict, LimitExceeded, SessionEnded, SessionError, SessionNotFound, StoreUnavailable

_Commands = Sequence[Sequence[str | bytes]]

_SHARED: Final = ("_store", "_session", "_refs")
_CONNECTIONS: Final = 32

_FAILURES: Final = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError)
# Redis refused to run the script: what it will do later, and what it will not until somebody acts.
_PASSING: Final = {"NOSCRIPT", "BUSY", "LOADING", "READONLY", "NOREPLICAS", "MASTERDOWN"}
_LASTING: Final = {"OOM", "MISCONF", "AUTH"}
# redis-py takes the code off the text of errors that have a class. Redis 6.2 puts it behind some words of its own.
_CLASSES: Final[dict[type[Exception], str]] = {
    redis.exceptions.AuthenticationError: "AUTH",
    redis.exceptions.NoScriptError: "NOSCRIPT",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.MasterDownError: "MASTERDOWN",
}
_CODE: Final = re.compile(r"(?:^|[ :]-)(BUSY|READONLY|NOREPLICAS|MASTERDOWN|OOM|MISCONF) ")


def _read_scripts() -> dict[str, str]:
    folder = Path(__file__).with_name("lua")
    if not folder.exists():  # In a checkout it lies beside the package.
        folder = folder.parent.with_name("lua")
    files = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.lua"))}
    shared = "".join(files.pop(name) for name in _SHARED)
    return {name: shared + source for name, source in files.items()}


#: The scripts as Redis gets them, by name.
SCRIPTS: Final = _read_scripts()
_LOAD: Final = [("SCRIPT LOAD", source) for source in SCRIPTS.values()]
_SHAS: Final = {
    name: hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest() for name, source in SCRIPTS.items()
}


def _code(error: BaseException) -> str:
    # What goes wrong while a connection is made comes wrapped into a ConnectionError.
    for kind, code in _CLASSES.items():
        if isinstance(error, kind) or isinstance(error.__cause__, kind):
            return code
    if not isinstance(error, redis.exceptions.ResponseError):
        return ""
    if "unauthenticated" in str(error):  # What a large command gets instead of NOAUTH.
        return "AUTH"
    match = _CODE.search(str(error))
    return match[1] if match else ""


def _error_for(reply: redis.exceptions.ResponseError) -> Exception:
    """Return the error of ours that one session's reply stands for."""
    word, _, rest = str(reply).partition(" ")
    error: Exception = reply
    match word:
        case "RSSNOTFOUND":
            error = SessionNotFound("there is no such session")
        case "RSSENDED":
            error = SessionEnded(rest)
        case "RSSCONFLICT":
            error = Conflict("a field does not hold what was expected; nothing was written")
        case "RSSLIMIT":
            error = LimitExceeded(rest)
        case _ if "WRONGTYPE" in str(reply):
            error = SessionError("a key of ours holds another type of data; nothing was written. Is the prefix shared?")
        case "RSSINTEGER":
            error = ValueError("the field does not hold an integer, or the sum does not fit into 64 bits")
        case _ if "with args beginning" in str(reply):  # It would show keys.
            error = SessionError("Redis does not know the command EVALSHA")
    return error


class _Interrupted(Exception):
    """The exchange broke off after the command may have been sent."""


class _Unsent(redis.exceptions.ConnectionError):
    """The connection was lost before the command was sent."""


class Scripts:
    """The scripts, on the Redis of one client. It borrows connections and leaves the client as it is."""

    def __init__(self, client: Redis, timeout: float) -> None:
        self._pool = client.connection_pool
        self._timeout = timeout
        self._loading = asyncio.Lock()
        self._loads = 0
        # A pool raises when it has no connection left: rather queue here than fail there.
        self._connections = asyncio.Semaphore(min(_CONNECTIONS, self._pool.max_connections))

    async def load(self) -> None:
        """Load all scripts in one round trip."""
        await self._answer(_LOAD, repeatable=True)
        self._loads += 1

    async def run(self, name: str, keys: Sequence[str], args: Sequence[str | bytes], *, repeatable: bool = True) -> Any:
        """Run a script for one session and return its reply; raise the error that the reply stands for.

        Until the deadline it is run again whenever Redis surely did not run it, and, if *repeatable*, also when that
        is not known since the connection broke. Raises `StoreUnavailable` then.
        """
        (replies,) = await self._answer([("EVALSHA", _SHAS[name], str(len(keys)), *keys, *args)], repeatable=repeatable)
        reply = replies[0]
        if isinstance(reply, redis.exceptions.ResponseError):
            raise _error_for(reply) from None
        return reply

    async def _answer(self, commands: _Commands, *, repeatable: bool) -> list[Any]:
        """Return the replies to these commands, however many attempts it takes within the deadline."""
        failure: BaseException | None = None
        missing, attempts, loads = False, 0, 0
        with anyio.move_on_after(self._timeout):
            while True:
                try:
                    if missing:
                        await self._load_missing(loads)
                    loads = self._loads
                    return await self._exchange(commands)
                except _Interrupted as interrupted:
                    failure = interrupted.__cause__
                    if not repeatable:
                        raise StoreUnavailable("the connection broke: it is not known what was done") from failure
                except (redis.exceptions.ResponseError, *_FAILURES) as error:
                    failure, code = error, _code(error)
                    missing = code == "NOSCRIPT"
                    if code in _LASTING:
                        raise StoreUnavailable(f"Redis refuses: {code}") from error
                    if isinstance(error, redis.exceptions.ResponseError) and code not in _PASSING:
                        raise _error_for(error) from None
                if attempts:
                    await anyio.sleep(min(0.25, 0.005 * 2 ** min(attempts, 8)) * random.uniform(0.5, 1))  # noqa: S311 - jitter
                attempts += 1
        reason = _code(failure) or type(failure).__name__ if failure else "it takes too long"
        raise StoreUnavailable(f"no answer from Redis within the deadline: {reason}") from failure

    async def _load_missing(self, loads: int) -> None:
        """Load the scripts, unless another caller has since they were loaded that many times."""
        async with self._loading:
            if loads == self._loads:
                try:
                    await self._exchange(_LOAD)
                except _Interrupted as interrupted:  # No doubt about the operation: it has not been run yet.
                    raise redis.exceptions.ConnectionError from interrupted.__cause__
                self._loads += 1

    async def _exchange(self, commands: _Commands) -> list[Any]:
        """Send commands on one connection, once, and return their replies; raise the first error among them."""
        async with self._connections:
            connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
            try:
                await self._send(connection, commands)
                return [await connection.read_response(disable_decoding=True) for _ in commands]
            except (redis.exceptions.BusyLoadingError, redis.exceptions.AuthenticationError, _Unsent):
                raise
            except redis.exceptions.ResponseError as error:
                # The replies behind an error must not be taken for others; a demoted master is best asked no more.
                if len(commands) > 1 or _code(error) == "READONLY":
                    await connection.disconnect()
                raise
            except _FAILURES as error:
                raise _Interrupted from error
            finally:
                with anyio.CancelScope(shield=True):
                    await self._pool.release(connection)

    @staticmethod
    async def _send(connection: AbstractConnection, commands: _Commands) -> None:
        packed = connection.pack_commands(commands)
        try:
            await connection.send_packed_command(packed)
        except (AttributeError, TypeError) as error:
            # What redis-py raises on some versions of Python when the peer has reset an idle connection.
            if connection.is_connected:
                raise
            raise _Unsent from error
