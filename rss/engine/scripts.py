"""Assemble the scripts of `lua/`: the schema of a store, the shared parts, then the script itself."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, cast

import hiredis

from rss.references import Reference

#: The shared parts, in the order in which they precede a script. `_store.lua` precedes all of them.
PARTS: Final = ("sets", "session", "read", "write", "expect", "renew", "tell", "end", "fence", "page", "move", "rounds")

_FOLDER: Final = Path(__file__).parents[1] / "lua"
_PLAIN: Final = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. ")


def pack(*command: str | bytes | int) -> bytes:
    """Return a command in the wire format."""
    return cast("bytes", hiredis.pack_command(command))  # type: ignore[arg-type]


def read(name: str) -> str:
    """Return the text of a file of `lua/`. The folder is inside the package, or in a checkout beside it."""
    folder = _FOLDER if _FOLDER.exists() else _FOLDER.parents[1] / "lua"
    return (folder / f"{name}.lua").read_text(encoding="utf-8")


def schema(
    references: Mapping[str, Reference],
    *,
    max_age: int,
    max_lifetime: int,
    tombstone: int,
    json: bool,
    before_value: str,
    ending: str,
    partitioned: bool,
    events: bool = False,
) -> str:
    """Return the configuration of a store as Lua. Times are milliseconds. `_store.lua` describes each name."""
    kinds = references.values()
    identity = next((n for n, kind in enumerate(kinds, 1) if kind.identity), None)
    strict = _table([kind.strict for kind in kinds])
    limits = _table([kind.limit or 0 for kind in kinds])
    refuses = _table([bool(kind.limit) and kind.on_limit == "refuse" for kind in kinds])
    state = _table(["id", "_ended", "_created", "_max_age", *references, *(["_arriving"] if partitioned else [])])
    return (
        f"local max_age, max_lifetime, tombstone = {max_age}, {max_lifetime}, {tombstone}\n"
        f"local json, before_value, ending = {_lua(json)}, {_lua(before_value)}, {_lua(ending)}\n"
        f"local events = {_lua(events)}\n"
        f"local state, references, identity = {state}, {len(references)}, {identity or 'false'}\n"
        f"local strict, limits, refuses = {strict}, {limits}, {refuses}\n"
    )


def _lua(value: str | int | bool) -> str:  # noqa: FBT001 - a value of Lua
    """Return a literal of Lua. A text is escaped byte by byte, so it can hold any characters."""
    if isinstance(value, str):
        return '"' + "".join(chr(byte) if byte in _PLAIN else f"\\{byte:03}" for byte in value.encode()) + '"'
    return str(value).lower()


def _table(values: list[str] | list[int] | list[bool]) -> str:
    return "{ " + ", ".join(map(_lua, values)) + " }" if any(values) else "false"


class Scripts:
    """The assembled scripts of a store, by name.

    *partitioned*: whether a partition may move between the masters of a cluster. If so, each script has a second
    version, whose name is that of `asked_name`. It runs on the master to which the slot moves.
    """

    def __init__(self, schema: str, parts: Mapping[str, Iterable[str]], *, partitioned: bool = False) -> None:
        #: The texts of the scripts.
        self.sources: dict[str, str] = {}
        for name, wanted in parts.items():
            shared = [read(f"_{part}") for part in PARTS if part in wanted]
            text = "".join([read("_store"), *shared, read(name)])
            self.sources[name] = f"{schema}local partitioned, asked = {_lua(partitioned)}, false\n{text}"
            if partitioned:
                self.sources[asked_name(name)] = f"{schema}local partitioned, asked = true, true\n{text}"
        #: The SHA-1 digests of the scripts, in hexadecimal.
        self.shas: dict[str, str] = {name: sha(source) for name, source in self.sources.items()}
        #: The names of the scripts without those versions. All of them are loaded together, which takes Redis 15 ms.
        self.usual: tuple[str, ...] = tuple(parts)
        #: The commands that load the scripts. Each reply is a digest.
        self.loads: dict[str, bytes] = {name: pack("SCRIPT", "LOAD", source) for name, source in self.sources.items()}


def asked_name(name: str) -> str:
    """Return the name of the version of a script for the master to which a slot moves."""
    return f"{name}, asked"


def sha(source: str) -> str:
    """Return the SHA-1 digest of a script, which is its name in Redis."""
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
