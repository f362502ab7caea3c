"""From predictions that are wrong in a steady way to margins that hold. Pure.

Each forecast is compared with what came of it: the ratio of the two. A quantile of the latest
ratios is the factor by which the next forecast is multiplied (conformal prediction, split by
time). The quantile's own level moves up a little with each miss and down with each hit (adaptive
conformal inference, Gibbs and Candes 2021), so the share of hits keeps to the target while things
drift, whatever the distribution.
"""

import math

from swapserve.scheduler.knowledge.stored import number, numbers
from swapserve.scheduler.knowledge.window import Window

REMEMBERED = 200
STEP = 0.015
"""By which the level moves, times how far hit or miss is from the target."""
LEVEL_MAX = 1.2
"""Beyond 1 the greatest ratio is enlarged in proportion."""
SEEDS_HIGH = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.5)
"""Ratios imagined before there are any, of a P90 that is about right: forgotten first."""


class Calibration:
    """A factor that lets the target's share of results lie within the forecast."""

    __slots__ = ("_level", "_ratios", "_target", "margin")

    def __init__(self, target: float) -> None:
        self._target = target
        self._level = target
        self._ratios = Window(REMEMBERED, SEEDS_HIGH)
        self.margin = 1.0
        self._set_margin()

    def add(self, ratio: float) -> None:
        """Take in result divided by forecast, the latter without its margin."""
        miss = 1.0 if ratio > self.margin else 0.0
        level = self._level + STEP * (miss - 1.0 + self._target)
        self._level = min(max(level, self._target / 2), LEVEL_MAX)
        self._ratios.add(ratio)
        self._set_margin()

    def _set_margin(self) -> None:
        ordered = self._ratios.ordered
        count, level = len(ordered), self._level
        rank = math.ceil(level * (count + 1))
        if rank <= count:
            self.margin = ordered[rank - 1]
        else:
            self.margin = ordered[-1] * max(1.0, level)

    def as_json(self) -> dict[str, object]:
        """Return the stored form."""
        return {"level": self._level, "ratios": self._ratios.as_json()}

    def read(self, stored: dict[str, object]) -> None:
        """Take over the stored form, as far as it makes sense."""
        level = number(stored.get("level"))
        ratios = [one for one in numbers(stored.get("ratios"), REMEMBERED) if one > 0.0]
        if level is not None and ratios:
            self._level = min(max(level, self._target / 2), LEVEL_MAX)
            self._ratios = Window(REMEMBERED, ratios)
            self._set_margin()
