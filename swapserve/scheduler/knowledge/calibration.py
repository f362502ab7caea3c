"""From predictions that are wrong in a steady way to margins that hold. Pure.

Each forecast is compared with what came of it: the ratio of the two. A quantile of the latest
ratios is the factor by which the next forecast is multiplied (conformal prediction, split by
time). The quantile's own level moves up a little with each miss and down with each hit (adaptive
conformal inference, Gibbs and Candes 2021), so the share of hits keeps to the target while things
drift, whatever the distribution.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping

from swapserve.scheduler.knowledge.stored import number, numbers
from swapserve.scheduler.knowledge.window import Window

REMEMBERED = 200
STEP = 0.005
"""By which the level moves, times how far hit or miss is from the target."""
LEVEL_RANGE = 5 / 6, 4 / 3
"""Times the target: least and greatest level. Beyond 1 the greatest ratio is enlarged by it."""
SEEDS: Mapping[float, tuple[float, ...]] = {
    0.5: (0.4, 0.55, 0.7, 0.85, 0.95, 1.05, 1.25, 1.5, 2.0, 3.0),
    0.9: (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.5),
}
"""Ratios by target, imagined before there are any: as of forecasts that are about right. They are
forgotten first."""


class Calibration:
    """A factor that lets the target's share of results lie within the forecast.

    Args:
        target: 0.5 or 0.9.
    """

    __slots__ = ("_level", "_ratios", "_target", "margin")

    def __init__(self, target: float) -> None:
        self._target = target
        self._level = target
        self._ratios = Window(REMEMBERED, SEEDS[target])
        self.margin = 1.0
        self._set_margin()

    def add(self, ratio: float, *, missed: bool) -> None:
        """Take in a result.

        Args:
            ratio: result divided by forecast, the latter as it would be now, without its margin.
            missed: whether the result was beyond the forecast that was given, margin included.
        """
        level = self._level + STEP * (missed - 1.0 + self._target)
        self._level = self._bounded(level)
        self._ratios.add(ratio)
        self._set_margin()

    def _bounded(self, level: float) -> float:
        least, greatest = LEVEL_RANGE
        return min(max(level, least * self._target), greatest * self._target)

    def _set_margin(self) -> None:
        self.margin = self._quantile(0)

    def beyond(self, ratio: float) -> float:
        """Return the factor for a result that has reached that ratio; 0.0 if none has before."""
        start = bisect_right(self._ratios.ordered, ratio)
        return self._quantile(start) if start else self.margin

    def _quantile(self, start: int) -> float:
        """Return the level's quantile of the ratios from that rank on; 0.0 of none."""
        ordered, level = self._ratios.ordered, self._level
        count = len(ordered) - start
        if not count:
            return 0.0
        rank = math.ceil(level * (count + 1))
        if rank <= count:
            return ordered[start + rank - 1]
        return ordered[-1] * max(1.0, level)

    def as_json(self) -> dict[str, object]:
        """Return the stored form."""
        return {"level": self._level, "ratios": self._ratios.as_json()}

    def read(self, stored: dict[str, object]) -> None:
        """Take over the stored form, as far as it makes sense."""
        level = number(stored.get("level"))
        ratios = [one for one in numbers(stored.get("ratios"), REMEMBERED) if one > 0.0]
        if level is not None and ratios:
            self._level = self._bounded(level)
            self._ratios = Window(REMEMBERED, ratios)
            self._set_margin()
