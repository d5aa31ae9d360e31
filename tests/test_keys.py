"""The names of keys."""

import re

import pytest

from rss.keys import Plain, reference_value


@pytest.fixture(name="layout")
def _layout() -> Plain:
    return Plain("rss", 24)


def test_names_are_those_of_the_original(layout: Plain) -> None:
    """Ids and values are in braces, so a colon in them is no delimiter."""
    assert layout.session("a:b") == "rss:{a:b}"
    assert layout.reference("user_id", 1) == layout.reference("user_id", "1") == "rss:user_id:{1}"
    assert layout.reference("ip", "::1") == "rss:ip:{::1}"
    assert layout.fence("user_id", "ü}") == "rss:_fence:user_id:{ü}}"


def test_the_scripts_make_the_same_names(layout: Plain) -> None:
    """The scripts build the names of the layout from its stems and delimiters."""
    session_stem, set_stem = layout.stems(0)
    assert session_stem + "a" + layout.ending == layout.session("a")
    assert f"{set_stem}ip{layout.before_value}x{layout.ending}" == layout.reference("ip", "x")
    assert f"{set_stem}_fence:{layout.reference('ip', 'x').removeprefix(set_stem)}" == layout.fence("ip", "x")


def test_no_name_is_taken_for_another(layout: Plain) -> None:
    """Names of sessions, sets and fences never collide, whatever the ids and values are."""
    odd = ["a", "x:{a}", "}", "{", ":", "_fence:ip:{a}", "{a}", "ip:{a}"]
    names = [layout.session(text) for text in odd]
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
