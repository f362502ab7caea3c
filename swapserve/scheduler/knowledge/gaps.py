"""How long pauses last, and so how likely the present one is to end soon. Pure.

Time since the last request is cut into spans that grow with it, so bursts and pauses, parts of a
second and days, are told apart alike. For each span: how many gaps lasted until then, and how many
ended in it. A span's figures are forgotten with the gaps that reach it, not with all: a hundred
requests of one burst do not wipe out what is known of the pauses between bursts.
"""

from math import log2, prod

from swapserve.scheduler.knowledge.stored import fields, numbers

FORGET = 0.98
"""Weight of the gaps before that have reached a span, at each new one."""
REACHED_MAX = 1.0 / (1.0 - FORGET) + 1.0
SPANS = 44
SPANS_PER_OCTAVE = 2
OCTAVES_BELOW_S = 4
"""The first span ends there: a second halved so many times."""
FIRST_END_S = 2.0**-OCTAVES_BELOW_S
LONGEST_S = FIRST_END_S * 2.0 ** ((SPANS - 1) / SPANS_PER_OCTAVE)
"""Two days; what lasts longer is expected to last about as long again."""
PRIOR_WEIGHT = 0.5
PRIOR_S = 60.0
"""Weight of an imagined gap, by that of the latest real one, and its median. It has a long tail:
after a silence longer than that, half of such gaps last for as long again."""


def _tail(start_s: float, end_s: float) -> float:
    """Return the share of imagined gaps that last until the end, of those that reach the start."""
    return (PRIOR_S + start_s) / (PRIOR_S + end_s)


def _start(number: int) -> float:
    """Return when a span starts."""
    return FIRST_END_S * 2.0 ** ((number - 1) / SPANS_PER_OCTAVE) if number else 0.0


_PRIOR = [
    PRIOR_WEIGHT * (1.0 - _tail(_start(number), _start(number + 1))) for number in range(SPANS)
]
"""Weight of imagined gaps that end in a span, of those that reach it."""


class Gaps:
    """Which share of gaps ends in which span, of those that reach it."""

    __slots__ = ("_ended", "_reached", "_stale", "_stay")

    def __init__(self) -> None:
        self._reached = [0.0] * SPANS
        self._ended = [0.0] * SPANS
        self._stay = [0.0] * SPANS
        """Share of gaps that last through a span, of those that reach it."""
        self._stale = SPANS
        """Of so many spans, from the first, that share is not up to date."""

    def add(self, gap_s: float) -> None:
        """Take in a gap that is over."""
        number = int(_place(gap_s))
        ended = number < SPANS
        upto = number + ended
        self._reached[:upto] = [FORGET * one + 1.0 for one in self._reached[:upto]]
        self._ended[:upto] = [FORGET * one for one in self._ended[:upto]]
        if ended:
            self._ended[number] += 1.0
        self._stale = max(self._stale, upto)

    def _refresh(self) -> None:
        upto, self._stale = self._stale, 0
        self._stay[:upto] = [
            1.0 - (ended + prior) / (reached + PRIOR_WEIGHT)
            for ended, reached, prior in zip(
                self._ended[:upto], self._reached, _PRIOR, strict=False
            )
        ]

    def chance(self, silent_s: float, within_s: float) -> float:
        """Return the chance that a gap of `silent_s` by now ends within so many seconds."""
        end_s = silent_s + within_s
        start, end = _place(silent_s), _place(end_s)
        first, last = int(start), int(end)
        if first >= SPANS:
            return 1.0 - _tail(silent_s, end_s)
        if self._stale:
            self._refresh()
        stay = self._stay
        lasts = prod(stay[first:last]) / (1.0 - (start - first) * (1.0 - stay[first]))
        if last < SPANS:
            lasts *= 1.0 - (end - last) * (1.0 - stay[last])
        else:
            lasts *= _tail(LONGEST_S, end_s)
        return min(max(1.0 - lasts, 0.0), 1.0)

    def as_json(self) -> dict[str, list[float]]:
        """Return the stored form."""
        return {"reached": list(self._reached), "ended": list(self._ended)}

    def read(self, data: object) -> None:
        """Take over the stored form, if it makes sense."""
        stored = fields(data)
        reached = numbers(stored.get("reached"), SPANS)
        ended = numbers(stored.get("ended"), SPANS)
        if len(reached) == len(ended) == SPANS and all(
            some <= every <= REACHED_MAX for some, every in zip(ended, reached, strict=True)
        ):
            self._reached, self._ended = reached, ended
            self._stale = SPANS


def _place(gap_s: float) -> float:
    """Return the number of the span and, as a fraction, how far into it."""
    if gap_s <= FIRST_END_S:
        return gap_s / FIRST_END_S
    return min(1.0 + (log2(gap_s) + OCTAVES_BELOW_S) * SPANS_PER_OCTAVE, float(SPANS))
