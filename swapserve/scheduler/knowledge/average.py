"""A running average that single outliers hardly move, and lasting changes do. Pure."""

from dataclasses import dataclass

from swapserve.scheduler.knowledge.stored import fields, number

WEIGHT = 0.2
"""Of a reading, once there are more than a few."""
OUTLIER = 2.0
"""Times the average (or a part of it); a reading beyond counts as if it were just there."""
CONVINCED = 3
"""So many outliers in a row on the same side are no outliers: things have changed."""


@dataclass(slots=True)
class Average:
    """An exponential moving average; the first reading is taken as it is."""

    value: float = 0.0
    count: int = 0
    """Readings; none: `value` says nothing."""
    run: int = 0
    """Outliers in a row: positive above the average, negative below it."""
    nearest: float = 0.0
    """The least of them, or below the average the greatest."""

    def add(self, reading: float) -> None:
        """Take in a reading; one that is negative, infinite or no number is left out."""
        if not 0.0 <= reading < float("inf"):
            return
        self.count += 1
        if self.count == 1:
            self.value = reading
            return
        low, high = self.value / OUTLIER, self.value * OUTLIER
        if low <= reading <= high:
            self.run = 0
            taken = reading
        elif self._convinced(reading, above=reading > high):
            return
        else:
            taken = high if reading > high else low
        self.value += max(WEIGHT, 1.0 / self.count) * (taken - self.value)

    def _convinced(self, reading: float, *, above: bool) -> bool:
        side = 1 if above else -1
        if self.run * side > 0:
            self.run += side
            self.nearest = min(self.nearest, reading) if above else max(self.nearest, reading)
        else:
            self.run, self.nearest = side, reading
        if abs(self.run) < CONVINCED:
            return False
        self.value, self.count, self.run = self.nearest, CONVINCED, 0
        return True

    def as_json(self) -> dict[str, float]:
        """Return the stored form."""
        return {"value": self.value, "count": self.count}

    @classmethod
    def from_json(cls, data: object) -> "Average | None":
        """Build from the stored form; None if it makes no sense."""
        stored = fields(data)
        value, count = number(stored.get("value")), number(stored.get("count"))
        return cls(value, int(count)) if value is not None and count else None
