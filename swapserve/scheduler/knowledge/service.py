"""How long requests run, predicted from those that have ended: active seconds only. Pure.

A request takes a prefill by the length of its prompt, then as many tokens as requests with its
key, or of its engine, have taken before, each after the engine's usual gap. What that leaves out
(load, caches, drift) is put right by margins that are learnt from how well it has predicted.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swapserve.ids import EngineName
from swapserve.messages import Ask, Used
from swapserve.scheduler.knowledge.average import Average
from swapserve.scheduler.knowledge.bounded import Bounded
from swapserve.scheduler.knowledge.calibration import Calibration
from swapserve.scheduler.knowledge.line import Line
from swapserve.scheduler.knowledge.stored import fields, numbers, objects, valid
from swapserve.scheduler.knowledge.window import Window

ENGINES_MAX = 1024
KEYS_MAX = 32
"""Of one engine."""
LENGTHS_OF_ENGINE = 256
LENGTHS_OF_KEY = 64
ENOUGH_OF_ENGINE = 4
"""Requests of an engine from which its own lengths are believed, and its forecasts judged."""
ENOUGH_OF_KEY = 10
FIRST_LENGTHS = (16.0, 40.0, 70.0, 110.0, 150.0, 200.0, 260.0, 350.0, 500.0, 800.0)
"""Tokens of an answer, before any were counted."""
FIRST_PREFILL_S = 0.05
FIRST_PREFILL_PER_TOKEN_S = 0.0005
FIRST_ITL_S = 0.03
LEAST_S = 1e-6
TELLING_TOKENS = 8
"""Answers shorter than that tell nothing of the gap if only their whole time is known."""
BEYOND_ALL = {0.5: 1.41, 0.9: 3.16}
"""Length of an answer that is longer than all before, by what it has reached: as Pareto has it."""
LATE = {0.5: 0.1, 0.9: 0.4}
"""What one still takes that is later than possible, by the time it has run."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds that a request takes, with even odds and at nine in ten."""

    p50_s: float
    p90_s: float


class _Engine:
    __slots__ = ("gap", "high", "keys", "lengths", "middle", "prefill", "streamed")

    def __init__(self) -> None:
        self.prefill = Line(FIRST_PREFILL_S, FIRST_PREFILL_PER_TOKEN_S)
        self.gap = Average()
        self.streamed = False
        """Whether a stream has told the gap: then others' estimates of it are not wanted."""
        self.lengths = Window(LENGTHS_OF_ENGINE)
        self.keys: Bounded[str, Window] = Bounded(KEYS_MAX, lambda: Window(LENGTHS_OF_KEY))
        self.middle = Calibration(0.5)
        self.high = Calibration(0.9)

    def itl_s(self) -> float:
        return self.gap.value if self.gap.count else FIRST_ITL_S

    def expected_lengths(self, key: str) -> Sequence[float]:
        """Return lengths of answers to go by, shortest first."""
        of_key = self.keys.find(key)
        if of_key is not None and len(of_key) >= ENOUGH_OF_KEY:
            return of_key.ordered
        return self.lengths.ordered if len(self.lengths) >= ENOUGH_OF_ENGINE else FIRST_LENGTHS

    def left_s(self, share: float, margin: float, ask: Ask, ran_s: float) -> float:
        """Return the time left, at that quantile of the answers longer than this one by now."""
        first_s, itl_s = self.prefill.at(ask.tokens_in), self.itl_s()
        lengths = self.expected_lengths(ask.key)
        reached = (ran_s / margin - first_s) / itl_s
        start = bisect_right(lengths, reached) if reached > 0.0 else 0
        count = len(lengths) - start
        tokens = lengths[start + int(share * count)] if count else reached * BEYOND_ALL[share]
        if ask.tokens_max is not None and tokens > ask.tokens_max:
            tokens = ask.tokens_max
        left_s = margin * (first_s + itl_s * tokens) - ran_s
        return left_s if left_s > 0.0 else ran_s * LATE[share]


_UNKNOWN = _Engine()


