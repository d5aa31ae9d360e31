"""Watches Redis and the log for secrets: the tokens in cookies, and the secrets of CSRF tokens."""

import base64
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import redis

from rss import Session, Sessions


class Secrecy(logging.Handler):
    """Collects every token, id and CSRF secret of this process, every command that Redis got, and all log records."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__(logging.DEBUG)
        self.tokens: set[str] = set()
        self.others: set[str] = set()
        self.commands: list[bytes] = []
        self.logged: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Note what is logged, with the traceback."""
        self.logged.append(self.format(record))

    @contextmanager
    def learn(self) -> Iterator[None]:
        """Collect the secrets that are issued while the body runs."""
        write_token, id_of, secret = Sessions.write_token, Sessions.id_of, Session._csrf_secret

        def writing(sessions: Sessions, token: str) -> str:
            if sessions.hash_ids:
                self.tokens.add(token)
            return write_token(sessions, token)

        def naming(sessions: Sessions, token: str) -> str:
            session_id = id_of(sessions, token)
            self.others.add(session_id)
            return session_id

        def deriving(session: Session) -> bytes:
            data = secret(session)
            self.others |= {data.hex(), base64.b64encode(data).decode(), repr(data), str(data)}
            self.others.add(base64.urlsafe_b64encode(data).decode().rstrip("="))
            return data

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sessions, "write_token", writing)
            patch.setattr(Sessions, "id_of", naming)
            patch.setattr(Session, "_csrf_secret", deriving)
            yield

    @contextmanager
    def watch(self, url: str) -> Iterator[None]:
        """Record every command that a server or a cluster gets while the body runs, by MONITOR."""
        if "+cluster" in url:
            with redis.RedisCluster.from_url(url.replace("+cluster", "")) as cluster, ExitStack() as all_of_them:
                for node in cluster.get_primaries():
                    all_of_them.enter_context(self.watch(f"redis://{node.host}:{node.port}"))
                yield
            return
        client = redis.Redis.from_url(url, socket_timeout=None)
        connection: Any = client.connection_pool.get_connection()
        connection.send_command("MONITOR")
        connection.read_response()
        end = f"the end of {id(connection)}".encode()

        def listen() -> None:
            with suppress(redis.ConnectionError):  # The server may die.
                while end not in (command := connection.read_response(disable_decoding=True)):
                    self.commands.append(command)

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            yield
        finally:
            with suppress(redis.ConnectionError):
                client.echo(end)
            listener.join()
            connection.disconnect()
            client.close()

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Record all log messages while the body runs, at every level."""
        root = logging.getLogger()
        level = root.level
        root.addHandler(self)
        root.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            root.setLevel(level)
            root.removeHandler(self)

    def leaks(self) -> list[str]:
        """Return where secrets were seen: "a command" or "the log" for each of them."""
        # Each word once: most commands repeat the names of scripts and keys.
        words = re.findall(r"[\w-]{20,}", b"\n".join(self.commands).decode(errors="replace"))
        commands, logged = "\n".join(set(words)), "\n".join(self.logged)
        in_redis = ["a command" for token in self.tokens if token in commands]
        return in_redis + ["the log" for secret in self.tokens | self.others if secret in logged]

    def __str__(self) -> str:
        """Say how much was searched."""
        return (
            f"{len(self.tokens)} cookie tokens in {len(self.commands)} commands of MONITOR, and with "
            f"{len(self.others)} ids and CSRF secrets in {len(self.logged)} log records: {len(self.leaks())} seen"
        )
