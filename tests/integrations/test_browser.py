"""The demo in a real Chromium, used by two browsers at once."""

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from axe_playwright_python.base import AXE_FILE_PATH
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, async_playwright, expect
from redis.asyncio import Redis

from rss.testing import free_port
from tests.integrations.serving import browser as client_of
from tests.secrecy import Secrecy
from tests.servers import own_server

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
#: The folder for screenshots, from the variable SCREENSHOTS; None means that no screenshots are taken.
SCREENSHOTS = os.environ.get("SCREENSHOTS")
# Chromium must not connect to anything outside this machine.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--no-first-run"]

IPHONE = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) "
    "Version/18.5 Mobile/15E148 Safari/604.1"
)
AXE = Path(AXE_FILE_PATH).read_text()
MAC = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:145.0) Gecko/20100101 Firefox/145.0"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="there is no Chromium here: install it, or name it by the variable CHROMIUM, to test the demo in a browser",
)


@pytest.fixture(name="demo")
async def _demo(watched_url: str, secrecy: Secrecy) -> AsyncIterator[str]:
    """The demo, on a server that is watched."""
    async with Redis.from_url(watched_url) as client:
        await client.flushdb()
    async with serve_demo(watched_url, free_port(), secrecy) as demo:
        yield demo


@asynccontextmanager
async def serve_demo(url: str, port: int, secrecy: Secrecy) -> AsyncIterator[str]:
    """Serve the demo by its command, and search its output for secrets, too."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rss.demo", "--port", str(port),
        env={**os.environ, "REDIS_URL": url, "RSS_SERVER": "url"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(30):
            while not await _listens(port):
                assert process.returncode is None
                await asyncio.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        said, _ = await process.communicate()
        secrecy.logged.append(said.decode())
        assert f"Open http://127.0.0.1:{port} in two browsers" in said.decode()
        assert "Traceback" not in said.decode()  # Not even if pages are still open.
        assert process.returncode == 0


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


@pytest.fixture(name="chromium")
async def _chromium() -> AsyncIterator[Browser]:
    """A browser."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        await browser.close()


@asynccontextmanager
async def person(
    chromium: Browser, secrecy: Secrecy, *, width: int = 1280, script: bool = True, agent: str | None = None
) -> AsyncIterator[Page]:
    """Open a page in a browser of its own, and fail if the page reports an error."""
    context = await chromium.new_context(
        viewport={"width": width, "height": 720}, java_script_enabled=script, user_agent=agent
    )
    page = await context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    # Chromium reports an error page and a missing image in the same words.
    page.on("console", lambda message: errors.append(message.text) if _is_error(message) else None)
    yield page
    if token := await token_of(context):
        secrecy.tokens.add(token)
    assert errors == []
    await context.close()


def _is_error(message: ConsoleMessage) -> bool:
    expected = re.fullmatch(
        r"Failed to load resource: the server responded with a status of (403|404|409|503) .*"
        # An open page tries to reach a server that is away, or that goes away meanwhile.
        r"|WebSocket connection to .* failed: .*ERR_CONNECTION_(REFUSED|RESET)",
        message.text,
    )
    return message.type == "error" and not expected


async def token_of(context: BrowserContext) -> str:
    """Return the value of the session cookie; empty if there is none."""
    cookies = {cookie.get("name"): cookie.get("value", "") for cookie in await context.cookies()}
    return cookies.get("session-id", "")


async def sign_in(page: Page, demo: str, user: str = "Alice") -> None:
    """Sign in as one of the users."""
    await page.goto(demo)
    await page.get_by_role("button", name=user).click()
    await expect(page.get_by_role("heading", name="Your devices")).to_be_visible()


async def shoot(page: Page, name: str) -> None:
    """Take a picture, if pictures are wanted."""
    if SCREENSHOTS:
        await page.screenshot(path=Path(SCREENSHOTS, name), full_page=True)


