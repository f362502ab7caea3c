"""Medians, ratios and their bootstrap intervals. Pure, and the same for the same seed."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEAST_PAIRS = 20
"""Fewer ratios than this support no verdict."""
WIDEST_INTERVAL = 0.25
"""An interval wider than this part of its median is too noisy to say that a bound is missed."""
RESAMPLES = 4000
LEVEL = 0.95
_SEED = 20_26

Verdict = Literal["met", "not met", "too noisy", "too few samples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Median of some numbers with its 95 % bootstrap interval."""

    n: int
    median: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """Width as a part of the median; infinite around zero."""
        return (self.high - self.low) / abs(self.median) if self.median else float("inf")


def interval(values: Sequence[float], *, seed: int = _SEED) -> Interval:
    """Return the median and its percentile bootstrap interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    rng = random.Random(seed)
    medians = sorted(
        statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    cut = round((1 - LEVEL) / 2 * RESAMPLES)
    return Interval(
        n=len(values),
        median=statistics.median(values),
        low=medians[cut],
        high=medians[RESAMPLES - 1 - cut],
    )


def below(found: Interval, bound: float, *, least: int = LEAST_PAIRS) -> Verdict:
    """Say whether a figure is at most `bound`, judged by the upper end of its interval.

    The rule is fixed before anything is measured: an interval that lies below the bound meets it
    and one that lies above misses it, however wide; one that holds the bound misses it only if it
    is narrow.
    """
    if found.n < least:
        return "too few samples"
    if found.high <= bound:
        return "met"
    if found.low > bound or found.relative_width <= WIDEST_INTERVAL:
        return "not met"
    return "too noisy"


def above(found: Interval, bound: float) -> Verdict:
    """Say whether a figure's median is at least `bound` (no least number of samples)."""
    return "met" if found.median >= bound else "not met"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
