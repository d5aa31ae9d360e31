"""Real servers for the applications of the tests, on the loopback, and a client that keeps cookies."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import hypercorn.asyncio
import hypercorn.config
import uvicorn
from aiohttp import web


@asynccontextmanager
async def serve_aiohttp(app: web.Application, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Serve by aiohttp's own runner."""
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def serve_uvicorn(app: Any) -> AsyncIterator[str]:
    """Serve by uvicorn."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="wsproto", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        assert not serving.done()
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def serve_hypercorn(app: Any) -> AsyncIterator[str]:
    """Serve by hypercorn."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = hypercorn.config.Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.graceful_timeout = 1
    stop = asyncio.Event()
    serving = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait))
    try:
        yield url
    finally:
        stop.set()
        await serving


def tls(protocol: int) -> ssl.SSLContext:
    """Return TLS without a certificate, which is of use only on the loopback.

    *protocol*: `ssl.PROTOCOL_TLS_SERVER` or `ssl.PROTOCOL_TLS_CLIENT`.
    """
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # TLS 1.3 always has a certificate.
    context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
    return context


@asynccontextmanager
async def browser(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a client of a site that keeps its cookies, also those that are secure, and follows no redirect."""
    jar = aiohttp.CookieJar(unsafe=True, treat_as_secure_origin=[url])
    async with aiohttp.ClientSession(url, cookie_jar=jar) as client:
        yield client


def cookie_of(client: aiohttp.ClientSession, name: str = "session-id") -> str:
    """Return the value of a client's session cookie; empty if there is none."""
    return next((cookie.value for cookie in client.cookie_jar if cookie.key == name), "")
