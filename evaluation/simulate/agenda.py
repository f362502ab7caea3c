"""What happens next in a simulation: a heap of times, equal ones in the order they were put in."""

from heapq import heappop, heappush
from typing import Literal

Kind = Literal[0, 1, 2]

STEP: Kind = 0
"""An engine's next first or last token is due."""
MOVED: Kind = 1
"""An engine's way on or off its devices ends."""
ARRIVAL: Kind = 2
"""A request of a closed loop comes."""

Entry = tuple[float, int, Kind, int]
"""Time, running number, what, and which engine or request."""


class Agenda:
    """Entries by time."""

    __slots__ = ("_number", "heap")

    def __init__(self) -> None:
        self.heap: list[Entry] = []
        self._number = 0

    def put(self, at: float, kind: Kind, who: int) -> None:
        """Add an entry."""
        self._number += 1
        heappush(self.heap, (at, self._number, kind, who))

    def take(self) -> Entry:
        """Remove and return the first one."""
        return heappop(self.heap)
