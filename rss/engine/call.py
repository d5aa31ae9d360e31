"""One call of an operation: what is sent for it, and the future of its reply."""

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from typing import Any

from rss.engine.failures import code_of, with_cause
from rss.errors import StoreUnavailable

_Callback = Callable[["Call"], object]


class Call(asyncio.Future[Any]):
    """A call of one caller: what is sent for it, and the future that its coroutine awaits.

    A common future wakes its caller in the next turn of the event loop. `answer` runs the caller at once. So by the end
    of a read all callers have made their next calls, and one write sends them. Where few calls are made at a time, that
    saves a fifth of the processor time.

    So asyncio's debug mode reports a caller that blocks the loop as a slow read of the transport.
    """

    __slots__ = ("_waiter", "args", "deadline", "keys", "losses", "size")

    keys: Sequence[str]
    args: Sequence[str | bytes]
    #: Bytes of the arguments, if they may be many.
    size: int
    #: The loop's time at which the caller gets `StoreUnavailable`.
    deadline: float
    #: How many channels broke while it was in flight.
    losses: int
    _waiter: tuple[_Callback, contextvars.Context] | None  # The callback that wakes the awaiting task.

    @classmethod
    def make(
        cls,
        loop: asyncio.AbstractEventLoop,
        keys: Sequence[str],
        args: Sequence[str | bytes],
        size: int,
        deadline: float,
    ) -> "Call":
        """Return a new call. An `__init__` would take twice the time."""
        call = cls(loop=loop)
        call.keys, call.args, call.size, call.deadline = keys, args, size, deadline
        call.losses, call._waiter = 0, None
        return call

    def add_done_callback(self, fn: _Callback, /, *, context: contextvars.Context | None = None) -> None:
        """Add a callback, as any future. A task registers its wake-up with a context: the first one is kept apart."""
        if self._waiter is None and context is not None and not self.done():
            self._waiter = fn, context
        else:
            super().add_done_callback(fn, context=context)

    def answer(self, result: Any) -> None:
        """Set the result, and run the caller until it awaits something else. No task may be running."""
        waiter, self._waiter = self._waiter, None
        super().set_result(result)
        if waiter:
            wake, context = waiter
            try:
                context.run(wake, self)
            except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt or SystemExit of the caller
                self.get_loop().call_soon(_reraise, error)  # Other callers get their replies before the loop ends.

    def set_result(self, result: Any, /) -> None:
        """Answer with a result. The caller goes on in the next turn."""
        self._wake_later()
        super().set_result(result)

    def set_exception(self, exception: type[BaseException] | BaseException, /) -> None:
        """Answer with an error. The caller goes on in the next turn."""
        self._wake_later()
        super().set_exception(exception)

    def cancel(self, msg: Any | None = None) -> bool:
        """Note that the caller is gone."""
        self._wake_later()
        return super().cancel(msg)

    def _wake_later(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter:
            super().add_done_callback(waiter[0], context=waiter[1])

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless the caller has an answer or is gone."""
        if not self.done():
            self.set_exception(error)

    def expire(self, error: Exception | None) -> None:
        """Answer that the deadline has passed; *error* is the last failure."""
        why = "it takes too long"
        if error and not isinstance(error, TimeoutError):
            why = code_of(error) or type(error).__name__
        self.fail(with_cause(StoreUnavailable(f"no answer from Redis within the deadline: {why}"), error))


def _reraise(error: BaseException) -> None:
    raise error
