"""A line in the log for each call that failed or was slow."""

import logging

from rss.durations import Duration, milliseconds
from rss.errors import SessionError, StoreUnavailable
from rss.observe import Observation

_logger = logging.getLogger("rss.observe")


class Logging:
    """An observer that logs calls that failed or were slow, to the logger "rss.observe".

    *slow*: a call that takes at least this long is logged even if it succeeds.

    The level is WARNING if the call was slow, or if Redis did not answer or refused to work. It is INFO if the call got
    another error, such as `SessionEnded`. Anybody with an old cookie can cause these.

    A line names no session, because an `Observation` does not.
    """

    def __init__(self, slow: Duration = "100ms") -> None:
        self._slow = milliseconds(slow, "slow") / 1000

    def __call__(self, observation: Observation, /) -> None:
        operation, duration, batch, attempts, error = observation
        slow = duration >= self._slow
        if error is None and not slow:
            return
        broken = error is SessionError or (error is not None and issubclass(error, StoreUnavailable))
        _logger.log(
            logging.WARNING if slow or broken else logging.INFO,
            "operation=%s duration=%.6f batch=%d attempts=%d error=%s",
            operation,
            duration,
            batch,
            attempts,
            error.__name__ if error else "none",
        )
