"""Bugs that are planted to see that a test finds them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis.errors import Flaky

from rss import SessionError


@contextmanager
def found() -> Iterator[None]:
    """Fail unless the body finds a bug. It is not found if the body takes too long."""
    with pytest.raises((AssertionError, KeyError, SessionError, Flaky, pytest.fail.Exception)) as error:
        yield
    assert "pytest-timeout" not in str(error.value), "the bug was not found in time"
