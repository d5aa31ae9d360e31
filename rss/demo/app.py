"""A small application with a page of devices: who is signed in where, and how to end it."""

import asyncio
import hmac
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final

import humanize
import ua_parser
from quart import Blueprint, Quart, Response, abort, current_app, redirect, render_template, request, url_for, websocket
from werkzeug.exceptions import HTTPException

from rss import SessionEnded, Sessions, StoreUnavailable
from rss.quart import QuartSessions, session

USERS: Final = ("Alice", "Bob", "Carol")
#: The password of all users, until they change it.
PASSWORD: Final = "demo"  # noqa: S105 - the page shows it
_LASTS: Final = "30 days"
_ANONYMOUS: Final = "1h"
_POLICY: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
#: What somebody is told who is not signed in any more, by the reason that the session ended for.
_WHY: Final = {
    "elsewhere": "You were signed out from another device.",
    "password": "The password was changed: all devices are signed out.",
}
#: What somebody is told who has done something.
_DONE: Final = {
    "device": "That device is signed out.",
    "others": "All other devices are signed out.",
}
_ERRORS: Final = {
    401: "You are not signed in, or not any more.",
    403: "This form is out of date. Go back to the page and try again.",
    404: "There is no such page.",
    409: "You have just signed in in another tab. Load the page again.",
    503: "The server that keeps the sessions is away. Nobody is signed out: try again in a moment.",
}

#: The icons of browsers: a part of the browser's name, in small letters, and the icon.
_BROWSERS: Final = {"edge": "edge", "firefox": "firefox", "chrom": "chrome", "safari": "safari"}
_SYSTEMS: Final = {
    "Windows": "windows",
    "Mac OS X": "apple",
    "iOS": "apple",
    "Android": "android",
    "Linux": "linux",
    "Ubuntu": "linux",
    "Fedora": "linux",
    "Debian": "linux",
}

pages: Final = Blueprint("pages", __name__)


def create_app(sessions: Sessions[Any]) -> Quart:
    """Return the application. The identity of its sessions is the reference "user".

    Set `app.extensions["ending"]`, an event, when the server is about to stop: it closes the WebSockets.
    """
    app = Quart(__name__)
    app.extensions["ending"] = asyncio.Event()
    QuartSessions(app, sessions)
    app.config["PASSWORDS"] = dict.fromkeys(USERS, PASSWORD)
    app.register_blueprint(pages)
    app.register_error_handler(HTTPException, _failed)
    app.register_error_handler(StoreUnavailable, _failed)
    app.register_error_handler(SessionEnded, _failed)
    app.after_request(_protect)
    return app


@dataclass(frozen=True)
class Device:
    """A session, as its user sees it."""

    id: str
    #: laptop, phone or tablet.
    kind: str
    browser: str
    system: str
    ip: str
    signed_in: datetime
    seen: datetime
    here: bool

    @property
    def browser_icon(self) -> str:
        """The name of the icon of its browser."""
        name = self.browser.lower()
        return next((icon for part, icon in _BROWSERS.items() if part in name), "other")

    @property
    def system_icon(self) -> str:
        """The name of the icon of its operating system."""
        return _SYSTEMS.get(self.system, "other")

    def ago(self, then: datetime) -> str:
        """Return how long ago something was, in words."""
        return humanize.naturaltime(datetime.now(UTC) - then)


async def _protect(response: Response) -> Response:
    """Let the browser run and load only what comes from here, and show pages to nobody else."""
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["Referrer-Policy"] = "same-origin"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


async def _failed(error: Exception) -> tuple[str, int]:
    """Return the page of an error."""
    status = error.code if isinstance(error, HTTPException) else session.status_for(error)
    status = status or HTTPStatus.INTERNAL_SERVER_ERROR
    text = _ERRORS.get(status, "That did not work.")
    return await render_template("error.html", title=HTTPStatus(status).phrase, text=text), status


@pages.before_request
async def refuse_forged() -> None:
    """Let only forms of this application do anything."""
    if request.method == "POST" and not await session.verify_csrf_token((await request.form).get("csrf_token")):
        abort(403)


