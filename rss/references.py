"""What may be said of an indexed field."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Reference:
    """How a field is indexed.

    *limit*: at most that many sessions for each value, 1 to 1,000. When one more joins, *on_limit* says whether the
    oldest, by creation, is ended with the reason "evicted", or `LimitExceeded` is raised.

    *strict*: a session counts as alive only while its id is in the set of each of its values. So deleting a set
    revokes all sessions in it at once, and a set that Redis lost fails closed.

    *identity*: the value says who is signed in; None, or no value, means nobody. A session keeps its identity under one
    id: a write that would change it raises `IdentityChanged`, and `rotate` changes it, with a new id. So nobody can
    plant a session id before a login and use it afterwards. At most one reference is the identity, and its value is
    never a list.
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
