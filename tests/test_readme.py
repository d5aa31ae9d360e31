"""The README can be trusted: its examples run, and what it says of commands and keys is so."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

import rss
from rss import Session, SessionEnded, SessionStore
from tests.keyspace import Keyspace

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# Whole applications are served in integrations/test_readme.py.
EXAMPLES = [block for block in BLOCKS if not block.startswith(("# app.py", "# migration"))]


async def test_the_examples_run(
    client: Redis, redis_url: str, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, one after the other; only their keys have another prefix."""
    defaults = SessionStore.__init__.__kwdefaults__
    assert defaults
    monkeypatch.setitem(defaults, "prefix", keyspace.prefix)
    store = SessionStore(client, references=["user_id", "ip"])
    names: dict[str, Any] = {"url": redis_url, "client": client, "SessionEnded": SessionEnded}
    for example in EXAMPLES:
        code = compile(example, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)
        if inspect.iscoroutine(result):
            await result
        names["store"] = store
    assert await keyspace.keys()


def test_there_are_examples() -> None:
    """So that the test above means something."""
    assert len(EXAMPLES) == 7


async def test_the_keys_are_as_the_table_says(store: SessionStore, keyspace: Keyspace) -> None:
    """The rows of the table are what is in Redis."""
    await store.set("a", {"user_id": 1, "ip": "::1", "tags": ["x"]})
    await store.set("b", {"user_id": 1})
    await store.delete("b")
    told: dict[str, Any] = {}
    for key, kind, held in re.findall(r"^\| `rss:(\S+)` \| (hash|set) \| (`.*?) \|", README, re.MULTILINE):
        words = re.findall(r"`([^`]*)`", held)
        told[key] = set(words) if kind == "set" else dict(zip(words[::2], words[1::2], strict=True))
    told["{a}"].pop("_created")
    assert await keyspace.dump() == told


def test_every_method_is_in_the_table() -> None:
    """The tables name each public method of the store and of a session, and none that there is not."""
    table = README.split("## The API", 1)[1].split("Lifetimes are", 1)[0]
    told = set(re.findall(r"`(\w+)\(", table))
    assert told == {name for name in vars(SessionStore) if not name.startswith("_")} - {"from_url"}
    table = README.split("| `Session` |", 1)[1].split("\n\n", 1)[0]
    told = set(re.findall(r"`(\w+)[(`]", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert told == {name for name in vars(Session) if not name.startswith("_")}


def test_every_command_is_a_target() -> None:
    """The Makefile has what the README tells to make, and the files are there that it tells to run."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"[`$] ?make (\w+)", README)) <= targets
    for path in re.findall(r"python (\S+\.py)", README):
        assert (ROOT / path).exists()


def test_the_numbers_are_those_that_were_measured() -> None:
    """What it says of the speed is what `make bench` wrote down last, and the plots are of that run too."""
    results = ROOT / "benchmarks" / "results"
    assert (results / "tables.md").read_text() in README
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).exists()


def test_every_name_is_public() -> None:
    """What the package exports is in its API section or the tour."""
    assert all(name in README for name in rss.__all__ if name != "Duration")
