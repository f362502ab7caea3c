"""Leases: ask the scheduler for permission, hold it while a request runs, give it back once."""

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from swapserve.errors import SwapServeError
from swapserve.ids import EngineName, LeaseId
from swapserve.messages import Ask, Event, LeaseBegan, LeaseEnded, LeaseRequested, Used
from swapserve.states import LeaseState


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an engine can be reached now."""

    host: str
    port: int
    fresh_seed: bool = False
    """It was restored from a golden image, so its random state is a replay."""
    takes_seed: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every request, such as the engine's own key."""


class Lease:
    """Permission for one request on one engine; `Admission` alone changes it."""

    def __init__(self, lease: LeaseId, engine: EngineName, ask: Ask, requested_at: float) -> None:
        self.id = lease
        self.engine = engine
        self.ask = ask
        self.used: Used | None = None
        """What the request has taken; set by whoever has read its answer to the end."""
        self.state = LeaseState.WAITING
        self.suspensions = 0
        self.requested_at = requested_at
        self.granted_at: float | None = None
        self.suspended_at = requested_at
        self.lost: asyncio.Future[SwapServeError] = asyncio.get_running_loop().create_future()
        """Done when the scheduler has ended the lease (refused or lost), with the reason."""
        self._absences: list[tuple[float, float]] = []
        self._changed = asyncio.Event()

    def away(self, begin: float, end: float) -> bool:
        """Whether the engine was away, or on its way, at any time from `begin` to `end`."""
        return any(left <= end and back >= begin for left, back in self._absences)

    async def granted(self) -> None:
        """Return once the engine may be used; again after a suspension, when it is back.

        Raises:
            SwapServeError: the lease was refused or lost, and why.

        Cancellation: harmless; leaving the `lease` block gives the place in the queue back.
        """
        while self.state in {LeaseState.WAITING, LeaseState.SUSPENDED}:
            self._changed.clear()
            await self._changed.wait()
        if self.lost.done():
            raise self.lost.result()

    def suspend(self, now: float) -> None:
        """Note that the engine goes away."""
        self.suspensions += 1
        self.suspended_at = now
        self._absences.append((now, math.inf))
        self.move(LeaseState.SUSPENDED)

    def resume(self, now: float) -> None:
        """Note that the engine is back."""
        if self._absences:
            self._absences[-1] = (self._absences[-1][0], now)
        self.move(LeaseState.ACTIVE)

    def move(self, state: LeaseState) -> None:
        """Enter `state` and wake who waits for it."""
        self.state = state
        self._changed.set()

    def end(self, error: SwapServeError) -> None:
        """Record that the scheduler ended the lease."""
        if not self.lost.done():
            self.lost.set_result(error)
        self.move(LeaseState.ENDED)


class Admission:
    """Every open lease. The scheduler's runner calls the five methods named after its effects.

    They are synchronous, and ignore a lease that has ended meanwhile: an effect and the client's
    leaving may cross.
    """

    def __init__(
        self,
        *,
        post: Callable[[Event], None],
        place: Callable[[EngineName], Place],
        clock: Callable[[], float],
    ) -> None:
        self.place = place
        self._post = post
        self.clock = clock
        self._leases: dict[LeaseId, Lease] = {}
        self._numbers = itertools.count(1)

    @asynccontextmanager
    async def lease(self, engine: EngineName, ask: Ask) -> AsyncIterator[Lease]:
        """Queue for the engine; leaving the block, however that happens, ends the lease.

        Cancellation: the scheduler is told before the cancellation goes on.
        """
        lease = Lease(LeaseId(f"r{next(self._numbers)}"), engine, ask, self.clock())
        self._leases[lease.id] = lease
        self._post(LeaseRequested(lease=lease.id, engine=engine, ask=ask))
        try:
            yield lease
        finally:
            if self._leases.pop(lease.id, None) is not None:
                lease.move(LeaseState.ENDED)
                self._post(LeaseEnded(lease=lease.id, used=lease.used))

    def granted(self, lease: LeaseId) -> None:
        """Let the request go to its engine."""
        if (found := self._leases.get(lease)) is not None:
            found.granted_at = self.clock()
            found.move(LeaseState.ACTIVE)

    def began(self, lease: LeaseId) -> None:
        """Tell the scheduler that the first token of a stream has come."""
        if lease in self._leases:
            self._post(LeaseBegan(lease=lease))

    def suspended(self, lease: LeaseId) -> None:
        """Note that the engine goes away in mid-answer."""
        if (found := self._leases.get(lease)) is not None:
            found.suspend(self.clock())

    def resumed(self, lease: LeaseId) -> None:
        """Note that the engine is back."""
        if (found := self._leases.get(lease)) is not None:
            found.resume(self.clock())

    def refused(self, lease: LeaseId, error: SwapServeError) -> None:
        """End a waiting lease."""
        if (found := self._leases.pop(lease, None)) is not None:
            found.end(error)

    def lost(self, lease: LeaseId, error: SwapServeError) -> None:
        """End an active or suspended lease."""
        if (found := self._leases.pop(lease, None)) is not None:
            found.end(error)
