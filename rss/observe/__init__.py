"""Metrics, traces and logs: a store tells its observer about each call that has finished.

    store = SessionStore(client, observe=Logging(slow="100ms"))

The observers are in `rss.observe.logging`, `rss.observe.prometheus` and `rss.observe.opentelemetry`. Any function that
takes an `Observation` is an observer too.
"""

from typing import NamedTuple, Protocol


class Observation(NamedTuple):
    """A call of a script that has finished. It never holds an id, a key or a value."""

    #: The name of the script in `lua/`, such as "set_with_refs", or of a plain command, such as "scard".
    operation: str
    #: Seconds from the call until its result, with all waits and retries.
    duration: float
    #: The number of calls in the EVALSHA that the call was last sent in. 0: it was never sent.
    batch: int
    #: How often the call was sent. More than once if it was retried, or if a script had no time left for it.
    attempts: int
    #: The class of the error that the caller gets; None if there is none. `CancelledError` if the caller was cancelled.
    error: type[BaseException] | None


class Observer(Protocol):
    """A function that a store calls once for each call that has finished, before the caller continues.

    It runs in the context of the caller, so a tracer finds the current span there. All callers wait for it, so it must
    be fast. If it raises an error, no caller notices. The exception handler of the event loop gets the first error.
    """

    def __call__(self, observation: Observation, /) -> object: ...
