"""Run luacheck over the scripts as Redis gets them: `python -m tests.lint_lua`."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from rss.engine import meta, operations, scripts
from rss.engine.coalesce import Operation
from rss.references import Reference

#: The globals in the sandbox of Redis that the scripts use. Any other global is a mistake.
_SANDBOX: Final = (
    *("redis", "KEYS", "ARGV", "cjson"),
    *("ipairs", "pairs", "pcall", "tonumber", "type", "unpack", "error", "math", "string", "table"),
)
_COMMAND: Final = (
    *("luacheck", "--no-color", "--quiet", "--codes", "--formatter", "plain"),
    *("--max-line-length", "120", "--std", "none", "--read-globals"),
)
_FINDING: Final = re.compile(r".*?/(?P<script>\w+)\.(?P<schema>\d)\.lua:(?P<line>\d+):(?P<column>\d+): (?P<text>.*)")
_TEXT: Final = re.compile(r"\([WE](?P<group>\d)\d+\) (?:unused (?:variable|function) '(?P<unused>\w+)')?")
_OTHER: Final = re.compile(r"on line (\d+)")
_LOCAL: Final = re.compile(r"^local (?:function )?([\w, ]+)", re.MULTILINE)

#: A place in the files: name and line.
Place = tuple[str, int]


def schemas() -> list[str]:
    """Return the schemas of some stores: without references, with all options of references, and without JSON."""
    kinds: list[Mapping[str, Reference]] = [
        {},
        {"user_id": Reference(limit=5, strict=True, identity=True), "team": Reference(limit=2, on_limit="refuse")},
        {"user_id": Reference()},
    ]
    return [
        scripts.schema(
            kind,
            max_age=1,
            max_lifetime=n,
            tombstone=operations.TOMBSTONE,
            json=n < 2,
            before_value=":{",
            ending="}",
            partitioned=n < 2,
            events=n == 1,
        )
        for n, kind in enumerate(kinds)
    ]


def places(schema: str, operation: Operation) -> list[Place]:
    """Return where each line of an assembled script comes from."""
    names = ["_store", *(f"_{part}" for part in scripts.PARTS if part in operation.parts), operation.script]
    lines = [("schema", n) for n, _ in enumerate(schema.splitlines(), 1)]
    lines.append(("schema", len(lines) + 1))  # `Scripts` appends a line for partitions.
    for name in names:
        lines += [(f"lua/{name}.lua", n) for n, _ in enumerate(scripts.read(name).splitlines(), 1)]
    return lines


def findings() -> list[str]:
    """Return all mistakes, each with file and line.

    A script need not use all functions of a shared part, but some script must use each function. A script must use
    something of each of its parts.
    """
    found: dict[tuple[Place, str], set[str]] = defaultdict(set)
    unused: dict[tuple[str, str], set[str]] = defaultdict(set)
    readers: dict[str, set[str]] = defaultdict(set)
    for script, (name, line), column, text in _reports():
        match = _TEXT.match(text)
        found[(name, line), f"{column}: {text}"].add(script)
        if match and match["unused"]:
            unused[script, name].add(match["unused"])
    for operation in operations.ALL:
        for part in ("store", *operation.parts):
            readers[f"lua/_{part}.lua"].add(operation.script)
        readers["schema"].add(operation.script)

    wrong = []
    for ((name, line), text), by in sorted(found.items()):
        match = _TEXT.search(text)
        if not match or match["group"] not in "23" or by >= readers.get(name, set()):
            wrong.append(f"{name}:{line}:{text}")
    for operation in operations.ALL:
        for part in operation.parts:
            names = _LOCAL.findall(scripts.read(f"_{part}"))
            defined = {name.strip() for several in names for name in several.split(",")}
            if defined and defined <= unused[operation.script, f"lua/_{part}.lua"]:
                wrong.append(f"lua/{operation.script}.lua: uses nothing of the part {part}, which is one of its parts")
    return wrong


def _reports() -> Iterator[tuple[str, Place, str, str]]:
    """Run luacheck, and yield the script, the place, the column and the text of each report."""
    with tempfile.TemporaryDirectory(prefix="rss-") as folder:
        where: dict[tuple[str, str], list[Place]] = {}
        for n, schema in enumerate(schemas()):
            sources = scripts.Scripts(
                schema, {operation.script: operation.parts for operation in operations.ALL}
            ).sources
            for operation in operations.ALL:
                (Path(folder) / f"{operation.script}.{n}.lua").write_text(sources[operation.script], encoding="utf-8")
                where[operation.script, str(n)] = places(schema, operation)
        for name in meta.SCRIPTS:
            source = scripts.read(name)
            (Path(folder) / f"{name}.0.lua").write_text(source, encoding="utf-8")
            where[name, "0"] = [(f"lua/{name}.lua", n) for n, _ in enumerate(source.splitlines(), 1)]
        done = subprocess.run([*_COMMAND, *_SANDBOX, "--", folder], capture_output=True, text=True, check=False)
        if done.returncode > 2:
            raise RuntimeError(f"luacheck failed: {done.stdout}{done.stderr}")
        for line in done.stdout.splitlines():
            if match := _FINDING.fullmatch(line):
                lines = where[match["script"], match["schema"]]
                yield match["script"], lines[int(match["line"]) - 1], match["column"], _placed(match["text"], lines)


def _placed(text: str, lines: list[Place]) -> str:
    """Return a text of luacheck with the line in a file instead of the line in the assembled script."""
    other = _OTHER.search(text)
    return _OTHER.sub("in line {1} of {0}".format(*lines[int(other[1]) - 1]), text) if other else text


def main() -> int:
    """Print what is wrong; return 1 if anything is."""
    if shutil.which("luacheck") is None:
        print("luacheck is not installed: the Lua files were not checked")
        return 0
    wrong = findings()
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