@pages.get("/")
async def home() -> str:
    """Show who is signed in where; or who may sign in."""
    held = await session.get()
    if held.get("user"):
        return await _devices(held["user"])
    if not held and session.ended != "rotated":
        await session.set({}, _ANONYMOUS)  # For the form. Most visitors who see it never sign in.
    token = await session.create_csrf_token()
    notice = _WHY.get(session.ended or request.args.get("done", ""))
    return await render_template("sign_in.html", users=USERS, csrf_token=token, notice=notice)


async def _devices(user: str) -> str:
    await session.set({"seen": time.time()})
    found = [_device(one) async for one in session.find_all()]
    return await render_template(
        "devices.html",
        user=user,
        devices=sorted(found, key=lambda device: (not device.here, -device.seen.timestamp())),
        done=_DONE.get(request.args.get("done", "")),
        csrf_token=await session.create_csrf_token(),
    )


def _device(held: dict[str, Any]) -> Device:
    agent = ua_parser.parse(held["agent"])
    system = agent.os.family if agent.os else "unknown system"
    family = agent.device.family if agent.device else ""
    tablet = "iPad" in family or "Tablet" in family
    return Device(
        id=held["id"],
        kind="tablet" if tablet else "phone" if system in ("iOS", "Android") else "laptop",
        browser=agent.user_agent.family if agent.user_agent else "Unknown browser",
        system=system,
        ip=held["ip"],
        signed_in=datetime.fromtimestamp(held["signed_in"], UTC),
        seen=datetime.fromtimestamp(held["seen"], UTC),
        here=held["id"] == session.id,
    )


@pages.post("/sign-in")
async def sign_in() -> Any:
    """Sign in. The session gets a new id, so a token that was planted or seen before is worth nothing."""
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
    await _user()
    done = await session.delete_other((await request.form).get("id") or "none", reason="elsewhere")
    return redirect(url_for("pages.home", done="device" if done else None), 303)


@pages.post("/sign-out-others")
async def sign_out_others() -> Any:
    """Sign out all devices of the user but this one."""
    await _user()
    await session.delete_others(reason="elsewhere")
    return redirect(url_for("pages.home", done="others"), 303)


@pages.get("/password")
async def password() -> str:
    """Show the form that changes the password."""
    return await _password_form(await _user())


@pages.post("/password")
async def change_password() -> Any:
    """Change the password, and sign out all devices of the user."""
    user, form = await _user(), await request.form
    passwords: dict[str, str] = current_app.config["PASSWORDS"]
    if not hmac.compare_digest(form.get("old", "").encode(), passwords[user].encode()):
        return await _password_form(user, "This is not your current password."), 403
    if not form.get("new"):
        return await _password_form(user, "The new password must not be empty."), 400
    passwords[user] = form["new"]
    await session.delete_all(reason="password")
    return redirect(url_for("pages.home", done="password"), 303)


async def _password_form(user: str, wrong: str = "") -> str:
    devices = [one async for one in session.find_all(["user"])]
    return await render_template(
        "password.html",
        user=user,
        number=len(devices),
        wrong=wrong,
        csrf_token=await session.create_csrf_token(),
    )


@pages.websocket("/live")
async def live() -> None:
    """Tell an open page that its session has ended."""
    if websocket.headers.get("Origin", "").partition("://")[2] != websocket.host:
        # Pages of other sites may open a WebSocket here, too. Hypercorn fails if a client uses the connection again.
        abort(Response("", 403, {"Connection": "close"}))
    await websocket.accept()
    signed_in = bool((await session.get()).get("user"))
    store, session_id = session.sessions.store, session.id
    ending: asyncio.Event = current_app.extensions["ending"]
    reason = session.ended
    if session_id and signed_in:
        waits = [asyncio.ensure_future(one) for one in (store.wait_ended(session_id), ending.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:  # Also if the page was closed.
            for one in waits:
                one.cancel()
        if ending.is_set():
            await websocket.close(1001)
            return
        reason = str(await waits[0])
    elif session_id:
        reason = await store.ended(session_id)
    await websocket.send_json({"notice": _WHY.get(reason or "", "You are signed out.")})
    await websocket.close(1000)


async def _user() -> str:
    """Return who is signed in; nobody else gets further."""
    user: str | None = (await session.get()).get("user")
    if not user:
        abort(401)
    return user
