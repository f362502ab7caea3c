"""Requests that arrive and work, and engines that take their time to come and go."""

import heapq
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from swapserve.ids import EngineName, LeaseId
from swapserve.messages import Ask, Used
from swapserve.scheduler.knowledge import Knowledge
from swapserve.states import LeaseState, Priority, Tier
from tests.stateful.world import World

L = LeaseState
ITL_S, PREFILL_S = 0.05, 0.05


class Arrival(NamedTuple):
    """A request: when it comes, for whom, and the seconds of work that it is."""

    time: float
    name: str
    seconds: float
    priority: Priority = Priority.INTERACTIVE


class Traffic:
    """Runs a world to its end, and remembers the longest wait.

    Args:
        world: whose engines are to be asked.
        arrivals: the requests.
        swap: what each move of an engine takes, in seconds.
        said: what each move is reported to have taken; None: what it took.
    """

    def __init__(
        self, world: World, arrivals: Iterable[Arrival], swap: float, said: float | None = None
    ) -> None:
        self.world = world
        self.swap = swap
        self.said = swap if said is None else said
        self.worst = 0.0
        """Longest wait for the engine, from an arrival or a suspension on."""
        self._queued: dict[LeaseId, float] = {}
        self.work: dict[LeaseId, float] = {}
        self._whole: dict[LeaseId, float] = {}
        self._priorities: dict[str, Priority] = {}
        self._agenda: list[tuple[float, int, str, str, float]] = []
        self._begun: dict[LeaseId, float] = {}
        self._moving: set[str] = set()
        self._numbers = itertools.count()
        for arrival in arrivals:
            lease = f"{arrival.name}-{next(self._numbers)}"
            self._priorities[lease] = arrival.priority
            self._at(world.now + arrival.time, "new", lease, arrival.seconds)

    def _at(self, time: float, what: str, key: str, seconds: float = 0.0) -> None:
        heapq.heappush(self._agenda, (time, next(self._numbers), what, key, seconds))

    def longest_wait(self) -> float:
        """Run everything to its end; return the longest wait in seconds."""
        world = self.world
        while self._agenda or (world.live and world.timer is not None):
            if world.timer is not None and (not self._agenda or world.timer < self._agenda[0][0]):
                world.ring()
            else:
                world.now, _, what, key, seconds = heapq.heappop(self._agenda)
                self._happen(what, key, seconds)
            self._look()
        assert not world.live
        return self.worst

    def waits(self, priority: Priority) -> list[float]:
        """Return how long each request of that priority waited, from its arrival on, in seconds."""
        return [
            seconds
            for lease, seconds in self._queued.items()
            if self._priorities[lease] is priority
        ]

    def _happen(self, what: str, key: str, seconds: float) -> None:
        if what == "new":
            lease = LeaseId(key)
            self.work[lease] = self._whole[lease] = seconds
            self.world.request_as(lease, key.partition("-")[0], Ask(priority=self._priorities[key]))
        elif what == "move":
            self._moving.remove(key)
            self.world.succeed(key, seconds=self.said)
        else:
            self._finish(LeaseId(key))

    def _finish(self, lease: LeaseId) -> None:
        # Suspended and resumed since: then a later end of its own is on the agenda.
        begun = self._begun.get(lease)
        if begun is not None and begun + self.work[lease] <= self.world.now + 1e-6:
            del self._begun[lease]
            whole = self._whole[lease]
            used = Used(
                tokens_in=1.0, tokens_out=whole / ITL_S, prefill_s=PREFILL_S, decode_s=whole
            )
            self.world.end(lease, used)

    def _look(self) -> None:
        now = self.world.now
        for name in self.world.pending:
            if name not in self._moving:
                self._moving.add(name)
                self._at(now + self.swap, "move", name)
        for lease in self.world.live:
            record = self.world.leases[lease]
            if record.state is L.WAITING:
                self._queued[lease] = now - record.since
            if record.state is not L.ACTIVE:
                self.work[lease] -= now - self._begun.pop(lease, now)
                self.worst = max(self.worst, now - record.since)
            elif lease not in self._begun:
                self._begun[lease] = now
                self._at(now + self.work[lease], "done", lease)


def taught(names: Iterable[str], swap: float) -> Knowledge:
    """Return knowledge of what swaps take, the same for all engines and tiers."""
    knowledge = Knowledge()
    for name, tier, busy in itertools.product(
        map(EngineName, names), (Tier.HOST, Tier.DISK, Tier.NONE), (False, True)
    ):
        knowledge.costs.left(name, tier, swap, busy=busy)
        knowledge.costs.came(name, tier, swap, busy=busy)
    return knowledge
