"""Check that pyproject.toml, CHANGELOG.md and the tag agree on the version: `python3 tests/release.py`.

The tag is the variable TAG. In a workflow that GitHub runs for a tag, it is that tag. Without a tag, the newest heading
may be "Unreleased".
"""

import os
import re
import sys
import tomllib
from pathlib import Path


def problem(root: Path, tag: str) -> str | None:
    """Return what is wrong in the checkout at *root*, or None. *tag* is "" if there is none."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    if tag and tag != f"v{version}":
        return f"the tag is {tag}, but the version in pyproject.toml is {version}: the tag must be v{version}"
    newest = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    if not newest:
        return "CHANGELOG.md has no heading of a version"
    if re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", newest[1]) or (newest[1] == "Unreleased" and not tag):
        return None
    return f"the newest heading of CHANGELOG.md is {newest[1]!r}: it must be '{version} - ' and the date, as 2026-01-31"


def main() -> None:
    """Exit with a message if something is wrong."""
    tag = os.environ.get("TAG", "")
    if not tag and os.environ.get("GITHUB_REF_TYPE") == "tag":
        tag = os.environ["GITHUB_REF_NAME"]
    sys.exit(problem(Path(__file__).parents[1], tag))


if __name__ == "__main__":
    main()
