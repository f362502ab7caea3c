"""A table that cannot outgrow its bound. Pure."""

from collections import OrderedDict
from collections.abc import Callable, ItemsView
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Bounded(Generic[K, V]):
    """Records by name, made when first asked for; the one not written to for longest makes room."""

    __slots__ = ("_items", "_limit", "_make")

    def __init__(self, limit: int, make: Callable[[], V]) -> None:
        self._limit = limit
        self._make = make
        self._items: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, name: K) -> V:
        """Return the record to write to."""
        items = self._items
        found = items.get(name)
        if found is not None:
            items.move_to_end(name)
            return found
        if len(items) >= self._limit:
            items.popitem(last=False)
        made = items[name] = self._make()
        return made

    def find(self, name: K) -> V | None:
        """Return the record to read from; None if there is none."""
        return self._items.get(name)

    def items(self) -> ItemsView[K, V]:
        """Return names and records, those written to least recently first."""
        return self._items.items()
