"""The files in lua/: each has a header that describes keys, arguments and results, and is small enough to read."""

import json as json_module
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import hypothesis.strategies as st
import pytest
from hypothesis import given
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from rss import Reference, SessionStore
from rss.engine import meta, operations, scripts
from rss.engine.failures import LATER
from rss.keys import Partitioned, Plain
from rss.testing import RedisServer
from tests import lint_lua
from tests.keyspace import Keyspace

LUA: Final = Path(__file__).parents[1] / "lua"
FILES: Final = sorted(LUA.glob("*.lua"))
OPERATIONS: Final = {operation.script: operation for operation in operations.ALL}

HEADER: Final = re.compile(r"--\[\[\n  [A-Z].*?\n\n  KEYS  .*\n  ARGV  .*\n\n  Returns .*?\n\]\]\n", re.DOTALL)
ARGUMENT: Final = re.compile(r"    (\w+) {2,}")
#: A function at the top level of a file, in one line or in several.
FUNCTION: Final = re.compile(
    r"^local (?:function )?(\w+)(?:\(| = [^\n]*\bfunction\b)(?:[^\n]* end$|.*?^end$)", re.MULTILINE | re.DOTALL
)
CODE: Final = re.compile(r"\bRSS[A-Z]+\b")


@dataclass(frozen=True)
class Header:
    """The content of the header of a script."""

    #: The parts that the script needs.
    needs: list[str]
    #: The names of KEYS, of each session if there are several.
    keys: list[str]
    #: The arguments that all sessions share, and the arguments of each session.
    shared: list[str]
    own: list[str]
    #: The errors that are returned.
    codes: set[str]


def header(name: str) -> Header:
    """Read the header of a file."""
    match = HEADER.match((LUA / f"{name}.lua").read_text())
    assert match, f"lua/{name}.lua has no header"
    about, rest = match[0].split("\n  KEYS ", 1)
    keys, rest = rest.split("\n  ARGV ", 1)
    arguments, returns = rest.split("\n  Returns ", 1)
    needs = re.search(r"\bNeeds ([\w, ]+)\.", about)
    # The arguments after the words "for each session", or mark or page, are repeated for each of them.
    shared, own = [*re.split(r"for each \w+\n", arguments, maxsplit=1), ""][:2]
    return Header(
        needs=needs[1].split(", ") if needs else [],
        keys=re.split(r"; (?:then )?", re.sub("^for each [a-z]+: ", "", " ".join(keys.split()))),
        shared=[match[1] for match in map(ARGUMENT.match, shared.splitlines()) if match],
        own=[match[1] for match in map(ARGUMENT.match, own.splitlines()) if match],
        codes=set(CODE.findall(returns)),
    )


def body(name: str) -> str:
    """Return the lines of a file that are code."""
    code = HEADER.sub("", (LUA / f"{name}.lua").read_text())
    return "\n".join(line for line in code.splitlines() if line.strip() and not line.strip().startswith("--"))


# ---------------------------------------------------------------------- the files


def test_there_is_a_file_for_each_operation_and_each_part() -> None:
    """Each operation is a script, each part begins with an underscore, and there is no other file."""
    parts = {"_store", *(f"_{part}" for part in scripts.PARTS)}
    assert {file.stem for file in FILES} == {*parts, *OPERATIONS, *meta.SCRIPTS}
    assert len(OPERATIONS) == len(operations.ALL)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_has_a_header_and_fits_on_a_screen(file: Path) -> None:
    """The header comes first. A script has at most 80 lines of code, and so has a function of a part."""
    assert HEADER.match(file.read_text())
    code = body(file.stem)
    longest = FUNCTION.finditer(code) if file.stem.startswith("_") else [re.match(r".*", code, re.DOTALL)]
    assert all(len(match[0].splitlines()) <= 80 for match in longest if match)
    assert "#!" not in file.read_text()
    assert "setresp" not in file.read_text()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_script_ends_by_running_its_batch(name: str) -> None:
    """The last line runs a function for each session, so an error of one does not lose other replies."""
    assert re.search(r"\nreturn each\(\w+\)$", body(name))


