"""Every operation has its tests: the checks here fail for a new operation, and name what is missing."""

import ast
import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from rss import SessionStore
from rss.engine import operations
from rss.engine.coalesce import Operation
from tests import test_bad_input, test_coalesce, test_commands, test_faults, test_moves, test_scripts

TESTS: Final = Path(__file__).parent

#: All operations, by their names in `rss.engine.operations`. One script may serve several operations.
OPERATIONS: Final = {name: value for name, value in vars(operations).items() if isinstance(value, Operation)}

#: Public methods that a user calls for their effect on the store, not on sessions.
OF_THE_STORE: Final = {"load", "aclose"}
#: Methods that send no operation. `test_watch`, `test_events` and `test_maintenance` have their tests.
WITHOUT_OPERATION: Final = {"wait_ended", "events", "sweeper"}
METHODS: Final = {
    name
    for name, method in inspect.getmembers(SessionStore, inspect.isfunction)
    if not name.startswith("_")
    and name not in OF_THE_STORE
    and (inspect.iscoroutinefunction(method) or "AsyncIterator" in str(method.__annotations__["return"]))
}

#: Operations that only a move sends: a rotation into another partition. `test_moves` has all of their tests.
OF_MOVES: Final = {"ARRIVE", "RETIRE", "CONFIRM"}

#: Operations that only `Maintenance` sends. `test_maintenance` and `test_incomplete` have all of their tests.
OF_MAINTENANCE: Final = {"MARK", "UNMARK", "CLAIM", "COMPLETE", "INSPECT", "INSPECT_REF", "INSPECT_FENCE"}

#: Operations whose reply is lost in a test of its own, not in a row of `REPEATED`.
LOST_REPLIES: Final[dict[str, Callable[..., Any]]] = {
    "SET_EXPECTING": test_faults.test_set_that_expects_is_not_repeated,
    "POP": test_faults.test_what_must_not_be_repeated_is_not,
    "INCREMENT": test_faults.test_what_must_not_be_repeated_is_not,
    "DELETE": test_faults.test_delete_is_done_when_it_says_so,
    "CREATE": test_faults.test_create_and_rotate_recognise_their_own_work,
    "ROTATE": test_faults.test_create_and_rotate_recognise_their_own_work,
    "ARRIVE": test_moves.test_a_lost_reply,
    "RETIRE": test_moves.test_a_lost_reply,
    "CONFIRM": test_moves.test_a_lost_reply,
    "DELETE_BY": test_faults.test_large_delete_by_goes_on_where_it_was,
}


class _Sent(Exception):
    """Raised in place of sending a call."""


def sent_by(calls: Iterable[Callable[[SessionStore], Awaitable[object]]]) -> set[str]:
    """Return which operations these calls would send."""
    sent: set[str] = set()

    def run(operation: Operation, *_: Any, **__: Any) -> Awaitable[Any]:
        sent.update(name for name, one in OPERATIONS.items() if one is operation)
        if operation is operations.IS_INCOMPLETE:
            return asyncio.get_running_loop().create_future()  # It is sent beside the operation itself.
        raise _Sent

    async def call_all() -> None:
        store = SessionStore(Redis(unix_socket_path="/nowhere/redis.sock"), references=["user_id", "ip"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store.operations.engine, "run", run)
            for call in calls:
                with suppress(_Sent):
                    await call(store)

    asyncio.run(call_all())
    return sent


def _batched() -> set[str]:
    """Return the scripts of all operations that can be batched, except those of moves and of maintenance."""
    others = OF_MOVES | OF_MAINTENANCE
    return {one.script for name, one in OPERATIONS.items() if one.batched and one.script and name not in others}


def methods_used(file: str, is_store: Callable[[str], bool]) -> set[str]:
    """Return the names of all methods that a file of tests calls on expressions that are stores."""
    calls = [node for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.Attribute)]
    return {node.attr for node in calls if is_store(ast.unparse(node.value))}


def test_the_table_of_operations_is_whole() -> None:
    """The table of operations holds each script; only scripts in the table are loaded."""
    scripts = {one.script for one in OPERATIONS.values() if not one.command}
    assert {operation.script for operation in operations.ALL} == scripts
    assert {"get", "set", "find_by", "delete_by", "block"} <= METHODS


