"""The applications of the README, served as they are written."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from aiohttp import web

import rss.aiohttp
from rss import Sessions
from tests.integrations.serving import browser, cookie_of, serve_aiohttp, serve_hypercorn, serve_uvicorn
from tests.integrations.sites import Server

README = (Path(__file__).parents[2] / "README.md").read_text()
APPS = re.findall(r"```python\n# app\.py\n(.*?)```", README, re.DOTALL)
NAMES = ["aiohttp", "FastAPI", "Quart", "quart.session", "Litestar"]
URL = "redis://localhost:6379"


@pytest.mark.parametrize(("name", "source"), list(zip(NAMES, APPS, strict=True)), ids=NAMES)
async def test_an_application_does_what_it_says(
    name: str, source: str, watched_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two browsers sign in, one changes the password, and both are signed out. Only the URL of Redis is another."""
    assert source.count(URL) == 1
    (tmp_path / "app.py").write_text(source.replace(URL, watched_url))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    module = importlib.import_module("app")
    serve: Server = {"aiohttp": serve_aiohttp, "quart.session": serve_hypercorn}.get(name, serve_uvicorn)
    async with serve(module.app) as url, browser(url) as one, browser(url) as other:
        for visitor in (one, other):
            async with visitor.get("/") as response:
                assert await response.json() == {}
            for _ in range(2):
                before = cookie_of(visitor)
                async with visitor.post("/sign-in") as response:
                    assert (await response.json())["user"] == "alice"
                assert cookie_of(visitor) not in ("", before)
        assert await module.sessions.store.count_by("user", "alice") == 2
        async with one.post("/change-password") as response:
            assert await response.json() == {}
        async with other.get("/") as response:
            assert await response.json() == {}


async def test_the_line_for_aiohttp_session(sessions: Sessions) -> None:
    """It is one that runs."""
    (line,) = re.findall(r"```python\n# migration\n(.*?)```", README, re.DOTALL)
    app = web.Application()
    exec(line, {"rss": rss, "app": app, "sessions": sessions})
    assert app[rss.aiohttp.SESSIONS] is sessions


def test_every_requirement_is_in_the_table() -> None:
    """From the first to the last, with an answer."""
    rows = re.findall(r"^\| S(\d+) \| [^|]+ \| [^|]+ \|$", README, re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 33))
