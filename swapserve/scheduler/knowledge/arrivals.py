"""When an engine is asked for next: by its own rhythm, the hour of day, and who came before. Pure.

Three estimates of the chance of a request within some time; the highest counts:

- the gaps between its requests so far: of those longer than the present silence, how many would
  end in time. Bursts, pauses and periods all show there. A silence longer than all gaps is
  expected to last about as long again.
- the hour of day: how often a burst of requests has begun in such an hour of the latest days, as
  far as the present silence does not speak against today being such a day.
- the sequence: which engine's requests have followed those of the one that was asked for last,
  and how soon.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from swapserve.ids import EngineName
from swapserve.scheduler.knowledge.bounded import Bounded
from swapserve.scheduler.knowledge.gaps import Gaps
from swapserve.scheduler.knowledge.hours import Hours
from swapserve.scheduler.knowledge.sequence import Sequence
from swapserve.scheduler.knowledge.stored import fields, numbers, objects

ENGINES_MAX = 1024
K = 8
"""Latest arrivals that the rate is taken from."""
FIRST_GAP_S = 60.0
"""Guess for the gap after an engine's very first request."""
LEAST_S = 1e-3
PAUSE_S = 60.0
"""A gap from which on the next request begins a new burst."""


class _Engine:
    __slots__ = ("gaps", "hours", "times")

    def __init__(self) -> None:
        self.times: deque[float] = deque(maxlen=K)
        self.gaps = Gaps()
        self.hours = Hours()


class Arrivals:
    """Predictions of demand.

    Args:
        wall_offset_s: Unix time when the monotonic clock was zero.
    """

    def __init__(self, wall_offset_s: float = 0.0) -> None:
        self._wall_offset_s = wall_offset_s
        self._engines: Bounded[EngineName, _Engine] = Bounded(ENGINES_MAX, _Engine)
        self._sequence = Sequence()

    def arrived(self, engine: EngineName, now: float) -> None:
        """Take in a request for the engine."""
        known = self._engines[engine]
        times = known.times
        gap_s = max(0.0, now - times[-1]) if times else math.inf
        if times:
            known.gaps.add(gap_s)
        if gap_s >= PAUSE_S:
            known.hours.add(self._wall_offset_s + now)
        times.append(now)
        self._sequence.arrived(engine, now)

    def rate(self, engine: EngineName, now: float) -> float:
        """Return requests per second, by the latest few and the time since then."""
        known = self._engines.find(engine)
        if known is None:
            return 0.0
        times = known.times
        span_s = now - times[0]
        if len(times) == 1:
            return 1.0 / (FIRST_GAP_S + max(0.0, span_s))
        return (len(times) - 1) / max(span_s, LEAST_S)

    def chance(self, engine: EngineName, now: float, within_s: float) -> float:
        """Return the chance of at least one request within so many seconds, from 0 to 1."""
        known = self._engines.find(engine)
        if known is None or within_s <= 0.0:
            return 0.0
        silent_s = max(0.0, now - known.times[-1])
        return max(
            known.gaps.chance(silent_s, within_s),
            known.hours.chance(self._wall_offset_s + now, silent_s, within_s),
            self._sequence.chance(engine, now, within_s),
        )

    # ------------------------------------------------------------------ storing

    def as_json(self, now: float) -> dict[str, Any]:
        """Return the stored form; times are told from `now`: the next clock may be another."""
        return {
            "engines": {
                name: {
                    "ago_s": [max(0.0, now - time) for time in known.times],
                    "gaps": known.gaps.as_json(),
                    "hours": known.hours.as_json(),
                }
                for name, known in self._engines.items()
            },
            "sequence": self._sequence.as_json(now),
        }

    @classmethod
    def from_json(
        cls, data: Mapping[str, object], now: float, wall_offset_s: float = 0.0
    ) -> "Arrivals":
        """Build from the stored form; what makes no sense is left out."""
        arrivals = cls(wall_offset_s)
        for name, stored in objects(data.get("engines"), ENGINES_MAX):
            if ago_s := numbers(stored.get("ago_s"), K):
                known = arrivals._engines[EngineName(name)]
                known.times.extend(now - one for one in ago_s)
                known.gaps.read(stored.get("gaps"))
                known.hours.read(fields(stored.get("hours")))
        arrivals._sequence = Sequence.from_json(fields(data.get("sequence")), now)
        return arrivals
