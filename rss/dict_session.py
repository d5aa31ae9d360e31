"""A session as a dict, for frameworks whose sessions are dicts."""

import copy
import functools
from collections.abc import Callable
from typing import Any

from rss.durations import Duration
from rss.session import Session


class DictSession(dict[str, Any]):
    """The items of a session. The adapter reads them when the request begins; `save` writes the changes.

    Changes inside nested values are detected too. One script writes the fields that differ, so parallel requests do
    not undo each other's writes. If no field is left in Redis, the session ends. `clear` always ends the session. If
    items are set after `clear`, the session gets a new id.

    In Redis, a dot precedes the names of items that are called `id` or begin with an underscore.

    The methods of dict only use memory, so they also work in code that is not async, and in threads.
    """

    def __init__(self, handle: Session[Any], fields: dict[str, Any]) -> None:
        #: The session itself, with the verbs that a dict does not have.
        self.handle: Session[Any] = handle
        #: Whether the request came without a session.
        self.new: bool = not fields
        #: Whether the response depends on the session.
        self.looked_at: bool = False
        self._before = {field: value for field, value in fields.items() if field != "id"}
        self._cleared = self._saved = False
        super().__init__({item_of(field): self.item_from(copy.deepcopy(data)) for field, data in self._before.items()})

    def item_from(self, data: Any) -> Any:
        """Return the value of an item, given the value in the store."""
        return data

    def data_from(self, item: Any) -> Any:
        """Return the value to store, given the value of an item."""
        return item

    def fields(self) -> dict[str, Any]:
        """Return the fields that `save` would leave in the store."""
        return {field_of(name): self.data_from(value) for name, value in dict.items(self)}

    @property
    def is_changed(self) -> bool:
        """Whether there is anything to write."""
        return self._cleared or self.fields() != self._before

    async def save(self) -> None:
        """Write the fields that differ, once. Raises the errors of `Session.set`."""
        if self._saved:  # If the first call failed, this one belongs to the error response.
            return
        self._saved = True
        written = await write(self.handle, self._before, self.fields(), cleared=self._cleared)
        if self.looked_at and not written:
            await self.handle.get(["id"])  # This renews the session if a renewal is due.

    def mark_accessed(self) -> None:
        """Note that the response depends on the session. Starlette calls this for each use of `request.session`."""
        self.looked_at = True

    def clear(self) -> None:
        self._cleared = True
        super().clear()

    def __setitem__(self, name: str, value: Any) -> None:
        field_of(name)  # Raise TypeError here rather than when the response begins.
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

    *cleared*: whether the application cleared the session in between. If so, the session ends; if items were set
    afterwards, it gets a new id. If the application made, rotated or ended the session through the handle, *cleared*
    has no effect.
    """
    if not cleared or handle.cookie_changes:
        return await handle.replace(before, after, max_age)
    if after:
        return await handle.replace(before, after, max_age, anew=True)
    return await handle.delete()


def field_of(item: str) -> str:
    """Return the name of the field for an item. A name that the store reserves gets a dot.

    Raises TypeError if the name is no str.
    """
    if not isinstance(item, str):
        raise TypeError(f"the name of an item must be a str, not {type(item).__name__}")
    return f".{item}" if _is_reserved(item) else item


def item_of(field: str) -> str:
    """Return the name of the item for a field: the reverse of `field_of`."""
    return field[1:] if field.startswith(".") and _is_reserved(field) else field


def _is_reserved(name: str) -> bool:
    plain = name.lstrip(".")
    return plain == "id" or plain.startswith("_")
