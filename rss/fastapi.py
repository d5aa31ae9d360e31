"""The session of a request or a WebSocket as a dependency of FastAPI; the rest is in `rss.asgi`."""

from typing import Annotated, Any

from fastapi import Depends
from fastapi.requests import HTTPConnection

from rss.asgi import get_session
from rss.session import Session


async def _session(connection: HTTPConnection) -> Session[Any]:
    return await get_session(connection)


#: `async def view(session: SessionDep)`.
SessionDep = Annotated[Session[Any], Depends(_session)]
