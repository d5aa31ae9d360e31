"""Durations: convert them to milliseconds."""

import re
from datetime import timedelta

#: A timedelta, a number of seconds, or a str with a unit, such as "28 days" or "15m".
Duration = timedelta | int | float | str

_GRAMMAR = re.compile(
    r"(?P<number>\d*\.?\d+) *"
    r"(?:(?P<ms>milliseconds?|msecs?|ms)|(?P<s>seconds?|secs?|s)|(?P<m>minutes?|mins?|m)"
    r"|(?P<h>hours?|hrs?|h)|(?P<d>days?|d)|(?P<w>weeks?|w)|(?P<y>years?|yrs?|y))",
    re.ASCII | re.IGNORECASE,
)
_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000, "y": 31_557_600_000}
_LONGEST = 100 * _UNITS["y"]  # Redis and Lua are exact far beyond this; timedelta and cookies are not.


def milliseconds(duration: Duration, name: str = "duration") -> int:
    """Return a duration in whole milliseconds.

    A plain number is seconds. A str has one number and one unit, as in "28 days", "1.5h" or "90s". The grammar is that
    of npm's `ms`. A year has 365.25 days. A str without a unit is refused, since `ms` would read it as milliseconds.

    Raises ValueError for anything else, and for less than a millisecond or more than 100 years. The message holds
    *name*.
    """
    if isinstance(duration, timedelta):
        ms: float = duration / timedelta(milliseconds=1)
    elif isinstance(duration, str):
        match = _GRAMMAR.fullmatch(duration.strip(" "))
        if match is None:
            raise ValueError(f"{name} must be a number and a unit, such as '28 days' or '15m'")
        ms = float(match["number"]) * _UNITS[match.lastgroup or ""]
    elif isinstance(duration, int | float) and not isinstance(duration, bool):
        ms = duration * 1000
    else:
        raise ValueError(f"{name} must be a timedelta, a number of seconds or a text with a unit")  # noqa: TRY004 - as documented
    if not 1 <= ms <= _LONGEST:  # NaN fails this too.
        raise ValueError(f"{name} must be between a millisecond and 100 years")
    return round(ms)
