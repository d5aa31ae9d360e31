"""Events: what happens to the sessions of a store, in all processes, told as it happens."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from rss.errors import SessionError
from rss.fields import Fields
from rss.keys import Layout


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a session, or to a value of a reference.

    * created: a session was made.
    * rotated: a session got a new id.
    * ended: a session was ended. For some that expired, `Maintenance.sweep` tells that: see `SessionStore.events`.
    * blocked: a value of a reference was blocked.
    * gap: some events may be missing, because the connection was lost, because they were read too slowly, or because a
      message was not readable.
    """

    kind: Literal["created", "rotated", "ended", "blocked", "gap"]
    #: The id of the session; of a rotated session, the old one. "" if the event is about no session.
    session_id: str = dataclasses.field(default="", repr=False)
    #: The new id of a rotated session; otherwise "".
    new_id: str = dataclasses.field(default="", repr=False)
    #: Why a session was ended, or a value was blocked; otherwise "".
    reason: str = ""
    #: The identity of a session that was ended. None: it had none, or it expired.
    identity: Any = dataclasses.field(default=None, repr=False)
    #: The field of the value that was blocked, and the text of the value; otherwise "".
    field: str = ""
    value: str = dataclasses.field(default="", repr=False)


def event_of(message: bytes, layout: Layout, fields: Fields) -> Event:
    """Return the event of a message, which `_tell.lua` has published. If it is not readable, return a gap.

    Another program, or a later version, may have published it.
    """
    try:
        parts = json.loads(message.decode(errors="replace"))
        if not all(isinstance(part, str) for part in parts):
            return Event("gap")
        kind, about, *details = parts
        if kind == "created":
            return Event("created", about)
        if kind == "rotated":
            return Event("rotated", about, new_id=details[0])
        if kind == "ended":
            reason, data = details
            name = fields.identity or ""
            values = fields.decode([name.encode(), data.encode()]) if data else {}
            return Event("ended", about, reason=reason, identity=values.get(name))
        if kind == "blocked":
            parsed = layout.parse(about)
            return Event("blocked", reason=details[0], field=parsed.name, value=parsed.value)
    except (ValueError, TypeError, IndexError, RecursionError, SessionError):
        pass
    return Event("gap")