def _closure(needs: list[str]) -> set[str]:
    """Return these parts, and the parts that they need."""
    return set(needs).union(*(_closure(header(f"_{part}").needs) for part in needs))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_header_names_the_parts(name: str) -> None:
    """The parts that a header needs, directly or not, are those that the table of operations lists."""
    assert _closure(header(name).needs) == set(OPERATIONS[name].parts)


@pytest.mark.parametrize("part", scripts.PARTS)
def test_a_part_stands_behind_those_that_it_needs(part: str) -> None:
    """A part stands behind the parts that it needs, since Lua knows a local function only below its definition."""
    before = scripts.PARTS[: scripts.PARTS.index(part)]
    assert set(header(f"_{part}").needs) <= set(before)


@pytest.mark.parametrize("part", scripts.PARTS)
def test_the_arguments_of_a_part_are_in_the_headers_that_need_it(part: str) -> None:
    """Each argument that a part reads is in the headers of all scripts that use the part."""
    mine = header(f"_{part}")
    for name, operation in OPERATIONS.items():
        if part in operation.parts:
            assert {*mine.shared, *mine.own} <= {*header(name).shared, *header(name).own}


# ---------------------------------------------------------------------- errors

#: Errors that a script never returns, although a part of it can.
NEVER: Final = {
    "unset_with_refs": {"RSSLIMIT", "RSSBLOCKED"},  # `unset` takes values away, and joins no set.
    "arrive_with_refs": {"RSSENDED"},  # It leaves no set that a delete_by_ref works through.
    "retire_with_refs": {"RSSBLOCKED"},  # It leaves sets only.
    "confirm_with_refs": {"RSSLIMIT", "RSSBLOCKED"},  # It joins only sets that Redis has lost.
}


def _functions(name: str) -> dict[str, str]:
    """Return the source of each function that a script can call, and of the script itself, by name."""
    files = ["_store", *(f"_{part}" for part in scripts.PARTS if part in OPERATIONS[name].parts)]
    shared = {match[1]: match[0] for file in files for match in FUNCTION.finditer(body(file))}
    return {**shared, name: body(name)}


def _reachable(name: str) -> Iterator[str]:
    """Iterate over the source of a script and of all functions that it can reach."""
    functions = _functions(name)
    todo, seen = [name], set[str]()
    while todo:
        code = functions[todo.pop()]
        yield code
        for word in set(re.findall(r"\w+", code)) & functions.keys() - seen:
            seen.add(word)
            todo.append(word)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_header_tells_of_every_error(name: str) -> None:
    """A header lists exactly the error codes that the script and its parts can return to a caller."""
    codes = set(CODE.findall("".join(_reachable(name)))) - {LATER}
    assert header(name).codes == codes - NEVER.get(name, set())


# ---------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Case:
    """One run of a script: the data for each name in its header, and the expected results."""

    #: For each session: its keys, by words of the header.
    keys: list[dict[str, list[str]]]
    shared: dict[str, list[str]] = field(default_factory=dict)
    own: list[dict[str, list[str]]] = field(default_factory=list)
    replies: list[Any] = field(default_factory=list)
    #: The keys that are left, without prefix.
    left: dict[str, Any] = field(default_factory=dict)
    #: The highest TTLs of some keys, in milliseconds.
    ttls: dict[str, int] = field(default_factory=dict)
    #: Whether the sessions arrive from another partition.
    arriving: bool = False


A: Final = {"its hash": ["{a}"]}
B: Final = {"its hash": ["{b}"]}
SEED: Final[dict[str, Any]] = {
    "{a}": {"id": "a", "user_id": "1", "ip": "x", "n": "1"},
    "{b}": {"id": "b", "user_id": "1", "ip": "x", "n": "2"},
    "user_id:{1}": {"a", "b"},
    "ip:{x}": {"a", "b"},
}
TTL: Final = object()
KEY: Final = object()
CREATED: Final = "1700000000000"