class Service:
    """Predictions of execution time, per engine and API key."""

    def __init__(self) -> None:
        self._engines: Bounded[EngineName, _Engine] = Bounded(ENGINES_MAX, _Engine)
        self._within = 0
        self._counted = 0

    # ------------------------------------------------------------------- asking

    def first_s(self, engine: EngineName, ask: Ask) -> float:
        """Return the seconds from grant to first token."""
        known = self._engines.find(engine) or _UNKNOWN
        return known.prefill.at(ask.tokens_in)

    def itl_s(self, engine: EngineName) -> float:
        """Return the mean seconds between two tokens of one answer."""
        return (self._engines.find(engine) or _UNKNOWN).itl_s()

    def forecast(self, engine: EngineName, ask: Ask) -> Forecast:
        """Return the whole active time of a request that has not begun."""
        return self.remaining(engine, ask, 0.0)

    def remaining(self, engine: EngineName, ask: Ask, ran_s: float) -> Forecast:
        """Return the active time that a request has left after having run for `ran_s`."""
        known = self._engines.find(engine) or _UNKNOWN
        p50_s = known.left_s(0.5, known.middle.margin, ask, ran_s)
        p90_s = known.left_s(0.9, known.high.margin, ask, ran_s)
        return Forecast(min(p50_s, p90_s), p90_s)

    def coverage(self) -> tuple[int, int]:
        """Return how many requests took no longer than their P90, and how many were counted.

        Those count that were predicted from at least a few others of the same engine.
        """
        return self._within, self._counted

    # ----------------------------------------------------------------- learning

    def ended(self, engine: EngineName, ask: Ask, used: Used, ran_s: float) -> None:
        """Take in a request that was answered to its end; `ran_s` is its whole active time.

        Figures that cannot be are left out, each for itself.
        """
        known = self._engines[engine]
        if valid(ran_s) and len(known.lengths) >= ENOUGH_OF_ENGINE:
            self._judge(known, ask, max(ran_s, LEAST_S))
        tokens_in, tokens_out = used.tokens_in, used.tokens_out
        if used.prefill_s is not None and valid(used.prefill_s) and valid(tokens_in):
            known.prefill.add(max(tokens_in, 1.0), used.prefill_s)
        if not valid(tokens_out):
            return
        if used.decode_s is not None and valid(used.decode_s):
            if tokens_out > 1.0:
                known.gap.add(max(used.decode_s / (tokens_out - 1.0), LEAST_S))
                known.streamed = True
        elif not known.streamed and tokens_out >= TELLING_TOKENS and valid(ran_s):
            decode_s = ran_s - known.prefill.at(tokens_in)
            known.gap.add(max(decode_s / (tokens_out - 1.0), LEAST_S))
        known.lengths.add(tokens_out)
        known.keys[ask.key].add(tokens_out)

    def _judge(self, known: _Engine, ask: Ask, ran_s: float) -> None:
        """Compare a request with what was to be expected of it."""
        p50_s, p90_s = known.left_s(0.5, 1.0, ask, 0.0), known.left_s(0.9, 1.0, ask, 0.0)
        self._counted += 1
        self._within += ran_s <= known.high.margin * p90_s
        known.middle.add(ran_s / max(p50_s, LEAST_S))
        known.high.add(ran_s / max(p90_s, LEAST_S))

    # ------------------------------------------------------------------ storing

    def as_json(self) -> dict[str, Any]:
        """Return the stored form."""
        return {
            name: {
                "prefill": known.prefill.as_json(),
                "itl": known.gap.as_json(),
                "streamed": known.streamed,
                "lengths": known.lengths.as_json(),
                "keys": {key: window.as_json() for key, window in known.keys.items()},
                "p50": known.middle.as_json(),
                "p90": known.high.as_json(),
            }
            for name, known in self._engines.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Service":
        """Build from the stored form; what makes no sense is left out."""
        service = cls()
        for name, stored in objects(data, ENGINES_MAX):
            known = service._engines[EngineName(name)]
            known.prefill.read(stored.get("prefill"))
            known.gap = Average.from_json(stored.get("itl")) or Average()
            known.streamed = stored.get("streamed") is True
            known.lengths = Window(
                LENGTHS_OF_ENGINE, numbers(stored.get("lengths"), LENGTHS_OF_ENGINE)
            )
            for key, lengths in list(fields(stored.get("keys")).items())[-KEYS_MAX:]:
                for length in numbers(lengths, LENGTHS_OF_KEY):
                    known.keys[key].add(length)
            known.middle.read(fields(stored.get("p50")))
            known.high.read(fields(stored.get("p90")))
        return service
