"""Print the lowest versions of all dependencies that pyproject.toml allows: `python3 tests/lowest.py`."""

import tomllib
from pathlib import Path


def main() -> None:
    """Pin each one that the package or an extra names. `testing` is left out: it names tools of tests."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    requirements: list[str] = project["dependencies"]
    for extra, others in project["optional-dependencies"].items():
        requirements += [] if extra == "testing" else others
    for requirement in requirements:
        assert ">=" in requirement, f"{requirement} has no lower bound"
        print(requirement.replace(">=", "==", 1))


if __name__ == "__main__":
    main()