async def test_one_browser_ends_the_session_of_another(demo: str, chromium: Browser, secrecy: Secrecy) -> None:
    """The open page of a session that another browser ends says so within two seconds, and is signed out."""
    laptop, phone = person(chromium, secrecy, agent=MAC), person(chromium, secrecy, width=390, agent=IPHONE)
    async with laptop as one, phone as other:
        await sign_in(one, demo)
        await sign_in(other, demo)
        await one.reload()
        await expect(one.locator(".devices li")).to_have_count(2)
        await expect(one.locator(".here")).to_have_count(1)
        await expect(one.locator(".here")).to_contain_text("this device")
        await expect(one.locator(".here")).to_contain_text("Firefox on Mac OS X")
        await expect(one.locator("li:not(.here)")).to_contain_text("Mobile Safari on iOS")
        icons = await one.locator("li img").evaluate_all("images => images.map(image => new URL(image.src).pathname)")
        assert [icon.removeprefix("/static/") for icon in icons] == [
            "devices/laptop.svg", "browsers/firefox.svg", "systems/apple.svg",
            "devices/phone.svg", "browsers/safari.svg", "systems/apple.svg",
        ]  # fmt: skip
        await expect(other.get_by_role("alert")).to_be_hidden()
        await shoot(one, "devices-1280.png")
        await shoot(other, "devices-390.png")

        await one.locator("li:not(.here)").get_by_role("button").click()
        await expect(other.get_by_role("alert")).to_contain_text("signed out from another device", timeout=2000)
        await expect(other.get_by_role("button")).to_have_count(0)
        await expect(one.locator(".devices li")).to_have_count(1)
        await shoot(other, "ended-390.png")

        await other.get_by_role("link", name="Sign in again").click()
        await expect(other.get_by_role("heading", name="Sign in")).to_be_visible()
        await expect(other.get_by_role("status")).to_contain_text("signed out from another device")
        await shoot(other, "sign-in-390.png")
        await one.reload()
        await expect(one.get_by_role("heading", name="Your devices")).to_be_visible()


async def test_signing_in_gives_another_cookie(demo: str, chromium: Browser, secrecy: Secrecy) -> None:
    """A login sets another cookie, which scripts cannot read; the old cookie opens no session."""
    async with person(chromium, secrecy) as page:
        await page.goto(demo)
        await shoot(page, "sign-in-1280.png")
        before = await token_of(page.context)
        await sign_in(page, demo)
        after = await token_of(page.context)
        assert before
        assert after not in ("", before)
        assert await page.evaluate("document.cookie") == ""
        async with person(chromium, secrecy) as attacker:
            cookie = {"name": "session-id", "value": before, "url": demo}
            await attacker.context.add_cookies([cookie])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
            await attacker.goto(demo)
            await expect(attacker.get_by_role("heading", name="Sign in")).to_be_visible()


async def test_changing_the_password_ends_all(demo: str, chromium: Browser, secrecy: Secrecy) -> None:
    """A new password ends all sessions of the user, also the current one, but none of another user."""
    async with (
        person(chromium, secrecy) as one,
        person(chromium, secrecy) as two,
        person(chromium, secrecy) as bob,
    ):
        await sign_in(one, demo)
        await sign_in(two, demo)
        await sign_in(bob, demo, "Bob")
        await one.get_by_role("link", name="Change the password").click()
        await expect(one.get_by_text("All 2 devices of Alice will be signed out")).to_be_visible()
        await one.get_by_label("Current password").fill("wrong")
        await one.get_by_label("New password").fill("new")
        await one.get_by_role("button", name="Change the password").click()
        await expect(one.get_by_role("alert")).to_contain_text("not your current password")
        await shoot(one, "password-1280.png")
        await one.get_by_label("Current password").fill("demo")
        await one.get_by_label("New password").fill("new")
        await one.get_by_role("button", name="Change the password").click()
        await expect(one.get_by_role("status")).to_contain_text("The password was changed")
        await expect(two.get_by_role("alert")).to_contain_text("The password was changed", timeout=2000)
        await bob.reload()
        await expect(bob.get_by_role("heading", name="Your devices")).to_be_visible()


