"""The documents are right: their examples run, and the commands, keys and methods that they name exist."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

import rss
from rss import Session, SessionEnded, SessionStore
from tests import picture
from tests.documents import DOCUMENTS, GUIDES, ROOT, examples
from tests.keyspace import Keyspace

README = (ROOT / "README.md").read_text()
STORE = (ROOT / "rss" / "guides" / "store.md").read_text()
FRAMEWORKS = (ROOT / "rss" / "guides" / "frameworks.md").read_text()
OTHERS = (".github/SECURITY.md", ".github/CONTRIBUTING.md", "lua/README.md", "rss/demo/README.md", "tests/README.md")
ALL = [*DOCUMENTS, *(ROOT / name for name in OTHERS)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
async def test_the_examples_run(
    document: Path, client: Redis, keyspace: Keyspace, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples of a document run in order. Only the prefix, and the address of a cluster, are replaced.

    Files have tests of their own.
    """
    defaults = SessionStore.__init__.__kwdefaults__
    assert defaults
    monkeypatch.setitem(defaults, "prefix", keyspace.prefix)
    store = SessionStore(client, references=["user_id", "ip"])
    redis_url = request.getfixturevalue("redis_url")
    names: dict[str, Any] = {"url": redis_url, "client": client, "SessionEnded": SessionEnded}
    for example in examples(document):
        if example.file or example.source.startswith("# migration"):
            continue
        names["store"] = store
        source = example.source
        if "7000" in source:
            url = request.getfixturevalue("cluster_url")
            source = source.replace("127.0.0.1:7000", url.rpartition("/")[2])
            source = source.replace('"127.0.0.1", 7000', f'"127.0.0.1", {url.rpartition(":")[2]}')
        code = compile(source, str(example), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)
        if inspect.iscoroutine(result):
            await result
        if main := names.pop("main", None):
            await main(redis_url)


def test_there_are_examples() -> None:
    """Each document has the expected number of examples, so the test above is not empty."""
    assert [len(examples(document)) for document in DOCUMENTS] == [2, 3, 0, 7, 1, 3, 1, 3, 3, 7, 5, 0]


async def test_the_keys_are_as_the_table_says(store: SessionStore, keyspace: Keyspace) -> None:
    """The keys in Redis are those in the table of the guide."""
    await store.set("a", {"user_id": 1, "ip": "::1", "tags": ["x"]})
    await store.set("b", {"user_id": 1})
    await store.delete("b")
    told: dict[str, Any] = {}
    for key, kind, held in re.findall(r"^\| `rss:(\S+)` \| (hash|set) \| (`.*?) \|", STORE, re.MULTILINE):
        words = re.findall(r"`([^`]*)`", held)
        told[key] = set(words) if kind == "set" else dict(zip(words[::2], words[1::2], strict=True))
    told["{a}"].pop("_created")
    assert await keyspace.dump() == told


def test_every_method_is_in_the_table() -> None:
    """The tables name each public method of the store and of a session, and no other."""
    table = STORE.split("## Which operations are there?", 1)[1].split("## Which errors", 1)[0]
    told = set(re.findall(r"`(\w+)\(", table.split("`help(", maxsplit=1)[0]))
    assert told == {name for name in vars(SessionStore) if not name.startswith("_")} - {"from_url", "maintenance"}
    table = FRAMEWORKS.split("| `Session` |", 1)[1].split("\n\n", 1)[0]
    told = set(re.findall(r"`(\w+)[(`]", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert told == {name for name in vars(Session) if not name.startswith("_")}


@pytest.mark.parametrize("document", ALL, ids=lambda path: path.name)
def test_what_a_document_names_is_there(document: Path) -> None:
    """The make targets, Python files, linked files and pictures that a document names exist."""
    text = document.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"[`$] ?make ([\w-]+)", text)) <= targets
    for path in set(re.findall(r"python (\S+\.py)", text)) - {"app.py"}:
        assert (ROOT / path).exists()
    for path in re.findall(r"\]\((?!https?:)([\w./-]+\.\w+)\)", text):
        assert (document.parent / path).exists(), path


def test_the_readme_is_short() -> None:
    """The README has at most 1,800 words, and links all guides."""
    assert len(README.split()) <= 1800
    assert all(f"rss/guides/{guide.name}" in README for guide in GUIDES)


def test_the_picture_is_drawn_by_the_code() -> None:
    """The picture is the output of `python -m tests.picture`."""
    assert picture.FILE.read_text() == picture.draw()


def test_the_numbers_are_those_that_were_measured() -> None:
    """The numbers in the documents are those in benchmarks/results."""
    results = ROOT / "benchmarks" / "results"
    assert (results / "summary.md").read_text().strip() in README
    assert (results / "tables.md").read_text() in (ROOT / "benchmarks" / "README.md").read_text()


def test_every_name_is_public() -> None:
    """Every public name of the package is in a document."""
    text = "".join(document.read_text() for document in DOCUMENTS)
    assert all(name in text for name in rss.__all__ if name != "Duration")


def test_every_requirement_is_in_the_table() -> None:
    """The table in SECURITY.md has a row for each requirement, in order, with an answer."""
    text = (ROOT / ".github" / "SECURITY.md").read_text()
    rows = re.findall(r"^\| S(\d+) \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 33))
