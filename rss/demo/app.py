"""A small application with a page of one's devices: who is signed in where, and how to end it."""

import asyncio
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import humanize
import ua_parser
from quart import Blueprint, Quart, Response, abort, current_app, redirect, render_template, request, url_for, websocket

from rss import Sessions
from rss.quart import QuartSessions, session

USERS: Final = ("Alice", "Bob", "Carol")
_LASTS: Final = "30 days"
_ANONYMOUS: Final = "1h"
_POLICY: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
#: What somebody is told who was signed in and is not any more, by the reason that the session ended for.
_WHY: Final = {
    "elsewhere": "You were signed out from another device.",
    "password": "The password was changed: all devices are signed out.",
}

pages = Blueprint("pages", __name__)


def create_app(sessions: Sessions[Any]) -> Quart:
    """Return the application. The store of its sessions has the reference "user"."""
    app = Quart(__name__)
    QuartSessions(app, sessions)
    app.register_blueprint(pages)
    return app


@dataclass(frozen=True)
class Device:
    """A session, as its user sees it."""

    id: str
    browser: str
    system: str
    ip: str
    signed_in: str
    seen: str
    here: bool


@pages.before_request
async def refuse_forged() -> None:
    """Let only forms of this application do anything."""
    if request.method == "POST" and not await session.verify_csrf_token((await request.form).get("csrf_token")):
        abort(403)


@pages.after_request
async def protect(response: Response) -> Response:
    """Let the browser run and load only what comes from here, and show pages to nobody else."""
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["Referrer-Policy"] = "same-origin"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


@pages.get("/")
async def home() -> str:
    """Show who is signed in where; or who may sign in."""
    held = await session.get()
    if "user" in held:
        return await _devices(held)
    if not held:
        await session.set({}, _ANONYMOUS)  # For the form. Most of those who see it never sign in.
    token = await session.create_csrf_token()
    notice = _WHY.get(session.ended or "")
    return await render_template("sign_in.html", users=USERS, csrf_token=token, notice=notice)


async def _devices(held: dict[str, Any]) -> str:
    now = time.time()
    await session.set({"seen": now})
    found = [_device(one, now) async for one in _sessions().store.find_by("user", held["user"])]
    return await render_template(
        "devices.html",
        user=held["user"],
        devices=sorted(found, key=lambda device: not device.here),
        csrf_token=await session.create_csrf_token(),
    )


def _device(held: dict[str, Any], now: float) -> Device:
    agent = ua_parser.parse(held["agent"])
    return Device(
        id=held["id"],
        browser=agent.user_agent.family if agent.user_agent else "Unknown browser",
        system=agent.os.family if agent.os else "unknown system",
        ip=held["ip"],
        signed_in=humanize.naturaltime(timedelta(seconds=now - held["signed_in"])),
        seen=humanize.naturaltime(timedelta(seconds=now - held["seen"])),
        here=held["id"] == session.id,
    )


@pages.post("/sign-in")
async def sign_in() -> Any:
    """Sign in: the session gets another id, so that who planted or saw the one before has nothing of it."""
    user = (await request.form).get("user")
    if user not in USERS:
        abort(400)
    now = time.time()
    agent = request.headers.get("User-Agent", "")
    values = {"user": user, "agent": agent, "ip": request.remote_addr, "signed_in": now, "seen": now}
    await session.rotate(values, _LASTS)
    return redirect(url_for("pages.home"), 303)


@pages.post("/sign-out")
async def sign_out() -> Any:
    """Sign out here."""
    await session.delete(reason="signed-out")
    return redirect(url_for("pages.home"), 303)


@pages.post("/sign-out-device")
async def sign_out_device() -> Any:
    """Sign out one device of the user."""
    user, session_id = await _user(), (await request.form).get("id", "")
    store = _sessions().store
    if session_id and (await store.get(session_id, ["user"])).get("user") == user:
        await store.delete(session_id, reason="elsewhere")
    return redirect(url_for("pages.home"), 303)


@pages.post("/sign-out-others")
async def sign_out_others() -> Any:
    """Sign out all devices of the user but this one."""
    user = await _user()
    await _sessions().store.delete_by("user", user, keep=[session.id or ""], reason="elsewhere")
    return redirect(url_for("pages.home"), 303)


@pages.post("/change-password")
async def change_password() -> Any:
    """Sign out all devices of the user, as is due when the password was changed."""
    await _sessions().store.delete_by("user", await _user(), reason="password")
    return redirect(url_for("pages.home"), 303)


@pages.websocket("/live")
async def live() -> None:
    """Tell an open page that its session has ended."""
    if websocket.headers.get("Origin", "").partition("://")[2] != websocket.host:
        abort(403)  # Pages of other sites may open a WebSocket here, too.
    await websocket.accept()
    signed_in = "user" in await session.get()
    store, session_id = _sessions().store, session.id
    # It ends in Redis, and is asked for there; all pages that ask are one script.
    while signed_in and session_id and await store.ttl(session_id):  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    reason = await store.ended(session_id) if session_id else session.ended
    await websocket.send_json({"notice": _WHY.get(reason or "", "You are signed out.")})
    await websocket.close(1000)


async def _user() -> str:
    """Return who is signed in; nobody else gets further."""
    user: str | None = (await session.get()).get("user")
    if user is None:
        abort(401)
    return user


def _sessions() -> Sessions[Any]:
    sessions: Sessions[Any] = current_app.extensions["rss"]
    return sessions
