"""Metrics for Prometheus. This needs the extra `[prometheus]`."""

import functools
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from rss.observe import Observation

_SECONDS: Final = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES: Final = (1, 2, 5, 10, 20, 50, 100)


class Prometheus:
    """An observer that keeps metrics in a registry.

    Make one of these for all stores of a process: a registry takes each metric once.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        durations = Histogram(
            "rss_operation_duration_seconds",
            "Seconds from a call until its result, with all waits and retries. The error is empty if it succeeded.",
            ["operation", "error"],
            registry=registry,
            buckets=_SECONDS,
        )
        sizes = Histogram(
            "rss_batch_size",
            "The number of calls in the EVALSHA that a call was sent in.",
            ["operation"],
            registry=registry,
            buckets=_SIZES,
        )
        retries = Counter(
            "rss_operation_retries_total", "How often calls were sent again.", ["operation"], registry=registry
        )
        # To look up a label takes as long as to count.
        self._duration = functools.cache(durations.labels)
        self._size = functools.cache(sizes.labels)
        self._retries = functools.cache(retries.labels)

    def __call__(self, observation: Observation, /) -> None:
        operation, duration, batch, attempts, error = observation
        self._duration(operation, error.__name__ if error else "").observe(duration)
        retries = self._retries(operation)  # Here, so that the counter is 0 before the first retry.
        if batch:
            self._size(operation).observe(batch)
        if attempts > 1:
            retries.inc(attempts - 1)
