"""The names of keys."""

import re
from typing import Any

import pytest

from rss.keys import SLOTS, Partitioned, Plain, reference_value


@pytest.fixture(name="layout")
def _layout() -> Plain:
    return Plain("rss", 24)


def test_names_are_those_of_the_original(layout: Plain) -> None:
    """Ids and values are in braces, so a colon in them is no delimiter."""
    assert layout.place("a:b")[0] == "rss:{a:b}"
    assert layout.reference("user_id", 1) == layout.reference("user_id", "1") == "rss:user_id:{1}"
    assert layout.reference("ip", "::1") == "rss:ip:{::1}"
    assert layout.fence("user_id", "ü}") == "rss:_fence:user_id:{ü}}"


def test_the_scripts_make_the_same_names(layout: Plain) -> None:
    """The scripts build the names of the layout from its stems and delimiters."""
    session_stem, set_stem = layout.stems(0)
    assert session_stem + "a" + layout.ending == layout.place("a")[0]
    assert f"{set_stem}ip{layout.before_value}x{layout.ending}" == layout.reference("ip", "x")
    assert f"{set_stem}_fence:{layout.reference('ip', 'x').removeprefix(set_stem)}" == layout.fence("ip", "x")


def test_no_name_is_taken_for_another(layout: Plain) -> None:
    """Names of sessions, sets and fences never collide, whatever the ids and values are."""
    odd = ["a", "x:{a}", "}", "{", ":", "_fence:ip:{a}", "{a}", "ip:{a}"]
    names = [layout.place(text)[0] for text in odd]
    names += [name for text in odd for name in (layout.reference("ip", text), layout.fence("ip", text))]
    names += [name for text in odd for name in (layout.reference("p", text), layout.fence("p", text))]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("id_bytes", "length"), [(16, 22), (24, 32), (256, 342)])
def test_an_id_is_random_and_url_safe(id_bytes: int, length: int) -> None:
    """An id is URL-safe, and its length follows from `id_bytes`."""
    ids = {Plain("rss", id_bytes).mint() for _ in range(100)}
    assert len(ids) == 100
    for session_id in ids:
        assert re.fullmatch(r"[\w-]+", session_id, re.ASCII)
        assert len(session_id) == length


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-1, "-1"),
        (10**511, str(10**511)),
        ("x" * 512, "x" * 512),
        ("ü" * 256, "ü" * 256),
        ("\0", "\0"),
        (" ", " "),
        ("😀" * 128, "😀" * 128),
    ],
)
def test_a_reference_value_is_a_text(value: object, text: str) -> None:
    """A reference value is a text of up to 512 bytes."""
    assert reference_value(value, "user_id") == text
    if isinstance(value, str) and len(value.encode()) == 512:
        with pytest.raises(ValueError, match="longer than 512 bytes"):
            reference_value(value + "x", "user_id")


# ---------------------------------------------------------------------- partitions

#: By the number of partitions and the number of one: its tag. Keys contain the tags, so they must never change.
TAGS = {
    (1, 0): "fjl",
    (16, 0): "04s",
    (16, 15): "6kr",
    (64, 0): "53t",
    (64, 1): "j3j",
    (64, 2): "if5",
    (64, 3): "kec",
    (64, 63): "802",
    (256, 255): "qmh",
    (1024, 1023): "60n",
    (4096, 4095): "4oi",
}
#: By the id: its partition of 64. These must never change either.
PARTITIONS = {"a": 7, "abc": 22, "x" * 32: 40, "ü": 16, "j2kSzNfTqf2mXxfVwS9sYw8wY7yqk0Jx": 55}


@pytest.mark.parametrize("place", TAGS, ids=str)
def test_tags_never_change(place: tuple[int, int]) -> None:
    """The keys of a partition begin with a tag that is the same in every version."""
    layout = Partitioned("rss", 24, place[0])
    assert layout.stems(place[1]) == (f"rss:{{{TAGS[place]}}}:s:", f"rss:{{{TAGS[place]}}}:r:")


@pytest.mark.parametrize("session_id", PARTITIONS)
def test_the_partition_of_an_id_never_changes(session_id: str) -> None:
    """An id is in the same partition in every version."""
    layout = Partitioned("rss", 24, 64)
    key, partition = layout.place(session_id)
    assert partition == PARTITIONS[session_id]
    assert key == layout.stems(partition)[0] + session_id


def test_names_in_a_partition() -> None:
    """All keys of a session have the same tag; a brace in a value comes after the tag, so it is no tag."""
    layout = Partitioned("rss", 24, 64)
    assert layout.reference("user_id", 1, 3) == layout.reference("user_id", "1", 3) == "rss:{kec}:r:user_id:1"
    assert layout.fence("ip", "{x}", 3) == "rss:{kec}:r:_fence:ip:{x}"
    session_stem, set_stem = layout.stems(7)
    assert session_stem + "a" + layout.ending == layout.place("a")[0]
    assert f"{set_stem}ip{layout.before_value}x{layout.ending}" == layout.reference("ip", "x", 7)
    assert f"{set_stem}_fence:{layout.reference('ip', 'x', 7).removeprefix(set_stem)}" == layout.fence("ip", "x", 7)


@pytest.mark.parametrize("partitions", [1, 3, 16, 64, 256, 1024, 4096])
@pytest.mark.parametrize("masters", [1, 3, 7, 30])
def test_masters_with_equal_ranges_have_equally_many_partitions(partitions: int, masters: int) -> None:
    """Of several masters with equal ranges of slots, each has as many partitions as the others, or one more."""
    slots = Partitioned("rss", 24, partitions).slots
    assert len(set(slots)) == partitions
    owned = [0] * masters
    for slot in slots:
        owned[slot * masters // SLOTS] += 1
    assert max(owned) - min(owned) <= 1


@pytest.mark.parametrize("partitions", [1, 7, 64, 4096])
@pytest.mark.parametrize("id_bytes", [16, 24, 256])
def test_an_id_is_minted_into_a_partition(partitions: int, id_bytes: int) -> None:
    """An id for a given partition is random, and as long as any other id."""
    layout = Partitioned("rss", id_bytes, partitions)
    for partition in {0, partitions // 2, partitions - 1}:
        ids = {layout.mint(partition) for _ in range(20)}
        assert len(ids) == 20
        assert {layout.place(session_id)[1] for session_id in ids} == {partition}
        assert {len(session_id) for session_id in ids} == {len(layout.mint())}
        assert all(re.fullmatch(r"[\w-]+", session_id, re.ASCII) for session_id in ids)


@pytest.mark.parametrize("partitions", [0, -1, 4097, 1.5, "64", True])
def test_a_bad_number_of_partitions(partitions: Any) -> None:
    """A number of partitions that is no integer from 1 to 4,096 is refused."""
    with pytest.raises(ValueError, match="partitions must be an integer from 1 to 4,096"):
        Partitioned("rss", 24, partitions)
