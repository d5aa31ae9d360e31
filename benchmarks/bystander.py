"""Another client of the same server, in a process of its own, measures how long Redis does not reply.

`python -m benchmarks.bystander URL` runs this process. On a byte from stdin, the process begins to PING. On the next
byte, it prints the longest time in milliseconds and the number of PINGs. Then it waits for another byte. The process
ends when stdin is closed.
"""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from redis import Redis

# Seconds between two PINGs.
_PAUSE = 0.0005


class Bystander:
    """The process, as seen by the process that measures."""

    def __init__(self, url: str) -> None:
        """Start the process."""
        #: The longest PING of the last `pinging` in milliseconds, and the number of PINGs.
        self.longest = 0.0
        self.pings = 0
        command = [sys.executable, "-m", "benchmarks.bystander", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603

    def __enter__(self) -> Self:
        with self.pinging():  # The process has to connect first.
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    @contextmanager
    def pinging(self) -> Iterator[None]:
        """Let the process PING while the body runs."""
        self._say()
        try:
            yield
        finally:
            self._say()
            assert self._process.stdout
            longest, pings = self._process.stdout.readline().split()
            self.longest, self.pings = float(longest), int(pings)

    def _say(self) -> None:
        assert self._process.stdin
        self._process.stdin.write(".")
        self._process.stdin.flush()


def main() -> None:
    """Serve the requests on stdin."""
    # A PING that waits for a core would look like one that waits for Redis. So this process goes before all others on
    # its core, if the user has the right.
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    with Redis.from_url(sys.argv[1]) as client:
        client.ping()
        while os.read(0, 1):
            longest, pings = 0.0, 0
            while not select.select([0], [], [], _PAUSE)[0]:
                started = time.perf_counter()
                client.ping()
                longest, pings = max(longest, time.perf_counter() - started), pings + 1
            os.read(0, 1)
            print(longest * 1000, pings, flush=True)


if __name__ == "__main__":
    main()
