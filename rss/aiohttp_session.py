"""For applications on aiohttp-session: the same sessions, with references and revocation."""

import copy
import time
from typing import Any, Final

import aiohttp_session
from aiohttp import web

import rss.aiohttp
from rss.session import Sessions, field_of, item_of

# The field that tells when it was made, as aiohttp-session counts.
_CREATED: Final = "aiohttp_session.created"
# What was loaded for a request, and the fields of it as they were.
_LOADED: Final = web.RequestKey("rss_aiohttp_session", tuple[aiohttp_session.Session, dict[str, Any]])


def setup(app: web.Application, sessions: Sessions[Any]) -> None:
    """Do what `aiohttp_session.setup` does, with a storage of ours.

    `aiohttp_session.get_session(request)` works as before. When it was changed, the fields that differ are written.
    An `invalidate` ends the session, and `new_session` gives it a new id. `rss.aiohttp.get_session(request)` is the
    same session, for what only that can.
    """
    rss.aiohttp.setup(app, sessions)
    aiohttp_session.setup(app, Storage())


class Storage(aiohttp_session.AbstractStorage):
    """Keeps the sessions of aiohttp-session in the session of the request. Its cookie is set by `rss.aiohttp`.

    Of the names of items, `id` and those that begin with `_` get a dot before them in Redis.
    """

    async def load_session(self, request: web.Request) -> aiohttp_session.Session:
        """Return the session of a request, a new one if it has none."""
        fields = await (await rss.aiohttp.get_session(request)).get()
        session_id = fields.pop("id", None)
        items = {item_of(field): value for field, value in fields.items() if field != _CREATED}
        data: aiohttp_session.SessionData = {"created": fields.get(_CREATED, int(time.time())), "session": items}
        session = aiohttp_session.Session(session_id, data=data, new=session_id is None)
        request[_LOADED] = session, copy.deepcopy(fields)
        return session

    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: aiohttp_session.Session
    ) -> None:
        """Write what differs from what was loaded; end the session if nothing is left."""
        del response
        handle = await rss.aiohttp.get_session(request)
        if session.empty:
            await handle.delete()
            return
        loaded, before = request.get(_LOADED, (None, {}))
        created = before.get(_CREATED, session.created)
        if session is not loaded:  # It is of `new_session`: what was there before goes, and so does its id.
            before, created = dict(await handle.get()), session.created
            if before.pop("id", None) is not None:
                await handle.rotate()
        after = {field_of(item): value for item, value in session.items()}
        await handle.replace(before, {_CREATED: created, **after}, session.max_age)
