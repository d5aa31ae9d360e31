"""For applications on aiohttp-session: the same sessions, with references and revocation."""

import time
from typing import Any, Final

import aiohttp_session
from aiohttp import web

import rss.aiohttp
from rss.session import Sessions

# When it was made, as aiohttp-session counts.
_CREATED: Final = "aiohttp_session.created"


def setup(app: web.Application, sessions: Sessions[Any]) -> None:
    """Do what `aiohttp_session.setup` does, with a storage of ours.

    `aiohttp_session.get_session(request)` works as before. When it was changed, the fields that differ are written.
    An `invalidate` ends the session, and `new_session` gives it a new id. `rss.aiohttp.get_session(request)` is the
    same session, for what only that can.
    """
    rss.aiohttp.setup(app, sessions)
    aiohttp_session.setup(app, Storage())


class Storage(aiohttp_session.AbstractStorage):
    """Keeps the sessions of aiohttp-session in the session of the request. Its cookie is set by `rss.aiohttp`."""

    async def load_session(self, request: web.Request) -> aiohttp_session.Session:
        """Return the session of a request, a new one if it has none."""
        values = await (await rss.aiohttp.get_session(request)).get()
        session_id = values.pop("id", None)
        created = values.pop(_CREATED, int(time.time()))
        data: aiohttp_session.SessionData = {"created": created, "session": values}
        return aiohttp_session.Session(session_id, data=data, new=session_id is None)

    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: aiohttp_session.Session
    ) -> None:
        """Write what differs; end the session if nothing is left."""
        del response
        handle = await rss.aiohttp.get_session(request)
        if session.empty:
            await handle.delete()
            return
        held: dict[str, Any] = await handle.get()
        if held.pop("id", None) is not None and session.new:
            await handle.rotate()
        await handle.replace(held, {_CREATED: held.get(_CREATED, session.created), **session}, session.max_age)
