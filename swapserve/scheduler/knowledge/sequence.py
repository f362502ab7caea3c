"""Who is asked for after whom, and how soon: agents and pipelines call models in turn. Pure."""

from collections.abc import Mapping
from math import inf
from typing import Any

from swapserve.ids import EngineName
from swapserve.scheduler.knowledge.bounded import Bounded
from swapserve.scheduler.knowledge.delay import Delay
from swapserve.scheduler.knowledge.stored import number, objects

ENGINES_MAX = 1024
SUCCESSORS_MAX = 16
"""Of one engine; the rarest makes room."""
FORGET = 0.95
"""Weight of earlier changes away from an engine, at each new one."""
WEIGHT_MAX = 1.0 / (1.0 - FORGET) + 1.0
UNSEEN = 1.0
"""Weight of what has not been seen yet, by that of the latest change."""
GAIN_MAX = 1e9


class _Next(Delay):
    """One that has followed, how soon, and how often."""

    __slots__ = ("weight",)

    def __init__(self, first_s: float) -> None:
        super().__init__(first_s)
        self.weight = 0.0


class _After:
    """What has followed one engine."""

    __slots__ = ("delays", "gain", "total")

    def __init__(self) -> None:
        self.delays: dict[EngineName, _Next] = {}
        self.gain = 1.0
        self.total = 0.0

    def add(self, engine: EngineName, seconds: float) -> None:
        self.gain /= FORGET
        if (delay := self.delays.get(engine)) is None:
            if len(self.delays) >= SUCCESSORS_MAX:
                rarest = min(self.delays, key=lambda name: self.delays[name].weight)
                del self.delays[rarest]
            delay = self.delays[engine] = _Next(seconds)
        else:
            delay.add(seconds)
        delay.weight += self.gain
        self.total += self.gain
        if self.gain > GAIN_MAX:
            self._rescale()

    def _rescale(self) -> None:
        for delay in self.delays.values():
            delay.weight /= self.gain
        self.total /= self.gain
        self.gain = 1.0


class Sequence:
    """First-order transitions between different engines."""

    def __init__(self) -> None:
        self._after: Bounded[EngineName, _After] = Bounded(ENGINES_MAX, _After)
        self._latest: EngineName | None = None
        self._latest_at = -inf

    def arrived(self, engine: EngineName, now: float) -> None:
        """Take in a request for the engine."""
        latest = self._latest
        if latest is not None and latest != engine:
            self._after[latest].add(engine, max(0.0, now - self._latest_at))
        self._latest, self._latest_at = engine, now

    def chance(self, engine: EngineName, now: float, within_s: float) -> float:
        """Return the chance that the engine follows the latest within so many seconds."""
        latest = self._latest
        if latest is None:
            return 0.0
        after = self._after.find(latest)
        delay = after.delays.get(engine) if after is not None else None
        if after is None or delay is None:
            return 0.0
        share = delay.weight / (after.total + UNSEEN * after.gain)
        passed_s = now - self._latest_at
        later = delay.longer(passed_s)
        # Those that would have come by now have not: what is left is the rest, or another engine.
        still = 1.0 - share + share * later
        found = share * (later - delay.longer(passed_s + within_s)) / still
        return min(max(found, 0.0), 1.0)

    def as_json(self, now: float) -> dict[str, Any]:
        """Return the stored form."""
        after = {
            name: {
                engine: {"weight": delay.weight / known.gain, **delay.as_json()}
                for engine, delay in known.delays.items()
            }
            for name, known in self._after.items()
        }
        if self._latest is None:
            return {"after": after}
        return {"after": after, "latest": self._latest, "ago_s": max(0.0, now - self._latest_at)}

    @classmethod
    def from_json(cls, data: Mapping[str, object], now: float) -> "Sequence":
        """Build from the stored form; what makes no sense is left out."""
        sequence = cls()
        for name, stored in objects(data.get("after"), ENGINES_MAX):
            after = sequence._after[EngineName(name)]
            for engine, item in objects(stored, SUCCESSORS_MAX):
                weight, delay = number(item.get("weight")), _Next(0.0)
                if weight is not None and weight <= WEIGHT_MAX and delay.read(item):
                    delay.weight = weight
                    after.delays[EngineName(engine)] = delay
                    after.total += weight
        latest, ago_s = data.get("latest"), number(data.get("ago_s"))
        if isinstance(latest, str) and ago_s is not None:
            sequence._latest, sequence._latest_at = EngineName(latest), now - ago_s
        return sequence