async def test_it_works_without_scripts_and_by_keyboard(demo: str, chromium: Browser, secrecy: Secrecy) -> None:
    """Signing in and out works without JavaScript, and signing in works by keyboard."""
    async with person(chromium, secrecy, script=False) as page, person(chromium, secrecy) as other:
        await sign_in(other, demo, "Carol")
        await page.goto(demo)
        for _ in range(4):
            await page.keyboard.press("Tab")
        await expect(page.get_by_role("button", name="Carol")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator(".devices li")).to_have_count(2)
        await page.get_by_role("button", name="Sign out everywhere else").click()
        await expect(page.get_by_role("status")).to_contain_text("All other devices are signed out")
        await expect(page.locator(".devices li")).to_have_count(1)
        await expect(page.get_by_role("button", name="Sign out everywhere else")).to_have_count(0)
        await expect(other.get_by_role("alert")).to_be_visible(timeout=2000)
        await page.get_by_role("button", name="Sign out here").click()
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


async def test_a_page_is_no_wider_than_a_phone(demo: str, chromium: Browser, secrecy: Secrecy) -> None:
    """A page is no wider than a phone, and its buttons are large enough for a thumb."""
    async with person(chromium, secrecy, width=390) as page:
        await sign_in(page, demo)
        assert await page.evaluate("document.documentElement.scrollWidth") <= 390
        for button in await page.get_by_role("button").all():
            box = await button.bounding_box()
            assert box
            assert box["height"] >= 44


async def test_a_forged_form_is_refused(demo: str, chromium: Browser, secrecy: Secrecy) -> None:
    """A form without its CSRF token is refused, and so is a WebSocket of another site."""
    async with person(chromium, secrecy) as page, client_of(demo) as attacker:
        await sign_in(page, demo)
        async with attacker.get("/") as response:
            (another,) = re.findall(r'name="csrf_token" value="([^"]+)"', await response.text())
        attacker.cookie_jar.clear()
        cookies = {"Cookie": f"session-id={await token_of(page.context)}"}
        for form in ({}, {"csrf_token": ""}, {"csrf_token": another}):
            for path in ("/password", "/sign-out", "/sign-out-others", "/sign-in"):
                async with attacker.post(path, data={**form, "user": "Bob"}, headers=cookies) as response:
                    assert response.status == 403
        for origin in ("https://evil.example", "", "null"):
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                await attacker.ws_connect("/live", headers={**cookies, "Origin": origin})
        await page.reload()
        await expect(page.get_by_role("heading", name="Your devices")).to_be_visible()


async def test_a_page_that_was_away_is_told(demo: str, chromium: Browser, secrecy: Secrecy) -> None:
    """A page that connects again after its session has ended is told so at once."""
    async with person(chromium, secrecy) as one, person(chromium, secrecy) as other, client_of(demo) as client:
        await sign_in(one, demo)
        await sign_in(other, demo)
        headers = {"Cookie": f"session-id={await token_of(other.context)}", "Origin": demo}
        async with asyncio.timeout(5), client.ws_connect("/live", headers=headers):
            pass  # The connection is accepted even if there is nothing to tell.
        await one.reload()
        await one.get_by_role("button", name="Sign out everywhere else").click()
        await expect(one.locator(".devices li")).to_have_count(1)
        async with client.ws_connect("/live", headers=headers) as socket:
            assert "from another device" in (await socket.receive_json())["notice"]


async def test_nobody_ends_the_sessions_of_others(demo: str, chromium: Browser, secrecy: Secrecy) -> None:
    """A user cannot end the session of another user by its id."""
    async with (
        person(chromium, secrecy) as alice,
        person(chromium, secrecy) as second,
        person(chromium, secrecy) as bob,
    ):
        await sign_in(alice, demo)
        await sign_in(second, demo)
        await sign_in(bob, demo, "Bob")
        await alice.reload()
        session_id = await alice.locator("button[name=id]").get_attribute("value")
        token = await bob.locator("input[name=csrf_token]").first.get_attribute("value")
        response = await bob.request.post(
            f"{demo}/sign-out-device", form={"csrf_token": token or "", "id": session_id or ""}
        )
        assert response.ok
        await alice.reload()
        await expect(alice.locator(".devices li")).to_have_count(2)


