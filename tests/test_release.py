"""A release needs versions that agree, workflows that run existing targets, and files of one distribution only."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import rss
from tests.documents import ROOT
from tests.release import problem

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

# Import each module of the package in the folder argv[1], with a fresh `rss` for each. It is found there only.
IMPORT_ALL = """
import importlib, pkgutil, sys
from pathlib import Path

site = Path(sys.argv[1])
sys.path = [str(site), *(path for path in sys.path if not Path(path, "rss", "__init__.py").exists())]
for module in pkgutil.walk_packages([str(site / "rss")], "rss.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        print(f"{module.name}: {error}")
    for name in [name for name in sys.modules if name.split(".")[0] == "rss"]:
        del sys.modules[name]
"""


def checkout(folder: Path, *, version: str = "1.2.3", changelog: str) -> Path:
    """Write the two files of a checkout that name its version."""
    (folder / "pyproject.toml").write_text(f'[project]\nname = "redis-session-sets"\nversion = "{version}"\n')
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n{changelog}")
    return folder


RELEASED = "## 1.2.3 - 2026-11-30\n\n- It works.\n\n## 1.2.2 - 2026-10-31\n"
UNRELEASED = f"## Unreleased\n\n{RELEASED}"


def test_a_release_is_right(tmp_path: Path) -> None:
    """The tag, the version and the newest heading name the same version."""
    assert problem(checkout(tmp_path, changelog=RELEASED), "v1.2.3") is None
    assert problem(tmp_path, "") is None


def test_changes_may_be_unreleased_without_a_tag(tmp_path: Path) -> None:
    """Between releases, the newest heading is "Unreleased". A release needs its own."""
    assert problem(checkout(tmp_path, changelog=UNRELEASED), "") is None
    told = problem(tmp_path, "v1.2.3")
    assert told
    assert "'Unreleased'" in told
    assert "'1.2.3 - '" in told


@pytest.mark.parametrize("tag", ["v1.2.4", "1.2.3", "v1.2.3rc1"])
def test_a_wrong_tag(tmp_path: Path, tag: str) -> None:
    """A tag that is not the version after a "v" is refused."""
    told = problem(checkout(tmp_path, changelog=RELEASED), tag)
    assert told
    assert f"the tag is {tag}" in told
    assert "must be v1.2.3" in told


@pytest.mark.parametrize(
    "changelog", ["", "## 1.2.2 - 2026-10-31\n", "## 1.2.3\n", "## 1.2.30 - 2026-11-30\n", "## 1x2y3 - 2026-11-30\n"]
)
@pytest.mark.parametrize("tag", ["", "v1.2.3"])
def test_a_missing_heading(tmp_path: Path, changelog: str, tag: str) -> None:
    """Without a heading for the version and its date, the check fails with and without a tag."""
    told = problem(checkout(tmp_path, changelog=changelog), tag)
    assert told
    assert "CHANGELOG.md" in told


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"TAG": "v0"}, "the tag is v0"),
        ({"GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": "v0"}, "the tag is v0"),
        ({"GITHUB_REF_TYPE": "branch", "GITHUB_REF_NAME": "v0"}, ""),
        ({}, ""),
    ],
)
def test_where_the_tag_comes_from(variables: dict[str, str], told: str) -> None:
    """The tag is TAG, or what GitHub says if it is a tag. This checkout is right without one."""
    others = {name: value for name, value in os.environ.items() if name != "TAG" and not name.startswith("GITHUB_")}
    command = [sys.executable, "tests/release.py"]
    done = subprocess.run(command, env=others | variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == bool(told)
    assert told in done.stderr


def jobs(workflow: Path) -> dict[str, Any]:
    """Return the jobs of a workflow."""
    found: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    return found


def test_there_are_workflows() -> None:
    """The tests below are about the workflows by these names."""
    assert [workflow.name for workflow in WORKFLOWS] == ["ci.yml", "release.yml"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_runs_is_there(workflow: Path) -> None:
    """The make targets, scripts, workflows and jobs that a workflow names exist."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = [step for job in jobs(workflow).values() for step in job.get("steps", [])]
    commands = "\n".join(step.get("run", "") for step in steps)
    assert set(re.findall(r"\bmake ([\w-]+)", commands)) <= targets
    for path in re.findall(r"^(?:python )?([\w./]+(?:\.py|/run))\b", commands, re.MULTILINE):
        assert (ROOT / path).exists(), path
    for job in jobs(workflow).values():
        assert {*([job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", []))} <= {*jobs(workflow)}
        if "uses" in job:
            assert (ROOT / job["uses"]).exists()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(workflow: Path) -> None:
    """Each action of others has the SHA of a commit, and says which version that is."""
    used = re.findall(r"uses: ([^.\s].*)", workflow.read_text())
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)] == []


def test_only_the_job_that_publishes_has_a_token() -> None:
    """No job of CI may write. In a release one job may ask for a token of PyPI, and another make the release."""
    granted = {name: job["permissions"] for path in WORKFLOWS for name, job in jobs(path).items()}
    writing = {name: rights for name, rights in granted.items() if "write" in rights.values()}
    assert writing == {"publish": {"id-token": "write"}, "github": {"contents": "write"}}
    assert jobs(WORKFLOWS[1])["publish"]["environment"]["name"] == "pypi"


@pytest.mark.parametrize("left", ["__version__ = '1.0'\n", None], ids=["overwritten", "removed"])
def test_another_distribution_with_a_package_rss_is_noticed(tmp_path: Path, left: str | None) -> None:
    """An import names the cause if another distribution overwrote rss/__init__.py, or took it along."""
    assert rss.__file__
    shutil.copytree(Path(rss.__file__).parent, tmp_path / "rss", ignore=shutil.ignore_patterns("__pycache__"))
    init = tmp_path / "rss" / "__init__.py"
    init.unlink()
    if left is not None:
        init.write_text(left)
    told = dict(line.split(": ", 1) for line in import_all(tmp_path).splitlines())
    assert len(set(told.values())) == 1
    message = told["rss.store"]
    assert str(tmp_path) in message
    assert "is not that of redis-session-sets: another distribution" in message
    assert "pip install --force-reinstall" in message
    entries = ("asgi", "aiohttp", "aiohttp_session", "fastapi", "quart", "oidc", "moving", "pytest_plugin")
    assert {f"rss.{name}" for name in (*entries, "demo", "session", "store")} <= set(told)


def import_all(site: Path) -> str:
    """Import the modules of the package in a folder, in another process, and return the errors."""
    # Coverage measures the package of the checkout, not this copy.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    command = [sys.executable, "-c", IMPORT_ALL, str(site)]
    return subprocess.run(command, env=env, cwd=site, capture_output=True, text=True, check=True).stdout
