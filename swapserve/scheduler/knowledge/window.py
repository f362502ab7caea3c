"""The latest readings of something, in order of size. Pure."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


class Window:
    """Readings, the oldest of which make room for new ones; quantiles are exact."""

    __slots__ = ("_latest", "ordered")

    def __init__(self, size: int, readings: Iterable[float] = ()) -> None:
        self._latest: deque[float] = deque(readings, maxlen=size)
        self.ordered = sorted(self._latest)
        """Smallest first; not to be written to."""

    def __len__(self) -> int:
        return len(self.ordered)

    def add(self, reading: float) -> None:
        """Take in a reading."""
        latest, ordered = self._latest, self.ordered
        if len(latest) == latest.maxlen:
            del ordered[bisect_left(ordered, latest[0])]
        latest.append(reading)
        insort(ordered, reading)

    def as_json(self) -> list[float]:
        """Return the stored form: the readings, oldest first."""
        return list(self._latest)
