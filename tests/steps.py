"""Act at one step of an operation that takes several scripts."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rss import SessionStore
from rss.engine.coalesce import Operation
from rss.engine.operations import Deleted, Position


class Stop(BaseException):
    """Ends a task where a crash would."""


def run_at(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch, step: str, act: Callable[[Awaitable[Any]], Awaitable[Any]]
) -> None:
    """Let the next call of a script go through *act*, which gets the call."""
    original, done = store.operations.engine.run, list[str]()

    def run(operation: Operation, *args: Any, **options: Any) -> Any:
        call = original(operation, *args, **options)
        if operation.script == step and not done:
            done.append(step)
            return act(call)
        return call

    monkeypatch.setattr(store.operations.engine, "run", run)


def between_pages(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch, others: Callable[[Position], Awaitable[object]]
) -> None:
    """Let others do something after each page of a `delete_by` of this store. They get the position of the page."""
    delete_by = store.operations.delete_by

    async def delete_by_and_let_others(field: str, value: object, at: Position, **options: Any) -> Deleted:
        page = await delete_by(field, value, at, **options)
        await others(at)
        return page

    monkeypatch.setattr(store.operations, "delete_by", delete_by_and_let_others)
