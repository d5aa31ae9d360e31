"""A storage for aiohttp-session: its sessions, with references and revocation."""

import copy
import time
from typing import Any, Final

import aiohttp_session
from aiohttp import web

import rss.aiohttp
from rss.dict_session import field_of, item_of, write
from rss.session import Sessions

# The field with the creation time of the session, in seconds, as aiohttp-session counts.
_CREATED: Final = "aiohttp_session.created"


class _Session(aiohttp_session.Session):
    """A session that was loaded."""

    #: The fields as they were loaded.
    before: dict[str, Any]
    #: Whether it was cleared. If so, it ends; if items were set afterwards, it gets a new id.
    cleared = False

    def invalidate(self) -> None:
        self.cleared = True
        super().invalidate()

    clear = invalidate


def setup(app: web.Application, sessions: Sessions[Any]) -> None:
    """Set up aiohttp-session with a storage of this library.

    `aiohttp_session.get_session(request)` works as before. If the session was changed, one script writes the fields
    that differ. `invalidate` and `clear` end the session. If items are set afterwards, the session gets a new id.
    `new_session` gives it a new id too.

    `rss.aiohttp.get_session(request)` is the same session, with the verbs that a dict does not have.

    Raises TypeError if *sessions* is no `Sessions`.
    """
    rss.aiohttp.setup(app, sessions)
    aiohttp_session.setup(app, Storage())


class Storage(aiohttp_session.AbstractStorage):
    """Keeps the items of aiohttp-session in the session of the request. `rss.aiohttp` sets the cookie.

    In Redis, a dot precedes the names of items that are called `id` or begin with an underscore.
    """

    async def load_session(self, request: web.Request) -> aiohttp_session.Session:
        """Return the session of a request. If the request has none, return a new session."""
        fields = await (await rss.aiohttp.get_session(request)).get()
        session_id = fields.pop("id", None)
        items = {item_of(field): value for field, value in fields.items() if field != _CREATED}
        data: aiohttp_session.SessionData = {"created": fields.get(_CREATED, int(time.time())), "session": items}
        session = _Session(session_id, data=data, new=session_id is None)
        session.before = copy.deepcopy(fields)
        return session

    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: aiohttp_session.Session
    ) -> None:
        """Write the fields that differ from those that were loaded. If no field is left in Redis, the session ends."""
        del response
        handle = await rss.aiohttp.get_session(request)
        if isinstance(session, _Session):
            before, cleared = session.before, session.cleared
        else:  # `new_session` made it.
            before, cleared = dict(await handle.get()), True
            before.pop("id", None)
        after: dict[str, Any] = {field_of(item): value for item, value in session.items()}
        if after:
            after[_CREATED] = session.created if cleared else before.get(_CREATED, session.created)
        await write(handle, before, after, cleared=cleared, max_age=session.max_age)
