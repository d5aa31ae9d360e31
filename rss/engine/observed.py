"""A call that tells an observer how it ended."""

import asyncio
import contextvars
import time
from typing import Any

from rss.engine.call import Call, reraise
from rss.observe import Observation, Observer


class ObservedCall(Call):
    """A call that tells an observer how it ended, in the context of its caller, before the caller continues."""

    __slots__ = ("_attempts", "_batch", "_begun", "_context", "_name", "_observe")

    observed = True

    def begin(self, name: str, observe: Observer) -> None:
        """Note how and when the call begins. Run this in the context of the caller.

        *observe*: an observer that raises no error. See `guarded`.
        """
        self._name, self._observe = name, observe
        self._context = contextvars.copy_context()  # That of the caller is entered while its task runs.
        self._batch = self._attempts = 0
        self._begun = time.perf_counter()  # The time of uvloop stands still while callbacks run.

    def sent(self, batch: int) -> None:
        """Note one more attempt."""
        self._batch = batch
        self._attempts += 1

    def answer(self, result: Any) -> None:
        """Tell the observer, set the result, and run the caller. Call this only while no task is running."""
        self._context.run(self._observe, self._observation(None))
        super().answer(result)

    def set_result(self, result: Any, /) -> None:
        """Tell the observer, and set the result. The caller continues in the next turn of the loop."""
        self._context.run(self._observe, self._observation(None))
        super().set_result(result)

    def set_exception(self, exception: type[BaseException] | BaseException, /) -> None:
        """Set an error. In the next turn of the loop, the observer is told, then the caller continues."""
        self._tell_later(exception if isinstance(exception, type) else type(exception))
        super().set_exception(exception)

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel the call. In the next turn of the loop, the observer is told, then the caller continues."""
        if not self.done():
            self._tell_later(asyncio.CancelledError)
        return super().cancel(msg)

    def _tell_later(self, error: type[BaseException]) -> None:
        # Not now: many calls may be failing, and the observer may make new ones.
        self.get_loop().call_soon(self._observe, self._observation(error), context=self._context)

    def _observation(self, error: type[BaseException] | None) -> Observation:
        return Observation(self._name, time.perf_counter() - self._begun, self._batch, self._attempts, error)


def guarded(observe: Observer) -> Observer:
    """Return an observer that raises no error. It passes the first one to the exception handler of the event loop."""
    reported = False

    def tell(observation: Observation) -> None:
        nonlocal reported
        try:
            observe(observation)
        except Exception as error:  # noqa: BLE001 - no caller must notice
            if not reported:
                reported = True
                message = "the observer of a SessionStore failed; further errors of it are not reported"
                asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt or SystemExit
            asyncio.get_running_loop().call_soon(reraise, error)  # All callers get their replies before the loop ends.

    return tell