async def test_a_visitor_who_is_not_signed_in(demo: str) -> None:
    """A visitor who is not signed in can sign in as a known user only, and can end no session."""
    async with client_of(demo) as client:
        async with client.get("/") as response:
            (csrf_token,) = re.findall(r'name="csrf_token" value="([^"]+)"', await response.text())
        for path, form, status in (
            ("/sign-in", {}, 400),
            ("/sign-in", {"user": "Mallory"}, 400),
            ("/sign-out-device", {"id": "x" * 43}, 401),
            ("/sign-out-others", {}, 401),
            ("/password", {}, 401),
        ):
            async with client.post(path, data={**form, "csrf_token": csrf_token}) as response:
                assert response.status == status
        async with client.get("/") as response:
            assert "Sign in" in await response.text()


async def test_headers_protect_its_pages(demo: str, watched_url: str) -> None:
    """Headers forbid inline code, foreign content, frames and caching for the pages of the demo."""
    del watched_url
    async with client_of(demo) as client, client.get("/") as response:
        page = await response.text()
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["Cache-Control"] == "no-store"
    assert "style=" not in page
    assert "<script>" not in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
async def test_its_pages_are_accessible(
    demo: str, chromium: Browser, secrecy: Secrecy, width: int, scheme: Any
) -> None:
    """axe-core finds no violation on any page."""

    async def check(page: Page) -> None:
        await page.evaluate(AXE)
        found = await page.evaluate("axe.run()")
        assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []

    async with person(chromium, secrecy, width=width) as page, person(chromium, secrecy) as other:
        await page.emulate_media(color_scheme=scheme)
        await page.goto(demo)
        await check(page)
        await sign_in(other, demo)
        await sign_in(page, demo)
        await check(page)
        await page.goto(f"{demo}/?done=others")
        await check(page)
        await page.goto(f"{demo}/password")
        await check(page)
        await page.goto(f"{demo}/nowhere")
        await expect(page.get_by_role("heading", name="Not Found")).to_be_visible()
        await check(page)
        await page.goto(demo)
        await other.reload()
        await other.get_by_role("button", name="Sign out everywhere else").click()
        await expect(page.get_by_role("alert")).to_be_visible()
        await check(page)
        await shoot(page, f"ended-{width}-{scheme}.png")


async def test_a_page_says_when_the_server_is_away(chromium: Browser, secrecy: Secrecy) -> None:
    """Pages say when Redis or the server is away, and recover afterwards; nobody is signed out."""
    port = free_port()
    with own_server() as url:
        async with (
            Redis.from_url(url) as admin,
            serve_demo(url, port, secrecy) as demo,
            person(chromium, secrecy) as page,
        ):
            await sign_in(page, demo)
            await admin.client_pause(3_000, all=True)
            await page.goto(demo)
            await expect(page.get_by_role("heading", name="Service Unavailable")).to_be_visible()
            await expect(page.get_by_text("Nobody is signed out")).to_be_visible()
            async with asyncio.timeout(10):
                while not await page.get_by_role("heading", name="Your devices").is_visible():
                    await page.goto(demo)
        async with person(chromium, secrecy) as page:
            async with serve_demo(url, port, secrecy):
                await sign_in(page, demo)
            await expect(page.get_by_text("The server is away")).to_be_visible()
            async with serve_demo(url, port, secrecy):
                await expect(page.get_by_text("The server is away")).to_be_hidden(timeout=10_000)


async def test_a_port_in_use_is_one_line(redis_url: str) -> None:
    """A port in use is reported in one line that names the port and the remedy."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "rss.demo", "--port", str(port),
            env={**os.environ, "REDIS_URL": redis_url, "RSS_SERVER": "url"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, error = await process.communicate()
    assert (out, process.returncode) == (b"", 1)
    assert error.decode() == f"cannot serve on 127.0.0.1:{port}: Address already in use. Choose another --port.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_it_leaves_no_server_behind(number: signal.Signals) -> None:
    """The demo stops its server when it is terminated or when its terminal is closed."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rss.demo", "--port", str(port),
        env={**{name: value for name, value in os.environ.items() if name != "REDIS_URL"}, "RSS_SERVER": "wheel"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(30):
        while not await _listens(port):
            assert process.returncode is None
            await asyncio.sleep(0.02)
    (server,) = _children(process.pid)
    process.send_signal(number)
    said, _ = await process.communicate()
    assert b"Traceback" not in said
    assert process.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
