"""Choose by measured cost how an engine gives its GPU memory back (`mechanism: auto`). Pure.

What counts is the way out and the way back in together. No mechanism is the cheapest everywhere: a
third party measured 0.94 + 1.11 s for moving the process's state, 2.15 + 0.51 s for vLLM's sleep,
0.18 + 1.50 s for its deep sleep and 19.4 s for a cold start, with a model of 3 billion parameters
on an RTX 3080. So each engine's own swaps decide, and go on deciding: what lost is tried again, at
a small part of the cost of all moves.
"""

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from swapserve.config.recipes import Mechanism

IN_WEIGHT = 1.0
"""Seconds on the way in count this many times. A request waits for them; but it waits as well for
the way out of the engine before it, so they count the same."""
TRIES = 2
"""How often each mechanism is tried before costs decide; once if that was too dear."""
TOO_DEAR = 3.0
"""Times the best; what is known to cost more is not tried."""
HYSTERESIS = 0.05
"""By which share another mechanism must be cheaper to take over."""
RETRY_SHARE = 0.03
"""Share of the cost of all moves that may be spent on trying again what lost."""
RETRY_AFTER = 25
"""Moves before what lost may be tried again."""
UNJUDGED_WEIGHT = 3
"""Share of that for what was found too dear at its first try, where others have 1."""
EMA_WEIGHT = 0.2
REMEMBERED = 5
"""Latest readings whose median tells an outlier from a change."""
OUTLIER = 1.5
"""Times that median (or a part of it); a reading beyond counts as if it were just there."""
PAUSE_AFTER_FAILURE = 8
"""Moves without a mechanism that failed; doubles with each failure in a row."""
LONGEST_PAUSE = 1024

LOSES_CACHE: frozenset[Mechanism] = frozenset({"lean", "sleep", "deep_sleep", "restart"})
NEEDS_DRIVER: frozenset[Mechanism] = frozenset({"checkpoint", "lean"})
GUESSES: Mapping[Mechanism, float] = {
    "deep_sleep": 1.7,
    "lean": 1.9,
    "checkpoint": 2.1,
    "sleep": 2.7,
    "restart": 20.0,
}
"""Seconds out plus in, before anything was measured; they only say what is tried first."""


@dataclass(slots=True)
class Average:
    """A running average of seconds that single outliers hardly move, and lasting changes do."""

    value: float | None = None
    recent: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        """Take in a reading."""
        self.recent = [*self.recent, seconds][-REMEMBERED:]
        middle = statistics.median_low(self.recent)
        if self.value is None or len(self.recent) < REMEMBERED:
            self.value = middle  # an average would begin with the outlier, if that came first
            return
        taken = min(max(seconds, middle / OUTLIER), middle * OUTLIER)
        self.value += EMA_WEIGHT * (taken - self.value)


@dataclass(slots=True)
class Record:
    """What is known of one mechanism."""

    out: Average = field(default_factory=Average)
    back: Average = field(default_factory=Average)
    tries: int = 0
    """Ways out since it was new, or since it surprised."""
    used_at: int = 0
    """Number of the move when it was used last."""
    failures: int = 0
    """In a row."""
    pause_until: int = 0
    """Number of the move before which it is not used."""
    saved_s: float = 0.0
    """What may be spent on trying it again: each has its share, or the dear would never be."""

    @property
    def total(self) -> float:
        """Seconds out and in, as far as measured: a lower bound while one of them is not."""
        return (self.out.value or 0.0) + IN_WEIGHT * (self.back.value or 0.0)


