"""For applications on aiohttp-session: the same sessions, with references and revocation."""

import copy
import time
from typing import Any, Final

import aiohttp_session
from aiohttp import web

import rss.aiohttp
from rss.dict_session import field_of, item_of, write
from rss.session import Sessions

# The field that tells when it was made, as aiohttp-session counts.
_CREATED: Final = "aiohttp_session.created"


class _Session(aiohttp_session.Session):
    """A session that was loaded."""

    #: The fields as they were.
    before: dict[str, Any]
    #: Whether it was cleared: then it ends, or gets a new id if items were set after that.
    cleared = False

    def invalidate(self) -> None:
        self.cleared = True
        super().invalidate()

    clear = invalidate


def setup(app: web.Application, sessions: Sessions[Any]) -> None:
    """Do what `aiohttp_session.setup` does, with a storage of ours.

    `aiohttp_session.get_session(request)` works as before. If it was changed, the fields that differ are written, in
    one script. `invalidate` and `clear` end the session. If items are set then, and after `new_session`, it gets a new
    id. `rss.aiohttp.get_session(request)` is the same session, with the verbs that a dict does not have.
    """
    rss.aiohttp.setup(app, sessions)
    aiohttp_session.setup(app, Storage())


class Storage(aiohttp_session.AbstractStorage):
    """Keeps the sessions of aiohttp-session in the session of the request. Its cookie is set by `rss.aiohttp`.

    In Redis the item names `id`, and those that begin with an underscore, get a dot before them.
    """

    async def load_session(self, request: web.Request) -> aiohttp_session.Session:
        """Return the session of a request, a new one if it has none."""
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
        """Write what differs from what was loaded. If nothing is left in Redis, the session ends."""
        del response
        handle = await rss.aiohttp.get_session(request)
        if isinstance(session, _Session):
            before, cleared = session.before, session.cleared
        else:  # It is of `new_session`.
            before, cleared = dict(await handle.get()), True
            before.pop("id", None)
        after: dict[str, Any] = {field_of(item): value for item, value in session.items()}
        if after:
            after[_CREATED] = session.created if cleared else before.get(_CREATED, session.created)
        await write(handle, before, after, cleared=cleared, max_age=session.max_age)