CASES: Final[Mapping[str, Case]] = {
    "get": Case(
        keys=[A, B],
        shared={"fields": ["1", "n"]},
        replies=[["id", "a", "n", "1", TTL, "alive"], ["id", "b", "n", "2", TTL, "alive"]],
        left=SEED,
    ),
    "get_and_renew": Case(
        keys=[A, B],
        shared={"fields": ["1", "n"], "due": ["after", "60000"]},
        replies=[["id", "a", "n", "1", TTL, "alive"], ["id", "b", "n", "2", TTL, "alive"]],
        left=SEED,
    ),
    "set_with_refs": Case(
        keys=[{**A, "the reference sets": ["user_id:{7}"]}, {**B, "the reference sets": ["user_id:{8}"]}],
        shared={"mode": ["update"], "expectations": ["1"], "gone": ["2"], "sets": ["1", "0"]},
        own=[
            {
                "max_age": ["60000"],
                "expected": ["n", "holds", "1"],
                "values": ["4", "user_id", "7", "n", "5"],
                "gone": ["ip", "m"],
            },
            {
                "max_age": ["70000"],
                "expected": ["n", "holds", "2"],
                "values": ["4", "user_id", "8", "n", "6"],
                "gone": ["ip", "m"],
            },
        ],
        replies=[60000, 70000],
        left={
            "{a}": {"id": "a", "user_id": "7", "n": "5"},
            "{b}": {"id": "b", "user_id": "8", "n": "6"},
            "user_id:{7}": {"a"},
            "user_id:{8}": {"b"},
        },
        ttls={"{a}": 60000, "{b}": 70000},
    ),
    "unset_with_refs": Case(
        keys=[A, B],
        own=[{"max_age": ["60000"], "fields": ["2", "n", "ip"]}, {"max_age": ["keep"], "fields": ["1", "user_id"]}],
        replies=[["n", "1", "ip", "x", 60000], ["user_id", "1", TTL]],
        left={
            "{a}": {"id": "a", "user_id": "1"},
            "{b}": {"id": "b", "ip": "x", "n": "2"},
            "user_id:{1}": {"a"},
            "ip:{x}": {"b"},
        },
        ttls={"{a}": 60000},
    ),
    "increment": Case(
        keys=[A, B],
        own=[{"field": ["n"], "by": ["5"]}, {"field": ["m"], "by": ["-3"]}],
        replies=[6, -3],
        left={**SEED, "{a}": {**SEED["{a}"], "n": "6"}, "{b}": {**SEED["{b}"], "m": "-3"}},
    ),
    "touch": Case(
        keys=[A, B],
        own=[{"max_age": ["60000"]}, {"max_age": ["70000"]}],
        replies=[60000, 70000],
        left=SEED,
        ttls={"{a}": 60000, "{b}": 70000},
    ),
    "delete_with_refs": Case(
        keys=[A, B],
        shared={"expectations": ["1"]},
        own=[
            {"reason": ["bye"], "expected": ["n", "holds", "1"]},
            {"reason": ["bye"], "expected": ["n", "holds", "1"]},
        ],
        replies=[1, 0],
        left={"{a}": {"_ended": "bye"}, "{b}": SEED["{b}"], "user_id:{1}": {"b"}, "ip:{x}": {"b"}},
    ),
    "rotate_with_refs": Case(
        keys=[
            {**A, "its new hash": ["{c}"], "the reference sets": ["ip:{y}"]},
            {**B, "its new hash": ["{d}"], "the reference sets": ["ip:{z}"]},
        ],
        shared={"gone": ["1"], "sets": ["keep", "1"]},
        own=[
            {
                "id": ["c"],
                "grace": ["400000"],
                "max_age": ["60000"],
                "values": ["4", "ip", "y", "n", "5"],
                "gone": ["m"],
            },
            {"id": ["d"], "grace": ["none"], "max_age": ["70000"], "values": ["2", "ip", "z"], "gone": ["n"]},
        ],
        replies=[60000, 70000],
        left={
            "{a}": {"_ended": "rotated", "_next": "c", "_until": TTL},
            "{b}": {"_ended": "rotated"},
            "{c}": {"id": "c", "user_id": "1", "ip": "y", "n": "5"},
            "{d}": {"id": "d", "user_id": "1", "ip": "z"},
            "user_id:{1}": {"c", "d"},
            "ip:{y}": {"c"},
            "ip:{z}": {"d"},
        },
        ttls={"{a}": 400000, "{b}": 300000, "{c}": 60000, "{d}": 70000},
    ),
    "arrive_with_refs": Case(
        keys=[{"the hash of its copy": ["{c}"]}, {"the hash of its copy": ["{d}"]}],
        own=[
            {
                "copy": ["f1"],
                "replaces": [""],
                "lives": ["60000"],
                "before": ["2", "ip", "y"],
                "values": ["6", "user_id", "1", "ip", "y", "_created", CREATED],
            },
            {"copy": ["f2"], "replaces": ["any"], "lives": ["70000"], "before": ["0"], "values": ["2", "ip", "z"]},
        ],
        replies=[60000, 70000],
        left={
            **SEED,
            "{c}": {"id": "c", "_arriving": "f1", "user_id": "1", "ip": "y"},
            "{d}": {"id": "d", "_arriving": "f2", "ip": "z"},
            "user_id:{1}": {"a", "b", "c"},
            "ip:{y}": {"c"},
            "ip:{z}": {"d"},
        },
        ttls={"{c}": 60000, "{d}": 70000},
    ),
    "retire_with_refs": Case(
        keys=[A, B],
        own=[
            {
                "id": ["c"],
                "copy": ["f1"],
                "fields": ["10", "id", "a", "ip", "x", "n", "1", "user_id", "1", "_created", CREATED],
            },
            {"id": ["d"], "copy": ["f2"], "fields": ["2", "id", "b"]},
        ],
        replies=[[TTL, "f1", [], []], "stays"],
        left={
            "{a}": {"_ended": "rotated"},
            "{b}": SEED["{b}"],
            "user_id:{1}": {"b"},
            "ip:{x}": {"b"},
        },
        ttls={"{a}": 300000},
    ),
    "confirm_with_refs": Case(
        keys=[A, B],
        own=[
            {"copy": [CREATED], "ttl": ["60000"], "values": ["2", "n", "7"], "gone": ["1", "ip"]},
            {"copy": [CREATED], "ttl": ["renew"], "values": ["2", "m", "8"], "gone": ["1", "n"]},
        ],
        replies=[60000, TTL],
        left={
            "{a}": {"id": "a", "user_id": "1", "n": "7"},
            "{b}": {"id": "b", "user_id": "1", "ip": "x", "m": "8"},
            "user_id:{1}": {"a", "b"},
            "ip:{x}": {"a", "b"},
        },
        ttls={"{a}": 60000},
        arriving=True,
    ),
    "find_by_ref": Case(
        keys=[{"the reference set": ["ip:{x}"]}],
        shared={
            "fields": ["1", "n"],
            "reference": ["2"],
            "cursor": ["0"],
            "page": ["50"],
            "left": ["1", "b"],
        },
        replies=["0", [], ["id", "b", "n", "2"]],
        left=SEED,
    ),
    "delete_by_ref": Case(
        keys=[{"the reference set": ["ip:{x}"], "its fence": ["_fence:ip:{x}"]}],
        shared={
            "reference": ["2"],
            "cursor": ["0"],
            "page": ["1"],
            "left": ["2", "a", "b"],
            "token": ["a-call"],
            "reason": ["bye"],
            "tell": ["tell"],
            "block": ["400000"],
            "required": ["optional"],
            "keep": ["1", "b"],
        },
        replies=["end", [], 1],
        left={
            "{a}": {"_ended": "bye"},
            "{b}": SEED["{b}"],
            "user_id:{1}": {"b"},
            "ip:{x}": {"b"},
            "_fence:ip:{x}": {
                "until": TTL,
                "why": "bye",
                "call:a-call": "1",
                "end:a-call": "",
                "round": "1",
                "reason:1": "bye",
                "open": " 1",
                "id:b": "0 1",
            },
        },
        ttls={"_fence:ip:{x}": 400000},
    ),
    "complete": Case(
        keys=[{"the hash in a partition": ["{a}"]}, {"the hash in a partition": ["{b}"]}],
        own=[{"field": ["n"], "token": ["1"]}, {"field": ["n"], "token": ["other"]}],
        replies=[1, 0],
        left={**SEED, "{a}": {"id": "a", "user_id": "1", "ip": "x"}},
    ),
    "inspect": Case(
        keys=[A, {"its hash": ["ip:{x}"]}],
        shared={"mode": ["mend_and_remove"], "added": ["no", "no"]},
        replies=[[], ["wrong type", KEY]],
        left={name: held for name, held in SEED.items() if name != "ip:{x}"},
    ),
    "inspect_ref": Case(
        keys=[{"its reference set": ["ip:{x}"]}, {"its reference set": ["{a}"]}],
        shared={"mode": ["mend_and_remove"], "page": ["50"]},
        own=[
            {"reference": ["2"], "cursor": ["5"], "left": ["1", "dead"]},
            {"reference": ["1"], "cursor": ["0"], "left": ["0"]},
        ],
        replies=[["5", [], 1], ["0", [], 0, "wrong type"]],
        left={name: held for name, held in SEED.items() if name != "{a}"},
    ),
    "inspect_fence": Case(
        keys=[{"the fences": ["ip:{x}"]}, {"the fences": ["{a}"]}],
        shared={"mode": ["mend_and_remove"]},
        replies=["wrong type", ""],
        left={name: held for name, held in SEED.items() if name != "ip:{x}"},
    ),
    "blocked": Case(
        keys=[{"the fences": ["_fence:ip:{x}"]}, {"the fences": ["_fence:ip:{y}"]}], replies=[0, 0], left=SEED
    ),
    "unblock": Case(
        keys=[{"the fences": ["_fence:ip:{x}"]}, {"the fences": ["_fence:ip:{y}"]}], replies=[0, 0], left=SEED
    ),
}