class Choice:
    """What each mechanism has cost one engine, and which one is next."""

    def __init__(self) -> None:
        self._records: dict[Mechanism, Record] = {}
        self._unsupported: set[Mechanism] = set()
        self._current: Mechanism | None = None
        self._moves = 0
        self._out_s = 0.0

    # ------------------------------------------------------------------ choosing

    def offered(
        self,
        mechanisms: Collection[Mechanism],
        *,
        wanted: Mechanism | Literal["auto"] = "auto",
        can_suspend: bool,
        owned: bool = True,
        in_flight: int,
        keep_cache: bool,
    ) -> frozenset[Mechanism]:
        """Return what may be used at all for the next move.

        Args:
            mechanisms: what the engine, as it is launched, can do.
            wanted: the configured one; requests in flight and a cache to be kept go before it.
            can_suspend: whether the driver can move this engine's state. On several GPUs that is
                so only where it has been shown.
            owned: whether the engine is ours to end.
            in_flight: requests that its state has to outlive.
            keep_cache: whether its cache must not be lost.
        """
        allowed = set(mechanisms) - self._unsupported
        if not can_suspend:
            allowed -= NEEDS_DRIVER
        if not owned:
            allowed -= {"restart"}
        if in_flight or keep_cache:
            return frozenset(allowed - LOSES_CACHE)
        return frozenset(allowed if wanted == "auto" else allowed & {wanted})

    def pick(
        self,
        mechanisms: Collection[Mechanism],
        *,
        wanted: Mechanism | Literal["auto"] = "auto",
        can_suspend: bool,
        owned: bool = True,
        in_flight: int,
        keep_cache: bool,
        cache_s: float = 0.0,
    ) -> Mechanism | None:
        """Return the mechanism for the next move, None if none may be used.

        Asking again before the move gives the same answer.

        Args:
            mechanisms: see `offered`, as for those not named here.
            wanted: likewise.
            can_suspend: likewise.
            owned: likewise.
            in_flight: likewise.
            keep_cache: likewise.
            cache_s: seconds of work that a loss of its cache is expected to cost later.
        """
        allowed = self.offered(
            mechanisms,
            wanted=wanted,
            can_suspend=can_suspend,
            owned=owned,
            in_flight=in_flight,
            keep_cache=keep_cache,
        )
        rested = {name for name in allowed if self._record(name).pause_until <= self._moves}
        able = sorted(rested or allowed, key=lambda name: GUESSES[name])
        if len(able) <= 1:
            return able[0] if able else None
        costs = {
            name: self._record(name).total + (cache_s if name in LOSES_CACHE else 0.0)
            for name in able
        }
        return self._untried(able, costs) or self._retried(able, costs) or self._best(able, costs)

    def _measured(self, able: Collection[Mechanism]) -> list[Mechanism]:
        return [name for name in able if self._record(name).tries]

    def _untried(
        self, able: Collection[Mechanism], costs: Mapping[Mechanism, float]
    ) -> Mechanism | None:
        """Return what was tried least and too seldom to be judged, the cheapest guess first."""
        limit = TOO_DEAR * min((costs[name] for name in self._measured(able)), default=math.inf)
        waiting = [
            name for name in able if self._record(name).tries < TRIES and costs[name] <= limit
        ]
        return min(waiting, key=lambda name: self._record(name).tries, default=None)

    def _retried(
        self, able: Collection[Mechanism], costs: Mapping[Mechanism, float]
    ) -> Mechanism | None:
        """Return what lost long ago, if its extra cost has been saved up; longest ago first."""
        best = min(costs[name] for name in self._measured(able))
        losers = [
            name
            for name in self._measured(able)
            if self._moves - self._record(name).used_at >= RETRY_AFTER
            and costs[name] - best <= self._record(name).saved_s
        ]
        return min(losers, key=lambda name: self._record(name).used_at, default=None)

    def _best(self, able: Collection[Mechanism], costs: Mapping[Mechanism, float]) -> Mechanism:
        measured = self._measured(able)
        best = min(measured, key=lambda name: costs[name])
        current = self._current
        if current in measured and costs[best] >= (1 - HYSTERESIS) * costs[current]:
            return current
        self._current = best
        return best

    # ------------------------------------------------------------------ learning

    def started(self, seconds: float) -> None:
        """Take in what a start took that no move out came before: the way in of a restart."""
        record = self._record("restart")
        if not record.tries:
            record.back.add(seconds)

    def left(self, mechanism: Mechanism, seconds: float) -> None:
        """Take in what a way out took."""
        self._moves += 1
        record = self._record(mechanism)
        record.out.add(seconds)
        record.tries += 1
        record.used_at = self._moves
        record.failures = 0
        self._out_s = seconds

    def came(self, mechanism: Mechanism, seconds: float) -> None:
        """Take in what the way back took, after that way out."""
        record = self._record(mechanism)
        record.back.add(seconds)
        known = [other.total for other in self._records.values() if other.tries >= TRIES]
        if not known or record.tries <= TRIES:
            return
        best = min(known)
        self._save(RETRY_SHARE * best)
        if mechanism == self._current:
            return
        cost = self._out_s + IN_WEIGHT * seconds
        record.saved_s -= max(0.0, cost - best)
        if cost < best:
            self._surprised(mechanism, self._out_s, seconds)

    def _save(self, seconds: float) -> None:
        """Share out what may be spent on trying again what lost."""
        losers = [other for name, other in self._records.items() if name != self._current]
        # One reading may have been an outlier, so what was judged by it alone comes sooner.
        weights = [1 if other.tries >= TRIES else UNJUDGED_WEIGHT for other in losers]
        for other, weight in zip(losers, weights, strict=True):
            other.saved_s += seconds * weight / sum(weights)

    def _surprised(self, mechanism: Mechanism, out_s: float, in_s: float) -> None:
        """Forget what it cost before: it has become better than what won."""
        record = Record(tries=TRIES - 1, used_at=self._moves)
        record.out.add(out_s)
        record.back.add(in_s)
        self._records[mechanism] = record

    def failed(self, mechanism: Mechanism, *, unsupported: bool = False) -> None:
        """Take in that a move with it failed; `unsupported`: it will never do anything else.

        That the engine lacks the call is not remembered beyond the daemon's life: another version
        may have it.
        """
        if unsupported:
            self._unsupported.add(mechanism)
            return
        record = self._record(mechanism)
        pause = min(PAUSE_AFTER_FAILURE << record.failures, LONGEST_PAUSE)
        record.failures += 1
        record.pause_until = self._moves + pause

    def _record(self, mechanism: Mechanism) -> Record:
        return self._records.setdefault(mechanism, Record())

    # ------------------------------------------------------------------- storing

    def as_json(self) -> dict[str, Any]:
        """Return what was learnt, for the journal."""
        return {
            "current": self._current,
            "moves": self._moves,
            "records": {
                name: {
                    "out": record.out.recent,
                    "out_s": record.out.value,
                    "in": record.back.recent,
                    "in_s": record.back.value,
                    "tries": record.tries,
                    "used_at": record.used_at,
                    "failures": record.failures,
                    "pause_until": record.pause_until,
                    "saved_s": record.saved_s,
                }
                for name, record in self._records.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Choice":
        """Build from the stored form; what cannot be understood is learnt anew."""
        choice = cls()
        try:
            choice._read(data)
        except (KeyError, TypeError, ValueError, AttributeError):
            return cls()
        return choice

    def _read(self, data: Mapping[str, Any]) -> None:
        for name in GUESSES:
            if (stored := data.get("records", {}).get(name)) is None:
                continue
            self._records[name] = Record(
                out=_average(stored["out"], stored["out_s"]),
                back=_average(stored["in"], stored["in_s"]),
                tries=int(stored["tries"]),
                used_at=int(stored["used_at"]),
                failures=int(stored["failures"]),
                pause_until=int(stored["pause_until"]),
                saved_s=float(stored["saved_s"]),
            )
        self._current = next((name for name in GUESSES if name == data.get("current")), None)
        self._moves = int(data.get("moves", 0))


def _average(recent: list[float], value: float | None) -> Average:
    return Average(None if value is None else float(value), [float(item) for item in recent])
