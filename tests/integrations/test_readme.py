"""The applications of the documents, served as they are written."""

import importlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

import rss.aiohttp
from rss import Sessions
from tests.documents import DOCUMENTS, GUIDES, ROOT, Example, examples
from tests.integrations.serving import browser, cookie_of, serve_aiohttp, serve_hypercorn, serve_uvicorn
from tests.integrations.sites import Server

APPS = [example for document in DOCUMENTS for example in examples(document) if example.file == "app"]
URL = "redis://localhost:6379"


@pytest.mark.parametrize("example", APPS, ids=str)
async def test_an_application_does_what_it_says(
    example: Example, watched_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application of a document signs browsers in, and ends one session, all others, and all of a user.

    Only the URL of Redis differs from the document.
    """
    for name in ("uvicorn.access", "aiohttp.access", "hypercorn.access"):
        # Servers log URLs, and some hold the id of a device, which is no token and may be shown.
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)
    assert example.source.count(URL) == 1
    (tmp_path / "app.py").write_text(example.source.replace(URL, watched_url))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    module = importlib.import_module("app")
    serve: Server = serve_aiohttp if isinstance(module.app, web.Application) else serve_uvicorn
    serve = serve_hypercorn if example.heading == "quart.session" else serve
    async with serve(module.app) as url, browser(url) as one, browser(url) as two, browser(url) as three:
        for visitor in (one, two, three):
            await call(visitor, "GET", "/")
            before = cookie_of(visitor)
            await call(visitor, "POST", "/login", data={"user": "alice", "password": "secret"})
            assert cookie_of(visitor) not in ("", before)
            assert "alice" in await call(visitor, "GET", "/")
        store = module.sessions.store
        devices = json.loads(await call(one, "GET", "/devices"))
        assert {device["id"] for device in devices} == set(await store.ids_by("user_id", "alice"))
        here = {device["id"] for device in devices if device.get("here", device["id"] == own_id(module, one))}
        assert here == {own_id(module, one)}
        stranger = await store.create({"user_id": "bob"})
        await call(one, "POST", f"/devices/{stranger}/sign-out")
        assert await store.get(stranger)

        await call(one, "POST", f"/devices/{own_id(module, two)}/sign-out")
        assert "alice" not in await call(two, "GET", "/")
        await call(one, "POST", "/sign-out-others")
        assert "alice" not in await call(three, "GET", "/")
        assert "alice" in await call(one, "GET", "/")

        await call(two, "POST", "/login", data={"user": "alice", "password": "secret"})
        await call(two, "POST", "/logout")
        assert "alice" not in await call(two, "GET", "/")
        await call(one, "POST", "/change-password")
        assert await store.count_by("user_id", "alice") == 0
        assert bool(await store.blocked("user_id", "alice")) == ("block=" in example.source)
        await store.unblock("user_id", "alice")
        await store.delete(stranger)


def own_id(module: Any, visitor: aiohttp.ClientSession) -> str:
    """Return the id of the session that a browser has."""
    return str(module.sessions.id_of(cookie_of(visitor)))


async def call(visitor: aiohttp.ClientSession, method: str, path: str, **more: Any) -> str:
    """Make a request, with the CSRF token if the home page has one, and return the body."""
    if method == "POST":
        async with visitor.get("/") as response:
            token = json.loads(await response.text() or "{}").get("csrf_token")
        if token:
            more["headers"] = {"X-CSRF-Token": token}
            async with visitor.request(method, path, data=more.get("data")) as response:
                assert response.status == 403
    async with visitor.request(method, path, **more) as response:
        assert response.status in (200, 201, 204), await response.text()
        return await response.text()


async def test_the_line_for_aiohttp_session(sessions: Sessions) -> None:
    """The migration line for aiohttp-session runs."""
    (line,) = [one.source for document in GUIDES for one in examples(document) if one.source.startswith("# migration")]
    app = web.Application()
    exec(line, {"rss": rss, "app": app, "sessions": sessions})
    assert app[rss.aiohttp.SESSIONS] is sessions


def test_the_tests_of_the_guide_pass(tmp_path: Path) -> None:
    """The tests in the guide pass unchanged, in a folder of their own."""
    for example in examples(ROOT / "rss" / "guides" / "testing.md"):
        if example.file:
            (tmp_path / f"{example.file}.py").write_text(example.source)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.search(r"^3 passed", result.stdout, re.MULTILINE), result.stdout