#: The scripts that run only in a store with partitions.
ARRIVING: Final = {name for name, case in CASES.items() if case.arriving} | {"arrive_with_refs"}


def _wire(said: Header, case: Case, keyspace: Keyspace) -> tuple[list[str], list[str]]:
    """Build KEYS and ARGV in the order in which a header names them."""
    keys, own = [], []
    for session in case.keys:
        for words in said.keys:
            (word,) = [word for word in session if words.startswith(word)]
            keys += [keyspace.named(key)[0] for key in session[word]]
        assert len(said.keys) == len(session)
    for arguments in case.own:
        assert arguments.keys() == set(said.own)
        own += [value for name in said.own for value in arguments[name]]
    assert case.shared.keys() == set(said.shared)
    shared = [value for name in said.shared for value in case.shared[name]]
    layout = Partitioned(keyspace.prefix, 24, 1) if keyspace.partitions else Plain(keyspace.prefix, 24)
    return keys, [*layout.stems(0), *shared, *own]


def _same(found: object, expected: object) -> bool:
    """Return whether a result is as expected; `TTL` matches any time, and `KEY` any key."""
    if expected is TTL:
        return isinstance(found, int) or str(found).isdigit()
    if expected is KEY:
        return isinstance(found, str) and ":" in found
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_same(found[k], expected[k]) for k in found)
        )
    return found == expected


