"""The scripts of `lua/` as Redis gets them: the schema of a store, the shared parts, the script itself."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, cast

import hiredis

from rss.references import Reference

#: The shared parts, in the order in which they stand before a script. `_store.lua` stands before all of them.
PARTS: Final = ("sets", "session", "read", "write", "expect", "renew", "end", "fence", "page", "move", "rounds")

_FOLDER: Final = Path(__file__).parents[1] / "lua"
_PLAIN: Final = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. ")


def pack(*command: str | bytes | int) -> bytes:
    """Return a command as bytes on the wire."""
    return cast("bytes", hiredis.pack_command(command))  # type: ignore[arg-type]


def read(name: str) -> str:
    """Return a file of `lua/`: it is in the package, in a checkout beside it."""
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
) -> str:
    """Return the configuration of a store as Lua; `_store.lua` says what each name means. Times are milliseconds."""
    kinds = references.values()
    identity = next((n for n, kind in enumerate(kinds, 1) if kind.identity), None)
    strict = _table([kind.strict for kind in kinds])
    limits = _table([kind.limit or 0 for kind in kinds])
    refuses = _table([bool(kind.limit) and kind.on_limit == "refuse" for kind in kinds])
    state = _table(["id", "_ended", "_created", "_max_age", *references])
    return (
        f"local max_age, max_lifetime, tombstone = {max_age}, {max_lifetime}, {tombstone}\n"
        f"local json, before_value, ending = {_lua(json)}, {_lua(before_value)}, {_lua(ending)}\n"
        f"local state, references, identity = {state}, {len(references)}, {identity or 'false'}\n"
        f"local strict, limits, refuses = {strict}, {limits}, {refuses}\n"
    )


def _lua(value: str | int | bool) -> str:  # noqa: FBT001 - a value of Lua
    """Return a literal of Lua; of a text, its bytes, whatever they are."""
    if isinstance(value, str):
        return '"' + "".join(chr(byte) if byte in _PLAIN else f"\\{byte:03}" for byte in value.encode()) + '"'
    return str(value).lower()


def _table(values: list[str] | list[int] | list[bool]) -> str:
    return "{ " + ", ".join(map(_lua, values)) + " }" if any(values) else "false"


class Scripts:
    """All scripts of a store, by name, with what Redis calls each of them."""

    def __init__(self, schema: str, parts: Mapping[str, Iterable[str]]) -> None:
        #: The texts.
        self.sources = {
            name: "".join([schema, read("_store"), *(read(f"_{part}") for part in PARTS if part in wanted), read(name)])
            for name, wanted in parts.items()
        }
        #: Their SHA-1 digests in hexadecimal.
        self.shas = {name: sha(source) for name, source in self.sources.items()}
        #: The commands that load all of them; the replies are the digests.
        self.load = b"".join(pack("SCRIPT", "LOAD", source) for source in self.sources.values())


def sha(source: str) -> str:
    """Return what Redis calls a script."""
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
