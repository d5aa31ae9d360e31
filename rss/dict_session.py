"""A session that is a dict, for frameworks that have it so."""

import copy
import functools
from collections.abc import Callable
from typing import Any

from rss.durations import Duration
from rss.session import Session


class DictSession(dict[str, Any]):
    """The items of a session. They are read when the request begins, and `save` writes what has changed.

    Changes are noticed however deep they are. Only the fields that differ are written, in one script, so parallel
    requests do not undo each other's writes. If nothing is left in Redis then, the session ends. `clear` ends it in any
    case; if items are set after it, the session gets a new id.

    In Redis the names `id`, and those that begin with an underscore, get a dot before them.

    Its methods only look at memory, so that code which is not async can use it too, also in a thread.
    """

    def __init__(self, handle: Session[Any], fields: dict[str, Any]) -> None:
        #: The session itself, with the verbs that a dict does not have.
        self.handle = handle
        #: Whether the request came without a session.
        self.new = not fields
        #: Whether the response depends on it.
        self.looked_at = False
        self._before = {field: value for field, value in fields.items() if field != "id"}
        self._cleared = self._saved = False
        super().__init__({item_of(field): self.item_from(copy.deepcopy(data)) for field, data in self._before.items()})

    def item_from(self, data: Any) -> Any:
        """Return the value of an item, from what the store has."""
        return data

    def data_from(self, item: Any) -> Any:
        """Return what the store gets for the value of an item."""
        return item

    def fields(self) -> dict[str, Any]:
        """Return the fields that the store would have now."""
        return {field_of(name): self.data_from(value) for name, value in dict.items(self)}

    @property
    def is_changed(self) -> bool:
        """Whether there is anything to write."""
        return self._cleared or self.fields() != self._before

    async def save(self) -> None:
        """Write what differs. Raises what `Session.set` raises."""
        if self._saved:  # If that failed, this call belongs to the response that tells so.
            return
        self._saved = True
        written = await write(self.handle, self._before, self.fields(), cleared=self._cleared)
        if self.looked_at and not written:
            await self.handle.get(["id"])  # Which renews it if that is due.

    def mark_accessed(self) -> None:
        """Note that the response depends on the session. Starlette calls it for each `request.session`."""
        self.looked_at = True

    def clear(self) -> None:
        self._cleared = True
        super().clear()

    def __setitem__(self, name: str, value: Any) -> None:
        field_of(name)  # Raises TypeError now, not when the response begins.
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.handle!r}>"


def _looking(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def look(self: DictSession, *args: Any, **keywords: Any) -> Any:
        self.looked_at = True
        return method(self, *args, **keywords)

    return look


for _name in (
    "__contains__", "__eq__", "__getitem__", "__iter__", "__len__", "__ne__", "__or__", "__reversed__", "__ror__",
    "copy", "get", "items", "keys", "pop", "popitem", "setdefault", "values",
):  # fmt: skip
    setattr(DictSession, _name, _looking(getattr(dict, _name)))


async def write(
    handle: Session[Any],
    before: dict[str, Any],
    after: dict[str, Any],
    *,
    cleared: bool,
    max_age: Duration | None = None,
) -> bool:
    """Write what differs between two states of a session, and return whether anything was written.

    *cleared*: whether the application cleared the session in between. If so, it ends; if items were set after that, it
    gets a new id. If the application has ended or rotated it by the handle, only the difference is written.
    """
    if not cleared or handle.cookie_changes:
        return await handle.replace(before, after, max_age)
    if after:
        return await handle.replace(before, after, max_age, anew=True)
    return await handle.delete()


def field_of(item: str) -> str:
    """Return the name of the field for an item: names that are the store's own get a dot. Raises TypeError."""
    if not isinstance(item, str):
        raise TypeError(f"the name of an item must be a str, not {type(item).__name__}")
    return f".{item}" if _is_reserved(item) else item


def item_of(field: str) -> str:
    """Return the name of the item for such a field."""
    return field[1:] if field.startswith(".") and _is_reserved(field) else field


def _is_reserved(name: str) -> bool:
    plain = name.lstrip(".")
    return plain == "id" or plain.startswith("_")
