"""What swaps cost, measured per engine, direction, tier, and with requests in flight or idle. Pure.

What was not measured yet is guessed from the nearest that was: the same engine, then the others,
each scaled by what the first guesses say of the two. The first guesses depend on bytes alone.
"""

import statistics
from collections.abc import Mapping
from typing import Any, Literal

from swapserve.ids import EngineName
from swapserve.scheduler.knowledge.average import Average
from swapserve.scheduler.knowledge.bounded import Bounded
from swapserve.scheduler.knowledge.stored import number, objects, valid
from swapserve.states import Tier

Way = Literal["out", "in"]

ENGINES_MAX = 1024
UNKNOWN_BYTES = 8e9
"""Taken for the footprint of an engine while nobody knows it."""
FIRST_GUESSES: Mapping[tuple[Way, Tier], tuple[float, float]] = {
    ("out", Tier.HOST): (0.2, 6e9),
    ("in", Tier.HOST): (0.2, 8e9),
    ("out", Tier.DISK): (0.5, 1e9),
    ("in", Tier.DISK): (0.5, 2e9),
    ("out", Tier.NONE): (0.5, 1e12),
    ("in", Tier.NONE): (10.0, 1e9),
}
"""Seconds of any swap, and bytes per second, before anything was measured on this machine."""
NEIGHBOURS: Mapping[tuple[Way, Tier], tuple[Tier, ...]] = {
    ("out", Tier.HOST): (Tier.DISK,),
    ("in", Tier.HOST): (Tier.DISK,),
    ("out", Tier.DISK): (Tier.HOST,),
    ("in", Tier.DISK): (Tier.HOST,),
}
"""Tiers whose figures tell something of each other; a cold start is like nothing else."""

MAYBE_DISCARDED: tuple[Way, Tier] = ("out", Tier.DISK)
"""Idle engines with an image may simply be ended: that says nothing of a dump with requests."""

_Figures = dict[tuple[Way, Tier, bool], Average]
_CODES = {f"{way} {tier.value}": (way, tier) for way, tier in FIRST_GUESSES}


class Costs:
    """Seconds of swaps, by exponential moving averages."""

    def __init__(self) -> None:
        self._engines: Bounded[EngineName, _Figures] = Bounded(ENGINES_MAX, dict)
        self._bytes: Bounded[EngineName, list[float]] = Bounded(
            ENGINES_MAX, lambda: [UNKNOWN_BYTES]
        )
        self._answers: dict[tuple[EngineName, Way, Tier, bool], float] = {}

    # ------------------------------------------------------------------- asking

    def out_s(self, engine: EngineName, to: Tier, *, busy: bool) -> float:
        """Return the seconds of a swap out to that tier, expected or guessed.

        Args:
            engine: who is to leave its devices.
            to: HOST, DISK or NONE.
            busy: whether requests are in flight.
        """
        return self._seconds(engine, "out", to, busy)

    def in_s(self, engine: EngineName, tier: Tier, *, busy: bool) -> float:
        """Return the seconds of a swap in from that tier, expected or guessed.

        Args:
            engine: who is to come.
            tier: where it comes from: HOST, DISK or NONE (a cold start).
            busy: whether it brings suspended requests with it.
        """
        return self._seconds(engine, "in", tier, busy)

    def _seconds(self, engine: EngineName, way: Way, tier: Tier, busy: bool) -> float:
        key = (engine, way, tier, busy)
        if (answer := self._answers.get(key)) is None:
            if len(self._answers) >= ENGINES_MAX * len(FIRST_GUESSES):
                self._answers.clear()
            answer = self._answers[key] = self._look_up(engine, way, tier, busy)
        return answer

    def _look_up(self, engine: EngineName, way: Way, tier: Tier, busy: bool) -> float:
        if (way, tier) not in FIRST_GUESSES:
            return 0.0  # it is on its device already
        figures = self._engines.find(engine) or {}
        guess = self._guess(engine, way, tier)
        for other in (tier, *NEIGHBOURS.get((way, tier), ())):
            for flag in (busy, not busy):
                if (figure := figures.get((way, other, flag))) is not None:
                    known = figure.value * (guess / self._guess(engine, way, other))
                    if busy and not flag and (way, other) == MAYBE_DISCARDED:
                        return max(known, guess * (self._factor(way, tier, busy) or 1.0))
                    return known
        for flag in (busy, not busy):
            if (factor := self._factor(way, tier, flag)) is not None:
                return guess * factor
        return guess

    def _guess(self, engine: EngineName, way: Way, tier: Tier) -> float:
        fixed, rate = FIRST_GUESSES[way, tier]
        known = self._bytes.find(engine)
        return fixed + (known[0] if known else UNKNOWN_BYTES) / rate

    def _factor(self, way: Way, tier: Tier, busy: bool) -> float | None:
        """Return how the other engines' figures compare with their first guesses: the median."""
        found = [
            figure.value / self._guess(name, way, tier)
            for name, figures in self._engines.items()
            if (figure := figures.get((way, tier, busy))) is not None
        ]
        return statistics.median(found) if found else None

    # ----------------------------------------------------------------- learning

    def left(self, engine: EngineName, to: Tier, seconds: float, *, busy: bool) -> None:
        """Take in what a swap out took."""
        self._add(engine, "out", to, seconds, busy)

    def came(self, engine: EngineName, tier: Tier, seconds: float, *, busy: bool) -> None:
        """Take in what a swap in took; `tier` is where the engine came from."""
        self._add(engine, "in", tier, seconds, busy)

    def size(self, engine: EngineName, bytes_: int) -> None:
        """Take in how many bytes it holds on all its devices together; 0: nobody knows."""
        size = float(bytes_) if bytes_ > 0 else UNKNOWN_BYTES
        known = self._bytes[engine]
        if known[0] != size:
            known[0] = size
            self._answers.clear()

    def _add(self, engine: EngineName, way: Way, tier: Tier, seconds: float, busy: bool) -> None:
        if valid(seconds) and (way, tier) in FIRST_GUESSES:
            self._engines[engine].setdefault((way, tier, busy), Average()).add(seconds)
            self._answers.clear()

    # ------------------------------------------------------------------ storing

    def as_json(self) -> dict[str, Any]:
        """Return the stored form."""
        return {
            "bytes": {name: {"bytes": known[0]} for name, known in self._bytes.items()},
            "engines": {
                name: {
                    f"{way} {tier.value} {'busy' if busy else 'idle'}": figure.as_json()
                    for (way, tier, busy), figure in figures.items()
                }
                for name, figures in self._engines.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Costs":
        """Build from the stored form; what makes no sense is left out."""
        costs = cls()
        for name, stored in objects(data.get("bytes"), ENGINES_MAX):
            if size := number(stored.get("bytes")):
                costs._bytes[EngineName(name)][0] = size
        for name, stored in objects(data.get("engines"), ENGINES_MAX):
            for code, item in stored.items():
                kind, _, flag = code.rpartition(" ")
                figure = Average.from_json(item)
                if kind in _CODES and flag in {"busy", "idle"} and figure is not None:
                    way, tier = _CODES[kind]
                    costs._engines[EngineName(name)][way, tier, flag == "busy"] = figure
        return costs
