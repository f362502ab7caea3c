"""How long pauses last: a histogram of gaps that forgets. Pure.

Bins grow with the gap, so bursts and pauses, milliseconds and days, are told apart alike. A gap
longer than all before is covered by one imagined gap with a long tail.
"""

from math import log2

from swapserve.scheduler.knowledge.stored import numbers

FORGET = 0.98
"""Weight of all gaps before, at each new one."""
BINS_PER_OCTAVE = 2
OCTAVES_BELOW_S = 10
"""Shortest gap told from nothing: a second halved so many times."""
BINS = 64
SHORTEST_S = 2.0**-OCTAVES_BELOW_S
TAIL_WEIGHT = 0.5
TAIL_S = 60.0
"""Weight of the imagined gap, by that of the latest real one, and its median."""
GAIN_MAX = 1e9


class Gaps:
    """Weighted counts of gaps."""

    __slots__ = ("_bins", "_gain", "_total")

    def __init__(self) -> None:
        self._bins = [0.0] * BINS
        self._gain = 1.0
        self._total = 0.0

    def add(self, gap_s: float) -> None:
        """Take in a gap that is over."""
        # The new weighs more instead of all others less: no need to touch them.
        self._gain = gain = self._gain / FORGET
        self._bins[min(int(_place(gap_s)), BINS - 1)] += gain
        self._total += gain
        if gain > GAIN_MAX:
            self._bins = [one / gain for one in self._bins]
            self._gain, self._total = 1.0, sum(self._bins)

    def chance(self, silent_s: float, within_s: float) -> float:
        """Return the chance that a gap of `silent_s` by now ends within so many seconds."""
        tail = self._gain * TAIL_WEIGHT * TAIL_S
        now = (self._longer(silent_s) if silent_s > 0.0 else self._total) + tail / (
            TAIL_S + silent_s
        )
        then_s = silent_s + within_s
        then = self._longer(then_s) + tail / (TAIL_S + then_s)
        return min(max(1.0 - then / now, 0.0), 1.0)

    def _longer(self, gap_s: float) -> float:
        """Return the weight of gaps longer than that."""
        place = _place(gap_s)
        number = int(place)
        if number >= BINS:
            return 0.0
        bins = self._bins
        return sum(bins[number + 1 :]) + bins[number] * (number + 1 - place)

    def as_json(self) -> list[float]:
        """Return the stored form: weights, the latest gap's is 1."""
        return [one / self._gain for one in self._bins]

    def read(self, data: object) -> None:
        """Take over the stored form, if it makes sense."""
        bins = numbers(data, BINS)
        if len(bins) == BINS:
            self._bins, self._gain, self._total = bins, 1.0, sum(bins)


def _place(gap_s: float) -> float:
    if gap_s <= SHORTEST_S:
        return 0.0
    return (log2(gap_s) + OCTAVES_BELOW_S) * BINS_PER_OCTAVE
