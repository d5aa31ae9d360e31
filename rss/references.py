"""The options of an indexed field."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Reference:
    """The options of an indexed field.

    *limit*: the maximum number of sessions for each value, 1 to 1,000. None: no limit.

    *on_limit*: the action when one more session joins. "evict": end the session that was created first, with the
    reason "evicted". "refuse": raise `LimitExceeded`.

    *strict*: a session is alive only while its id is in the set of each of its values. So deleting a set revokes all
    its sessions at once. If Redis loses a set, its sessions end.

    *identity*: the value is the user who is signed in. None, or no value, means that nobody is signed in. A session
    cannot change its identity and keep its id. `rotate` can change both; any other write raises `IdentityChanged`.
    So an attacker cannot plant a session id before a login and use it afterwards. At most one reference is the
    identity, and its value is never a list.

    Raises ValueError if *limit* or *on_limit* is none of these.
    """

    limit: int | None = None
    on_limit: Literal["evict", "refuse"] = "evict"
    strict: bool = False
    identity: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and (type(self.limit) is not int or not 1 <= self.limit <= 1000):
            raise ValueError("limit must be an integer from 1 to 1,000")
        if self.on_limit not in ("evict", "refuse"):
            raise ValueError("on_limit must be 'evict' or 'refuse'")