def test_every_method_sends_an_operation_and_every_operation_is_sent() -> None:
    """Every method sends an operation, and every operation is sent by a method."""
    calls: dict[str, Callable[[SessionStore], Awaitable[object]]] = {
        "create": lambda store: store.create(),
        "get": lambda store: store.get("a"),
        "get and renew": lambda store: store.get("a", touch=True),
        "set": lambda store: store.set("a", {}),
        "set that expects": lambda store: store.set("a", {}, expect={"x": 1}),
        "unset": lambda store: store.unset("a", ["x"]),
        "pop": lambda store: store.pop("a", ["x"]),
        "increment": lambda store: store.increment("a", "x"),
        "touch": lambda store: store.touch("a"),
        "delete": lambda store: store.delete("a"),
        "ended": lambda store: store.ended("a"),
        "rotate": lambda store: store.rotate("a"),
        "ttl": lambda store: store.ttl("a"),
        "ids_by": lambda store: store.ids_by("user_id", 1),
        "count_by": lambda store: store.count_by("user_id", 1),
        "count_by, not exact": lambda store: store.count_by("user_id", 1, exact=False),
        "find_by": lambda store: anext(store.find_by("user_id", 1)),
        "delete_by": lambda store: store.delete_by("user_id", 1),
        "block": lambda store: store.block("user_id", 1, "1h"),
        "unblock": lambda store: store.unblock("user_id", 1),
        "blocked": lambda store: store.blocked("user_id", 1),
    }
    assert METHODS - calls.keys() == WITHOUT_OPERATION, "missing above"
    assert all(sent_by([call]) for call in calls.values())
    assert sent_by(calls.values()) | OF_MOVES | OF_MAINTENANCE == set(OPERATIONS)
    assert {OPERATIONS[name].script for name in OF_MOVES} <= set(test_moves.STEPS)


def test_every_method_is_in_the_model() -> None:
    """Every method of the store is called by the model test."""
    used = methods_used("test_model.py", lambda store: store.startswith("self.stores["))
    assert METHODS - used == WITHOUT_OPERATION, "missing in tests/test_model.py, as rules of Machine"


def test_every_method_is_called_with_bad_arguments() -> None:
    """Every method has a group of rows with bad arguments."""
    assert METHODS - test_bad_input.BAD.keys() == {"events"}, "missing in tests/test_bad_input.py, in BAD"


def test_every_method_is_type_checked() -> None:
    """Every method is called in the typing tests."""
    used = methods_used("typing/test_store.py", lambda store: store == "store")
    assert METHODS - used == set(), "missing in tests/typing/test_store.py"


def test_every_operation_is_coalesced() -> None:
    """Every operation that can be batched has a row that counts the scripts of many calls."""
    rows = sent_by([lambda store, call=call: call(store, 1) for call in test_coalesce.CALLS.values()])  # type: ignore[misc]
    missing = _batched() - {OPERATIONS[name].script for name in rows}
    assert missing == set(), "missing in tests/test_coalesce.py, in CALLS"


def test_every_operation_loses_its_reply() -> None:
    """Every operation has a row or a test in which its reply is lost."""
    repeated = sent_by(call for call, _ in test_faults.REPEATED.values())
    assert all(OPERATIONS[name].repeatable for name in repeated)
    rest = OPERATIONS.keys() - repeated - LOST_REPLIES.keys() - OF_MAINTENANCE
    assert rest == set(), "missing in tests/test_faults.py, in REPEATED"
    assert repeated.isdisjoint(LOST_REPLIES)


def test_every_operation_has_a_budget() -> None:
    """Every operation that can be batched has a row that counts its commands."""
    rows = sent_by([lambda store, call=budget.call: call(store, "a") for budget in test_commands.BUDGETS.values()])  # type: ignore[misc]
    missing = _batched() - {OPERATIONS[name].script for name in rows}
    assert missing == set(), "missing in tests/test_commands.py, in BUDGETS"


def test_every_script_runs_with_what_its_header_says() -> None:
    """Every script has a case with the arguments of its header."""
    missing = {operation.script for operation in operations.ALL} - test_scripts.CASES.keys()
    assert missing == set(), "missing in tests/test_scripts.py, in CASES"
