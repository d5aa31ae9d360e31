"""The documents and their examples; `python -m tests.documents` checks the types of the examples that are files."""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
GUIDES: Final = sorted((ROOT / "rss" / "guides").glob("*.md"))
DOCUMENTS: Final = [ROOT / "README.md", *GUIDES]
_BLOCK: Final = re.compile(r"^```python\n(?:# (\w+)\.py\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)
_HEADING: Final = re.compile(r"^#+ (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A block of Python in a document: its heading, its file name if it is a file, and its text."""

    document: Path
    heading: str
    file: str
    source: str

    def __str__(self) -> str:
        return f"{self.document.name}, {self.heading}"


def examples(document: Path) -> list[Example]:
    """Return the examples of a document."""
    text = document.read_text()
    return [
        Example(document, _HEADING.findall(text, 0, match.start())[-1], match[1] or "", match[2])
        for match in _BLOCK.finditer(text)
    ]


def main() -> None:
    """Check all examples that are files by mypy and pyright, each in its own folder."""
    files = [example for document in DOCUMENTS for example in examples(document) if example.file]
    assert files
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n, example in enumerate(files):
            (folder / f"example{n}").mkdir()
            (folder / f"example{n}" / f"{example.file}.py").write_text(example.source)
        mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache")]
        for one in sorted(folder.glob("example*")):
            subprocess.run([*mypy, *one.glob("*.py")], cwd=one, check=True)
        command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, name]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
