"""What is learnt from swaps, requests and their results, for policies to go by. Pure.

It is told, and asked, by the scheduler alone; nothing here reads a clock or draws lots, so the
same events give the same answers. All of it is bounded and may be lost: then it is learnt anew.
"""

from typing import Any

from swapserve.scheduler.knowledge.arrivals import Arrivals
from swapserve.scheduler.knowledge.caches import Caches
from swapserve.scheduler.knowledge.costs import Costs
from swapserve.scheduler.knowledge.service import Forecast, Service
from swapserve.scheduler.knowledge.stored import fields

__all__ = ["Arrivals", "Caches", "Costs", "Forecast", "Knowledge", "Service"]

VERSION = 1
"""Of the stored form."""


class Knowledge:
    """Costs of swaps, times of requests, demand, worth of caches.

    Args:
        wall_offset_s: Unix time when the monotonic clock was zero.
    """

    def __init__(self, wall_offset_s: float = 0.0) -> None:
        self.costs = Costs()
        self.service = Service()
        self.arrivals = Arrivals(wall_offset_s)
        self.caches = Caches()

    def as_json(self, now: float) -> dict[str, Any]:
        """Return all of it as plain JSON data.

        Args:
            now: monotonic time, from which stored times are told.
        """
        return {
            "version": VERSION,
            "costs": self.costs.as_json(),
            "service": self.service.as_json(),
            "arrivals": self.arrivals.as_json(now),
            "caches": self.caches.as_json(),
        }

    @classmethod
    def from_json(cls, data: object, now: float, wall_offset_s: float = 0.0) -> "Knowledge":
        """Build from stored data; what is missing, wrong or of another version is learnt anew.

        Args:
            data: what `as_json` gave, or anything.
            now: monotonic time, from which stored times are told.
            wall_offset_s: as for the constructor.
        """
        knowledge = cls(wall_offset_s)
        stored = fields(data)
        version = stored.get("version")
        if isinstance(version, bool) or version != VERSION:
            return knowledge
        knowledge.costs = Costs.from_json(fields(stored.get("costs")))
        knowledge.service = Service.from_json(fields(stored.get("service")))
        knowledge.arrivals = Arrivals.from_json(fields(stored.get("arrivals")), now, wall_offset_s)
        knowledge.caches = Caches.from_json(fields(stored.get("caches")))
        return knowledge
