"""Spans and metrics for OpenTelemetry, by its semantic conventions for databases.

This needs the extra `[opentelemetry]`.
"""

import time
from typing import Final

from opentelemetry import metrics, trace
from opentelemetry.trace import SpanKind, StatusCode

from rss.observe import Observation

# The boundaries that the conventions recommend, in seconds.
_SECONDS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
# Operations that are plain commands of Redis. All others are scripts.
_COMMANDS: Final = {"scard", "hget", "hset", "hdel", "set"}


class OpenTelemetry:
    """An observer that makes a span and records the duration of each call.

    *tracer_provider*, *meter_provider*: None stands for the global one.

    The span is a child of the current span of the caller. Its name is that of the script, as in "EVALSHA get".
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer("rss", tracer_provider=tracer_provider)
        self._duration = metrics.get_meter("rss", meter_provider=meter_provider).create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of database client operations.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )

    def __call__(self, observation: Observation, /) -> None:
        operation, duration, batch, attempts, error = observation
        end = time.time_ns()
        attributes: dict[str, str | int] = {"db.system.name": "redis"}
        if operation in _COMMANDS:
            name = attributes["db.operation.name"] = operation.upper()
        else:
            name = f"EVALSHA {operation}"
            attributes |= {"db.operation.name": "EVALSHA", "db.stored_procedure.name": operation}
        if error:
            attributes["error.type"] = error.__qualname__
        self._duration.record(duration, attributes)
        if batch > 1:  # The conventions forbid a batch of one.
            attributes["db.operation.batch.size"] = batch
        if attempts != 1:
            attributes["rss.attempts"] = attempts
        start = end - round(duration * 1e9)
        span = self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes, start_time=start)
        if error:
            span.set_status(StatusCode.ERROR)
        span.end(end)