async def _try(name: str, said: Header, keyspace: Keyspace) -> None:
    """Run a script with the arguments in the order of its header, and check the results."""
    case = CASES[name]
    store = SessionStore(
        keyspace.client, references=["user_id", "ip"], prefix=keyspace.prefix, partitions=keyspace.partitions
    )
    await keyspace.clear()
    for session_id, n in (("a", 1), ("b", 2)):
        await store.set(session_id, {"user_id": 1, "ip": "x", "n": n})
        for note in ("_created", *(["_arriving"] if case.arriving else [])):
            await keyspace.client.hset(store.get_session_key(session_id), note, CREATED)
    await store.aclose()
    keys, argv = _wire(said, case, keyspace)
    replies = await keyspace.client.eval(store.operations.scripts.sources[name], len(keys), *keys, *argv)
    batched = OPERATIONS[name].batched
    assert _same(replies if batched else replies[0], case.replies)
    assert _same(await keyspace.dump(), case.left)
    for key, ttl in case.ttls.items():
        assert ttl - 10_000 < await keyspace.ttl(key) <= ttl


@pytest.mark.parametrize(
    ("name", "keyspace"),
    [(name, partitions) for name in OPERATIONS for partitions in (None, 1) if partitions or name not in ARRIVING],
    indirect=["keyspace"],
)
async def test_a_script_takes_what_its_header_says(name: str, keyspace: Keyspace) -> None:
    """A script works with KEYS and ARGV in the order of its header."""
    await _try(name, header(name), keyspace)


