"""The files in lua/: each says what goes in and what comes out, and is small enough to read."""

import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from rss import SessionStore, scripts
from rss.testing import RedisServer

FILES = sorted((Path(__file__).parents[1] / "lua").glob("*.lua"))
NAMES = {"get", "set_with_refs", "unset_with_refs", "increment", "touch", "delete_with_refs", "rotate_with_refs"}
HEADER = re.compile(r"--\[\[\n  [A-Z].*?\n\n  KEYS  .*\n  ARGV  .*Returns .*?\n\]\]\n", re.DOTALL)


def _code(file: Path) -> list[str]:
    body = HEADER.sub("", file.read_text())
    return [line for line in body.splitlines() if line.strip() and not line.strip().startswith("--")]


def test_there_is_a_script_for_each_operation() -> None:
    """They are named as the methods are."""
    assert set(scripts.SCRIPTS) == NAMES | {"find_by_ref", "delete_by_ref"}
    assert {file.stem for file in FILES} == set(scripts.SCRIPTS) | {"_store", "_session", "_lifetime", "_refs"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_script_has_a_header_and_fits_on_a_screen(file: Path) -> None:
    """The header comes first and says what the KEYS and ARGV are and what is returned; at most 80 lines of code."""
    assert HEADER.match(file.read_text())
    assert len(_code(file)) <= 80
    assert "#!" not in file.read_text()
    assert "setresp" not in file.read_text()


@pytest.mark.parametrize("file", [file for file in FILES if file.stem in scripts.SCRIPTS], ids=lambda file: file.name)
def test_a_header_tells_of_every_error(file: Path) -> None:
    """Every code that a script returns itself is in its header, and KEYS and ARGV are read in no other way."""
    header, body = file.read_text().split("]]\n", 1)
    for code in re.findall(r"RSS[A-Z]+", body):
        assert code in header
    if "refusal(" in body:
        assert "RSSNOTFOUND" in header
        assert "RSSENDED" in header
    if "plan_move(" in body and "unset" not in file.stem:
        assert "RSSLIMIT" in header
    assert "KEYS" not in body
    assert "ARGV" not in body
    assert re.search(r"\nreturn each\(\w+\)\n$", body)


@pytest.mark.parametrize("file", [file for file in FILES if file.stem in scripts.SCRIPTS], ids=lambda file: file.name)
def test_a_header_names_the_arguments_in_the_order_they_are_read(file: Path) -> None:
    """As many keys and arguments are read, in one go at the start, as the header lists."""
    header, body = file.read_text().split("]]\n", 1)
    arguments = re.findall(r"^    (\w+) {2,}", header.split("  ARGV", 1)[1].split("  Returns", 1)[0], re.MULTILINE)
    reads = re.findall(r"\b(arg|number|args|read_counts)\(", body)
    # `args(number())` is one list, `args(count)` one whose number was read before. `expectations` is an argument.
    lists = len(re.findall(r"\bargs\((?!2 \* expectations)", body))
    counts = len(re.findall(r"args\((?:\d \* )?number\(\)\)", body)) + len(re.findall(r"args\(count\)", body))
    assert lists == counts
    assert len(reads) - counts == len(arguments)


@given(now=st.integers(10**12, 2**41), ttl=st.integers(1, 10**11), data=st.data())
def test_a_horizon_stays_out_of_reach(redis_server: RedisServer, now: int, ttl: int, data: st.DataObject) -> None:
    """Until when the sets of a session live at least is not before its end, and never later as it grows old."""
    source = (Path(__file__).parents[1] / "lua" / "_lifetime.lua").read_text()
    horizon = source[source.index("local power, step") : source.index("-- Let a set live")]
    lines = [f"local now = {now}", horizon, "local then_ = horizon(tonumber(ARGV[1]))", "now = now + tonumber(ARGV[2])"]
    lines.append('return { string.format("%.0f", then_), string.format("%.0f", horizon(ARGV[1] - ARGV[2])) }')
    age = data.draw(st.integers(0, ttl - 1))
    with BlockingRedis.from_url(redis_server.url) as client:
        first, later = map(int, client.eval("\n".join(lines), 0, ttl, age))
    assert now + ttl <= later <= first <= now + ttl + max(ttl // 32, 1)


async def test_loading_is_one_round_trip(client: Redis) -> None:
    """All scripts are there after it."""
    await client.script_flush()
    await SessionStore(client).load()
    assert all(await client.script_exists(*scripts._SHAS.values()))
