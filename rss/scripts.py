"""Runs the scripts of `lua/` on Redis: loads them, sends them, and makes its errors ours."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, cast

import anyio
import hiredis
import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

from rss.errors import Conflict, LimitExceeded, SessionEnded, SessionError, SessionNotFound, StoreUnavailable

_Commands = Sequence[Sequence[str | bytes | int]]

_NEEDS: Final = re.compile(r"Needs (_\w+)\.lua\.")

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

    def with_needs(source: str) -> str:
        needs = _NEEDS.search(source)
        return with_needs(files[needs[1]]) + source if needs else source

    return {name: with_needs(source) for name, source in files.items() if not name.startswith("_")}


#: The scripts as Redis gets them, by name.
SCRIPTS: Final = _read_scripts()
_LOAD: Final = [("SCRIPT", "LOAD", source) for source in SCRIPTS.values()]
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


def error_for(error: BaseException) -> Exception | None:
    """Return the error of ours that one of Redis stands for; None if what failed may succeed when it is tried again."""
    code, words = _code(error), str(error)
    if code in _LASTING:
        ours: Exception = StoreUnavailable(f"Redis refuses: {code}")
        ours.__cause__ = error
        return ours
    if code in _PASSING or not isinstance(error, redis.exceptions.ResponseError):
        return None
    word, _, rest = words.partition(" ")
    ours = type(error)(words)  # A new one for each caller.
    match word:
        case "RSSNOTFOUND":
            ours = SessionNotFound("there is no such session")
        case "RSSENDED":
            ours = SessionEnded(rest)
        case "RSSCONFLICT":
            ours = Conflict("a field does not hold what was expected; nothing was written")
        case "RSSLIMIT":
            ours = LimitExceeded(rest)
        case _ if "WRONGTYPE" in words:
            ours = SessionError("a key of ours holds another type of data; nothing was written. Is the prefix shared?")
        case "RSSINTEGER":
            ours = ValueError("the field does not hold an integer, or the sum does not fit into 64 bits")
        case _ if "with args beginning" in words:  # It would show keys.
            ours = SessionError("Redis does not know the command EVALSHA")
    return ours


class Unanswered(Exception):
    """An attempt failed for the reason that is its cause; another one may succeed."""

    #: The connection broke after the script was sent: it may have been run all the same.
    doubtful: bool

    def __init__(self, *, doubtful: bool) -> None:
        super().__init__()
        self.doubtful = doubtful

    def __str__(self) -> str:
        return _code(self.__cause__) or type(self.__cause__).__name__ if self.__cause__ else ""


class _Unsent(redis.exceptions.ConnectionError):
    """The connection was lost before the command was sent."""


_NOT_RUN: Final = (redis.exceptions.ResponseError, redis.exceptions.BusyLoadingError, _Unsent)


class Scripts:
    """The scripts, on the Redis of one client. It borrows connections and leaves the client as it is."""

    def __init__(self, client: Redis, timeout: float) -> None:
        self._pool = client.connection_pool
        self._timeout = timeout
        self._loaded: object = None  # Another one after each time.
        self._loading = asyncio.Lock()

    @property
    def max_connections(self) -> int:
        """How many connections the client has to lend."""
        return self._pool.max_connections

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AbstractConnection]:
        """Borrow a connection. Raises `Unanswered`, or what Redis says to one who comes."""
        try:
            with anyio.fail_after(self._timeout):
                connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        except (redis.exceptions.RedisError, OSError) as error:
            if error_for(error):
                raise
            raise Unanswered(doubtful=False) from error
        try:
            yield connection
        finally:
            with anyio.CancelScope(shield=True):
                await self._pool.release(connection)

    async def run(
        self, connection: AbstractConnection, name: str, keys: Sequence[str], args: Sequence[str | bytes]
    ) -> list[Any]:
        """Make one attempt to run a script for a batch of sessions, and return a reply for each, or the error it got.

        A script may stop early: there is no reply then for the sessions it did not look at. Raises `Unanswered`, or
        what Redis says of the first session or of the script as a whole.
        """
        loaded = self._loaded or await self._load(connection)
        try:
            (replies,) = await _exchange(connection, [("EVALSHA", _SHAS[name], len(keys), *keys, *args)])
        except Unanswered as unanswered:
            if str(unanswered) == "NOSCRIPT" and self._loaded is loaded:
                self._loaded = None
            raise
        return cast("list[Any]", replies)

    async def _load(self, connection: AbstractConnection) -> object:
        """Load all scripts in one round trip, unless another caller did so meanwhile."""
        async with self._loading:
            if not self._loaded:
                try:
                    await _exchange(connection, _LOAD)
                except Unanswered as unanswered:
                    unanswered.doubtful = False  # What they are to do has not begun.
                    raise
                self._loaded = object()
            return self._loaded


async def _exchange(connection: AbstractConnection, commands: _Commands) -> list[Any]:
    """Send commands, once, and return their replies."""
    # Packed here it takes an eighth of the time that the connection would.
    packed = b"".join([hiredis.pack_command(cast("Any", tuple(command))) for command in commands])
    try:
        try:
            await connection.send_packed_command(packed)
        except (AttributeError, TypeError) as error:
            # What redis-py raises on some versions of Python when the peer has reset an idle connection.
            if connection.is_connected:
                raise
            raise _Unsent from error
        return [await connection.read_response(disable_decoding=True) for _ in commands]
    except (redis.exceptions.RedisError, OSError) as error:
        # The replies behind an error must not be taken for others; a demoted master is best asked no more.
        if len(commands) > 1 or _code(error) == "READONLY":
            await connection.disconnect()
        if error_for(error):
            raise
        raise Unanswered(doubtful=not isinstance(error, _NOT_RUN)) from error
