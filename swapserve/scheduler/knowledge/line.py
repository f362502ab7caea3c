"""Seconds as a line over tokens: an overhead and a time per token, fitted to few figures. Pure."""

import math
from dataclasses import dataclass, field

from swapserve.scheduler.knowledge.stored import fields, numbers

FORGET = 0.95
"""Weight of what was known before, at each new reading."""
WEIGHT_MAX = 1.0 / (1.0 - FORGET) + 1.0
OUTLIER = 4.0
"""Times the line; a reading beyond counts as if it were just there."""
ROUNDING = 1.001
TRUSTED = 3
"""Readings before one can be an outlier."""
ANCHOR_WEIGHT = 0.3
"""Of an imagined reading without tokens, so that prompts of one length give a line too."""


@dataclass(slots=True)
class Line:
    """Least squares with exponential forgetting; neither overhead nor slope is negative."""

    overhead_s: float
    """Until there are readings, a guess; as the next."""
    per_token_s: float
    count: int = 0
    _anchor_s: float = 0.0
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    """Weight, tokens, seconds, tokens squared, tokens times seconds."""

    def __post_init__(self) -> None:
        self._anchor_s = self.overhead_s

    def at(self, tokens: float) -> float:
        """Return the seconds for so many tokens."""
        return self.overhead_s + self.per_token_s * tokens

    def add(self, tokens: float, seconds: float) -> None:
        """Take in a reading."""
        if self.count >= TRUSTED:
            line = self.at(tokens)
            seconds = min(max(seconds, line / OUTLIER), line * OUTLIER)
        self.count += 1
        weight, x, y, xx, xy = self._sums
        self._sums = [
            FORGET * weight + 1.0,
            FORGET * x + tokens,
            FORGET * y + seconds,
            FORGET * xx + tokens * tokens,
            FORGET * xy + tokens * seconds,
        ]
        self._fit()

    def _fit(self) -> None:
        weight, x, y, xx, xy = self._sums
        y += ANCHOR_WEIGHT * min(self._anchor_s, y / weight)
        weight += ANCHOR_WEIGHT
        spread = weight * xx - x * x
        slope = (weight * xy - x * y) / spread if spread > 0.0 else 0.0
        overhead = (y - slope * x) / weight
        if slope < 0.0:
            slope, overhead = 0.0, y / weight
        elif overhead < 0.0:
            slope, overhead = xy / xx, 0.0
        self.per_token_s, self.overhead_s = slope, overhead

    def as_json(self) -> dict[str, object]:
        """Return the stored form."""
        return {"count": self.count, "sums": list(self._sums)}

    def read(self, data: object) -> None:
        """Take over the stored form, if it makes sense."""
        stored = fields(data)
        sums, count = numbers(stored.get("sums"), len(self._sums)), stored.get("count")
        if len(sums) != len(self._sums) or not isinstance(count, int) or count < 1:
            return
        weight, x, y, xx, xy = sums
        # What such sums over prompts of at least one token must be, whatever they were.
        possible = (
            1.0 <= weight <= WEIGHT_MAX
            and weight <= x <= xx
            and x * x <= ROUNDING * weight * xx
            and xy <= ROUNDING * y * math.sqrt(xx)
        )
        if possible:
            self.count, self._sums = count, sums
            self._fit()
