"""How long requests run, predicted from those that have ended: active seconds only. Pure.

A request takes a prefill by the length of its prompt, then as many tokens as requests with its
key, or of its engine, have taken before, each after the engine's usual gap. What that leaves out
(load, caches, drift) is put right by margins that are learnt from how well it has predicted. The
same margins tell what is left for a request that has begun: they are taken from those alone that
ran for at least so long.
"""

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
LATE_P50 = 0.1
LATE_P90 = 0.4
"""What a request still takes that has run for longer than all before, by that time."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds that a request takes, with even odds and at nine in ten."""

    p50_s: float
    p90_s: float
    learnt: bool = True
    """Whether it comes from requests of the engine; else it is a first guess."""


class _Margins:
    __slots__ = ("high", "middle")

    def __init__(self) -> None:
        self.middle = Calibration(0.5)
        self.high = Calibration(0.9)

    def as_json(self) -> dict[str, object]:
        return {"p50": self.middle.as_json(), "p90": self.high.as_json()}

    def read(self, stored: dict[str, object]) -> None:
        self.middle.read(fields(stored.get("p50")))
        self.high.read(fields(stored.get("p90")))


class _Engine:
    __slots__ = ("capped", "free", "gap", "keys", "lengths", "prefill", "streamed")

    def __init__(self) -> None:
        self.prefill = Line(FIRST_PREFILL_S, FIRST_PREFILL_PER_TOKEN_S)
        self.gap = Average()
        self.streamed = False
        """Whether a stream has told the gap: then others' estimates of it are not wanted."""
        self.lengths = Window(LENGTHS_OF_ENGINE)
        self.keys: Bounded[str, Window] = Bounded(KEYS_MAX, lambda: Window(LENGTHS_OF_KEY))
        self.free = _Margins()
        self.capped = _Margins()
        """For requests whose longest answer is likely to end them."""

    def itl_s(self) -> float:
        return self.gap.value if self.gap.count else FIRST_ITL_S

    def expected_lengths(self, key: str) -> Sequence[float]:
        """Return lengths of answers to go by, shortest first."""
        of_key = self.keys.find(key)
        if of_key is not None and len(of_key) >= ENOUGH_OF_KEY:
            return of_key.ordered
        return self.lengths.ordered if len(self.lengths) >= ENOUGH_OF_ENGINE else FIRST_LENGTHS

    def plain(self, ask: Ask) -> tuple[float, float, "_Margins"]:
        """Return median and P90 of a request's active time before margins, and these."""
        first_s, itl_s = self.prefill.at(ask.tokens_in) + LEAST_S, self.itl_s()
        lengths = self.expected_lengths(ask.key)
        middle, high = lengths[len(lengths) // 2], lengths[int(0.9 * len(lengths))]
        most = ask.tokens_max
        if most is None or most >= high:
            return first_s + itl_s * middle, first_s + itl_s * high, self.free
        return first_s + itl_s * min(middle, most), first_s + itl_s * most, self.capped


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
        p50_s, p90_s, margins = known.plain(ask)
        p50_s = p50_s * margins.middle.beyond(ran_s / p50_s) - ran_s
        if p50_s <= 0.0:
            p50_s = LATE_P50 * ran_s
        p90_s = p90_s * margins.high.beyond(ran_s / p90_s) - ran_s
        if p90_s <= 0.0:
            p90_s = LATE_P90 * ran_s
        return Forecast(min(p50_s, p90_s), p90_s, len(known.lengths) >= ENOUGH_OF_ENGINE)

    def coverage(self) -> tuple[int, int]:
        """Return how many requests took no longer than their P90, and how many were counted.

        Those count that were predicted from at least a few others of the same engine.
        """
        return self._within, self._counted

    # ----------------------------------------------------------------- learning

    def ended(
        self,
        engine: EngineName,
        ask: Ask,
        used: Used,
        ran_s: float,
        *,
        promised: Forecast | None = None,
    ) -> None:
        """Take in a request that was answered to its end.

        Figures that cannot be are left out, each for itself.

        Args:
            engine: who has answered.
            ask: what it was asked.
            used: what that took.
            ran_s: its whole active time.
            promised: what `forecast` said at its grant; None: what it would say now is judged.
        """
        known = self._engines[engine]
        if valid(ran_s) and len(known.lengths) >= ENOUGH_OF_ENGINE:
            self._judge(known, ask, max(ran_s, LEAST_S), promised)
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

    def _judge(self, known: _Engine, ask: Ask, ran_s: float, promised: Forecast | None) -> None:
        """Compare a request with what was expected of it."""
        p50_s, p90_s, margins = known.plain(ask)
        half_s, most_s = margins.middle.margin * p50_s, margins.high.margin * p90_s
        if promised is not None and promised.learnt:
            half_s, most_s = promised.p50_s, promised.p90_s
        if promised is None or promised.learnt:
            self._counted += 1
            self._within += ran_s <= most_s
        margins.middle.add(ran_s / p50_s, missed=ran_s > half_s)
        margins.high.add(ran_s / p90_s, missed=ran_s > most_s)

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
                "free": known.free.as_json(),
                "capped": known.capped.as_json(),
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
            known.free.read(fields(stored.get("free")))
            known.capped.read(fields(stored.get("capped")))
        return service
