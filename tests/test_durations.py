"""Lengths of time as users write them."""

from datetime import timedelta
from typing import Any

import pytest

from rss.durations import milliseconds

DAY = 86_400_000


@pytest.mark.parametrize(
    ("duration", "ms"),
    [
        (timedelta(days=28), 28 * DAY),
        (timedelta(milliseconds=1), 1),
        (90, 90_000),
        (0.25, 250),
        ("28 days", 28 * DAY),
        ("28d", 28 * DAY),
        ("1.5h", 5_400_000),
        (".5 h", 1_800_000),
        ("15m", 900_000),
        ("15 Min", 900_000),
        ("90s", 90_000),
        ("100 ms", 100),
        ("100 msecs", 100),
        ("2 weeks", 14 * DAY),
        ("1 year", 31_557_600_000),
        ("1 yr", 31_557_600_000),
        ("100y", 3_155_760_000_000),
        (" 1 hour ", 3_600_000),
    ],
)
def test_a_duration_in_milliseconds(duration: Any, ms: int) -> None:
    """A number means seconds; a text has a unit in the grammar of npm's ms."""
    assert milliseconds(duration) == ms


@pytest.mark.parametrize(
    "duration",
    [
        *("", "90", "days", "1h30m", "1 month", "-1 day", "1e3s", "1,5h", "1 d\n", "٣ days", "0s", "101y"),
        *(0, -1, 0.0001, float("nan"), float("inf"), True, None, b"1d", [1]),
        *(timedelta(0), timedelta(-1), timedelta.max),
    ],
)
def test_anything_else_is_refused(duration: Any) -> None:
    """A duration in any other form raises ValueError."""
    with pytest.raises(ValueError, match="^max_age must be "):
        milliseconds(duration, "max_age")