def _swaps(name: str) -> Iterator[Header]:
    """Iterate over wrong headers: two neighbours are swapped, or one has another name."""
    right = header(name)
    for place in ("keys", "shared", "own"):
        names: list[str] = getattr(right, place)
        for n in range(len(names) - 1):
            yield replace(right, **{place: [*names[:n], names[n + 1], names[n], *names[n + 2 :]]})  # type: ignore[arg-type]
        for n in range(len(names)):
            yield replace(right, **{place: [*names[:n], "another", *names[n + 1 :]]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "keyspace"), [(name, 1 if name in ARRIVING else None) for name in OPERATIONS], indirect=["keyspace"]
)
async def test_a_wrong_header_is_noticed(name: str, keyspace: Keyspace) -> None:
    """A header with swapped or unknown names fails the test above."""
    for wrong in _swaps(name):
        with pytest.raises((AssertionError, ResponseError, ValueError)):
            await _try(name, wrong, keyspace)


# ---------------------------------------------------------------------- the grammar of keys, and the schema


async def test_no_script_knows_the_grammar_of_keys(
    client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All operations work with another layout of keys, since the scripts build keys from their arguments."""

    class Odd(Plain):
        before_value = "=<"
        ending = ">"

        def stems(self, partition: int) -> tuple[str, str]:
            del partition
            return f"{self.prefix}:session<", f"{self.prefix}:sets/"

        def place(self, session_id: str) -> tuple[str, int]:
            return f"{self.prefix}:session<{session_id}>", 0

        def references(self, texts: Iterable[tuple[str, str]], partition: int) -> list[str]:
            del partition
            return [f"{self.prefix}:sets/{field}=<{value}>" for field, value in texts]

    monkeypatch.setattr("rss.store.Plain", Odd)
    references = {"user_id": Reference(limit=2), "ip": Reference(strict=True)}
    store = SessionStore(client, references=references, prefix=keyspace.prefix)
    a = await store.create({"user_id": 1, "ip": ["x", "y"]})
    b = await store.rotate(a, {"user_id": 2}, grace="1m")
    await keyspace.client.hincrby(store.get_session_key(b), "_created", -1000)  # The oldest is evicted.
    assert (await store.get(a))["id"] == b
    await store.set("c", {"user_id": 2, "ip": "x"})
    await store.pop("c", ["user_id"])
    await store.set("c", {"user_id": 2})
    await store.set("d", {"user_id": 2})
    assert sorted(await store.ids_by("user_id", 2)) == ["c", "d"]
    await store.touch("c", "29 days")
    assert await store.block("user_id", 2, "1m") == 2
    assert await store.blocked("user_id", 2)
    assert set(await keyspace.dump()) == {*(f"session<{i}>" for i in (a, b, "c", "d")), "sets/_fence:user_id=<2>"}


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
FIELDS = TEXTS.filter(lambda name: not re.search("[:{}]", name) and name != "id" and not name.startswith("_"))


@given(fields=st.lists(FIELDS, max_size=4, unique=True), json=st.booleans(), data=st.data(), ending=TEXTS)
def test_a_schema_is_read_as_it_was_written(
    redis_server: RedisServer, fields: list[str], *, json: bool, data: st.DataObject, ending: str
) -> None:
    """Lua reads the same names, limits and flags from the schema, whatever the fields are called."""
    kinds = {
        name: Reference(
            limit=data.draw(st.none() | st.integers(1, 1000)),
            on_limit=data.draw(st.sampled_from(["evict", "refuse"])),
            strict=data.draw(st.booleans()),
            identity=n == 1,
        )
        for n, name in enumerate(fields)
    }
    partitioned = not ending
    schema = scripts.schema(
        kinds,
        max_age=2**41,
        max_lifetime=0,
        tombstone=7,
        json=json,
        before_value=":{",
        ending=ending,
        partitioned=partitioned,
    )
    names = "max_age, max_lifetime, tombstone, json, before_value, ending, state, references, identity"
    with BlockingRedis.from_url(redis_server.url, decode_responses=True) as client:
        found = client.eval(f"{schema} return cjson.encode({{ {names}, strict, limits, refuses }})", 0)
        (raw,) = client.eval(f"{schema} return {{ table.concat(state) .. before_value .. ending }}", 0)
    state = ["id", "_ended", "_created", "_max_age", *fields, *(["_arriving"] if partitioned else [])]
    lists: list[list[Any]] = [
        [kind.strict for kind in kinds.values()],
        [kind.limit or 0 for kind in kinds.values()],
        [bool(kind.limit) and kind.on_limit == "refuse" for kind in kinds.values()],
    ]
    assert raw == "".join([*state, ":{", ending])
    assert isinstance(found, str)
    assert json_module.loads(found) == [
        *(2**41, 0, 7, json, ":{", ending, state, len(fields), 2 if len(fields) > 1 else False),
        *(any(flags) and flags for flags in lists),
    ]


@given(now=st.integers(10**12, 2**41), ttl=st.integers(1, 10**11), data=st.data())
def test_a_horizon_stays_out_of_reach(redis_server: RedisServer, now: int, ttl: int, data: st.DataObject) -> None:
    """The horizon of a session's sets is never before its end, and does not move later as the session ages."""
    match = re.search(r"^local power, step .*?^end$", (LUA / "_renew.lua").read_text(), re.MULTILINE | re.DOTALL)
    assert match
    lines = [
        f"local now = {now}",
        match[0],
        "local then_ = horizon(tonumber(ARGV[1]))",
        "now = now + tonumber(ARGV[2])",
    ]
    lines.append('return { string.format("%.0f", then_), string.format("%.0f", horizon(ARGV[1] - ARGV[2])) }')
    age = data.draw(st.integers(0, ttl - 1))
    with BlockingRedis.from_url(redis_server.url) as client:
        first, later = map(int, client.eval("\n".join(lines), 0, ttl, age))
    assert now + ttl <= later <= first <= now + ttl + max(ttl // 32, 1)


# ---------------------------------------------------------------------- loading and lint


async def test_loading_loads_all_scripts(client: Redis) -> None:
    """Opening a store loads all scripts."""
    await client.script_flush()
    async with SessionStore(client) as store:
        assert all(await client.script_exists(*store.operations.scripts.shas.values()))


FAULTS: Final[dict[str, tuple[str, Callable[[str], str], str]]] = {
    "a global in a part": ("_end", lambda s: s + "forgotten = 1\n", "setting non-standard global variable 'forgotten'"),
    "what the sandbox lacks": ("get", lambda s: s.replace("key = key + 1", "key = key + 1; print(key)"), "'print'"),
    "an unused variable of a script": ("touch", lambda s: "local idle = 1\n" + s, "unused variable 'idle'"),
    "an unused function of a part": ("_sets", lambda s: s + "local function idle() end\n", "unused function 'idle'"),
    "a syntax error": ("_write", lambda s: s + "end\n", "(E011)"),
}


@pytest.fixture(name="known", scope="module")
def _known() -> list[str]:
    """The findings of luacheck without a planted fault: none, unless a script is being changed."""
    return lint_lua.findings()


@pytest.mark.skipif(not shutil.which("luacheck"), reason="luacheck is not installed")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_lint_finds_a_fault(monkeypatch: pytest.MonkeyPatch, known: list[str], fault: str) -> None:
    """The lint reports a planted fault with file and line."""
    name, plant, text = FAULTS[fault]
    read, source = scripts.read, plant(scripts.read(name))
    before = read(name).splitlines()
    line = next(n for n, (a, b) in enumerate(zip([*before, ""], source.splitlines(), strict=False), 1) if a != b)
    monkeypatch.setattr(scripts, "read", lambda other: source if other == name else read(other))
    new = [finding for finding in lint_lua.findings() if finding not in known]
    assert any(finding.startswith(f"lua/{name}.lua:{line}:") and text in finding for finding in new)


@pytest.mark.skipif(not shutil.which("luacheck"), reason="luacheck is not installed")
def test_the_lint_finds_a_part_that_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lint reports a part of which a script uses nothing."""
    longer = [replace(one, parts=(*one.parts, "expect")) if one.script == "touch" else one for one in operations.ALL]
    monkeypatch.setattr(operations, "ALL", longer)
    assert "lua/touch.lua: uses nothing of the part expect, which is one of its parts" in lint_lua.findings()


def test_the_lint_says_that_luacheck_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lint says that luacheck is missing, and does not fail."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert lint_lua.main() == 0
    assert "luacheck is not installed" in capsys.readouterr().out
