"""The one task that feeds the core and carries its effects out; it waits, it never polls."""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Protocol, assert_never

from swapserve.errors import ShuttingDown, SwapServeError
from swapserve.ids import CommandId, EngineName, LeaseId
from swapserve.messages import (
    BringIn,
    CommandDone,
    CommandGiven,
    Drain,
    Effect,
    Event,
    GrantLease,
    LoseLease,
    RefuseLease,
    ResumeLease,
    SetTimer,
    StopEngine,
    SuspendLease,
    SwapOut,
    Tick,
    Verb,
)
from swapserve.scheduler.core import Core


class EnginePort(Protocol):
    """Begins transitions; their outcome comes back through `Runner.post`. Nothing here blocks."""

    def bring_in(self, order: BringIn) -> None:
        """Restore the engine or cold start it, or restore it to host memory only."""

    def swap_out(self, order: SwapOut) -> None:
        """Move it off its devices, or further down."""

    def stop(self, engine: EngineName) -> None:
        """End its process."""

    def drain(self, engine: EngineName, on: bool) -> None:
        """Show it as draining, or as ready again."""


class LeasePort(Protocol):
    """Tells requests what became of their leases. Nothing here blocks."""

    def granted(self, lease: LeaseId) -> None:
        """It may go to its engine."""

    def refused(self, lease: LeaseId, error: SwapServeError) -> None:
        """It cannot be served; the lease is over."""

    def suspended(self, lease: LeaseId) -> None:
        """Its engine is going away in mid-answer."""

    def resumed(self, lease: LeaseId) -> None:
        """Its engine is back."""

    def lost(self, lease: LeaseId, error: SwapServeError) -> None:
        """It cannot continue; the lease is over."""


class Runner:
    """Inbox, clock and ports around a `Core`."""

    def __init__(
        self,
        core: Core,
        engines: EnginePort,
        leases: LeasePort,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = core
        self._engines = engines
        self._leases = leases
        self._clock = clock
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._timer: float | None = None
        self._numbers = itertools.count(1)
        self._outcomes: dict[CommandId, asyncio.Future[SwapServeError | None]] = {}
        self._closed = False

    def post(self, event: Event) -> None:
        """Hand an event over; from the loop's own thread only."""
        self._inbox.put_nowait(event)

    async def command(self, verb: Verb, engine: EngineName) -> None:
        """Give an operator's command and wait for its outcome.

        Cancelling the wait does not cancel the command.

        Raises:
            SwapServeError: the command could not be carried out.
        """
        if self._closed:
            raise ShuttingDown
        command = CommandId(f"command-{next(self._numbers)}")
        outcome = asyncio.get_running_loop().create_future()
        self._outcomes[command] = outcome
        self.post(CommandGiven(command=command, verb=verb, engine=engine))
        error = await outcome
        if error is not None:
            raise error

    async def run(self) -> None:
        """Handle events for ever. On cancellation commands under way end with ShuttingDown."""
        try:
            while True:
                event = await self._next()
                for effect in self.core.handle(event, self._clock()):
                    self._carry_out(effect)
        finally:
            self._closed = True
            for command in tuple(self._outcomes):
                self._answer(command, ShuttingDown())

    async def _next(self) -> Event:
        """Return the next event: a Tick when the timer has run out, whatever else waits."""
        if self._timer is None:
            return await self._inbox.get()
        left = self._timer - self._clock()
        if left > 0:
            if not self._inbox.empty():
                return self._inbox.get_nowait()
            try:
                async with asyncio.timeout(left):
                    return await self._inbox.get()
            except TimeoutError:
                if self._clock() < self._timer:  # the loop's clock may be coarser than ours
                    return await self._next()
        self._timer = None
        return Tick()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case GrantLease() | RefuseLease() | SuspendLease() | ResumeLease() | LoseLease():
                self._tell(effect)
            case BringIn():
                self._engines.bring_in(effect)
            case SwapOut():
                self._engines.swap_out(effect)
            case StopEngine():
                self._engines.stop(effect.engine)
            case Drain():
                self._engines.drain(effect.engine, effect.on)
            case CommandDone():
                self._answer(effect.command, effect.error)
            case SetTimer():
                self._timer = effect.at
            case _:
                assert_never(effect)

    def _tell(
        self, effect: GrantLease | RefuseLease | SuspendLease | ResumeLease | LoseLease
    ) -> None:
        match effect:
            case GrantLease():
                self._leases.granted(effect.lease)
            case RefuseLease():
                self._leases.refused(effect.lease, effect.error)
            case SuspendLease():
                self._leases.suspended(effect.lease)
            case ResumeLease():
                self._leases.resumed(effect.lease)
            case LoseLease():
                self._leases.lost(effect.lease, effect.error)
            case _:
                assert_never(effect)

    def _answer(self, command: CommandId, error: SwapServeError | None) -> None:
        outcome = self._outcomes.pop(command, None)
        if outcome is not None and not outcome.done():
            outcome.set_result(error)
