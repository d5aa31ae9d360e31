"""The session of a request or a WebSocket as a dependency of FastAPI. The middleware is in `rss.asgi`."""

from typing import Annotated, Any

from fastapi import Depends

from rss.asgi import get_session
from rss.session import Session

#: The annotation of a parameter: `async def view(session: SessionDep)`.
SessionDep = Annotated[Session[Any], Depends(get_session)]
