"""Checks that reading a cookie takes time in proportion to its length: `python -m benchmarks.cookies`."""

import time

from redis.asyncio import Redis

from rss import Sessions, SessionStore

_SIZES = (6_554, 65_536)
_UNITS = {
    "backslashes": "\\",
    "semicolons": ";",
    "equals signs": "=",
    "quotes": '"',
    "the name": "session-id",
    "the name and a backslash": "session-id=\\;",
    "one token again and again": f"session-id={'x' * 32};",
    "letters": "é",
}


def _seconds(sessions: Sessions, header: str) -> float:
    before = time.perf_counter()
    for _ in range(20):
        sessions.create_session(header)
    return time.perf_counter() - before


def main() -> None:
    """Read headers of 6.5 kB and of 65 kB in turn. Fail if the long ones take more than thirty times as long."""
    sessions = Sessions(SessionStore(Redis(unix_socket_path="/nowhere/redis.sock")), secret_keys=["k" * 16])
    worst = 0.0
    for name, unit in _UNITS.items():
        short, long = ("session-id=" + (unit * size)[: size - 11] for size in _SIZES)
        ratio = min(_seconds(sessions, long) / _seconds(sessions, short) for _ in range(15))
        worst = max(worst, ratio)
        print(f"  {name:28} ten times the length, {ratio:5.1f} times the time")
    assert worst < 30, "the time is not in proportion to the length"


if __name__ == "__main__":
    main()
