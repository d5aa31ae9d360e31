"""Serves the demo: `python -m rss.demo`, with a Redis of its own unless there is one."""

import argparse
import asyncio
import contextlib
import signal
import socket
import sys

from quart import Quart

from rss import CookiePolicy, Reference, Sessions, SessionStore
from rss.demo.app import create_app
from rss.testing import redis_server


def main() -> None:
    """Serve until it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m rss.demo", description="Sign in on several devices, and out again."
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to reach it from a phone, too")
    parser.add_argument("--port", default=5000, type=int)
    options = parser.parse_args()
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            sys.exit(f"cannot serve on {options.host}:{options.port}: {error.strerror}. Choose another --port.")
    with redis_server() as server:
        references = {"user": Reference(identity=True)}
        store = SessionStore.from_url(server.url, references=references, prefix="rss-demo", timeout=2)
        # Without TLS, some browsers do not keep a cookie that is secure. In production, leave it at the default.
        app = create_app(Sessions(store, cookie=CookiePolicy(secure=False)))
        print(f"Redis: {server.origin}\nOpen http://{options.host}:{options.port} in two browsers. Ctrl+C ends it.")
        asyncio.run(_serve(app, options.host, options.port))


async def _serve(app: Quart, host: str, port: int) -> None:
    """Serve until a signal ends it: Ctrl+C, a closed terminal, or `kill`."""
    ending: asyncio.Event = app.extensions["ending"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)

    async def ended() -> None:
        await ending.wait()

    await app.run_task(host, port, shutdown_trigger=ended)


if __name__ == "__main__":
    main()
