"""One task per engine: the only writer of its state.

It takes one order at a time from its inbox (bring in, swap out, stop, or news from the keeper),
carries it out with a `Mover`, and posts the outcome to the scheduler. Every change of state is one
event on the bus and one line in the log. An order runs to its end whoever gave it.
"""

import asyncio
import logging
from dataclasses import replace
from datetime import UTC, datetime

from swapserve.config.schema import ModelConfig
from swapserve.errors import (
    CriuError,
    IllegalTransition,
    ImageError,
    KeeperUnavailable,
    SwapServeError,
)
from swapserve.events import Bus, EngineChanged, Notice, RequestEnded, SwapEnded
from swapserve.keeper.protocol import Exited, Held, Holding, ImageKind
from swapserve.lifecycle.journal import Journal
from swapserve.lifecycle.orders import Callbacks, Measure, Order
from swapserve.messages import (
    EngineExited,
    EngineLeft,
    EngineReady,
    EngineSeen,
    FootprintMeasured,
    TransitionFailed,
)
from swapserve.states import TRANSITIONS, EngineState, Tier
from swapserve.status import SwapSummary
from swapserve.swap.cache import CacheValue
from swapserve.swap.moves import Mover
from swapserve.swap.plan import WayIn, WayOut, tier_after, ways_in, ways_out
from swapserve.swap.trace import Move, Trace

FIRST_MEASURE_S = 3.0
MEASURE_EVERY_S = 30.0
"""A resident engine is measured soon after it came in, then at this pace."""

log = logging.getLogger(__name__)

_S = EngineState


class EngineActor:
    """The life of one engine. Attributes are for reading by others; only the actor writes them."""

    def __init__(
        self,
        model: ModelConfig,
        mover: Mover,
        journal: Journal,
        bus: Bus,
        callbacks: Callbacks,
    ) -> None:
        self.model = model
        self.state = _S.STOPPED
        self.tier = Tier.NONE
        self.since = _now()
        self.holding: Holding | None = None
        self.last_swap: SwapSummary | None = None
        self.error: str | None = None
        self._mover = mover
        self._journal = journal
        self._bus = bus
        self._tell = callbacks
        self._cache = CacheValue()
        self._inbox: asyncio.Queue[Order | Exited | Measure] = asyncio.Queue()
        self._measure_timer: asyncio.TimerHandle | None = None

    # --------------------------------------------------- from other tasks

    def order(self, order: Order) -> None:
        """Hand in what the scheduler wants; carried out in its turn."""
        self._inbox.put_nowait(order)

    def drain(self, on: bool) -> None:
        """Show the engine as draining, or as ready again (unless it has just ended)."""
        if self.state not in {_S.READY, _S.DRAINING}:
            return
        self._change(_S.DRAINING if on else _S.READY, self.tier, "drain" if on else "drain ended")

    def exited(self, exited: Exited) -> None:
        """Take in the keeper's word that the process ended on its own."""
        self._mover.exited(exited)
        self._inbox.put_nowait(exited)

    def request_ended(self, event: RequestEnded) -> None:
        """Learn from a finished request what the engine's cache is worth.

        Only a stream's first byte tells the time of the prefill.
        """
        prefill_s = None
        if event.stream and event.ttft_s is not None and not event.suspensions:
            prefill_s = max(0.0, event.ttft_s - event.queue_s)
        self._cache.served(
            bytes_in=event.bytes_in,
            bytes_out=event.bytes_out,
            stream=event.stream,
            prefix=event.prefix,
            prefill_s=prefill_s,
        )

    @property
    def footprint_bytes(self) -> int | None:
        """Bytes it takes on its device: configured, else measured, None if unknown."""
        return self.model.memory_bytes or self._journal.footprint(self.model.name)

    # ------------------------------------------------------------ its task

    async def run(self) -> None:
        """Say where the engine is, then carry out orders for ever.

        Raises:
            KeeperUnavailable: the keeper is gone; engines stay, the daemon must end.
        """
        await self._recover()
        while True:
            item = await self._inbox.get()
            match item:
                case Order(what="bring_in"):
                    await self._bring_in(item.cause)
                case Order(what="swap_out"):
                    await self._swap_out(item)
                case Order():
                    await self._stop(item.cause)
                case Exited():
                    await self._ended(item)
                case Measure():
                    await self._measure()

    async def _recover(self) -> None:
        """Find out what there is, finish a start that an earlier daemon began, tell all."""
        holding = await self._look()
        if holding.held is Held.LIVE_IMAGE or (holding.golden and holding.held is Held.NOTHING):
            self._change(_S.SWAPPED_OUT, Tier.DISK, "recovered", check=False)
            self._seen()
            return
        if holding.held is Held.NOTHING:
            self._seen()
            return
        self._change(_S.STARTING, Tier.DEVICE, "recovered", check=False)
        self._seen()
        await self._bring_in("recovered", began=True)

    def _seen(self) -> None:
        self._tell.post(
            EngineSeen(
                engine=self.model.name,
                state=self.state,
                tier=self.tier,
                footprint_bytes=self.footprint_bytes,
                can_preempt=self._known().can_dump and Tier.DISK in self.model.tiers,
            )
        )

    # -------------------------------------------------------------- moves

    async def _bring_in(self, cause: str, *, began: bool = False) -> None:
        from_tier, holding = self.tier, self._known()
        for way in ways_in(self.model, holding):
            cold = way in {"cold", "adopt"}
            move = Move("cold_start" if cold else "swap_in", way, from_tier, cause)
            if not (began and way == "adopt"):
                self._change(_S.STARTING if cold else _S.SWAPPING_IN, self.tier, cause)
            try:
                if way == "cold":  # whether it ends with a golden image depends on what is there
                    holding = await self._look()
                await self._mover.enter(way, holding, move.trace)
            except KeeperUnavailable:
                raise
            except SwapServeError as error:
                self._ended_move(move, Tier.NONE, error)
                if way == "cold":
                    await self._failed_in(error)
                    return
                await self._way_failed(way, error)
                cause = f"{way} failed"
            else:
                await self._came(way, move)
                return

    async def _way_failed(self, way: WayIn, error: SwapServeError) -> None:
        """An image did not work: whoever was in it is told, then the next way is tried."""
        self._tell.post(EngineExited(engine=self.model.name, error=error))
        self._tell.engine_gone()
        await self._mover.quarantine(way, error)

    async def _came(self, way: WayIn, move: Move) -> None:
        if way in {"cold", "golden"}:
            self._cache.emptied()
        if self.footprint_bytes is None:
            with move.trace.phase("measure"):
                self._journal.measured(self.model.name, await self._mover.measure())
        # Asking the keeper again would stand in the way of the first token; it is done below.
        image: ImageKind | None = "golden" if way == "golden" else None
        image = "live" if way == "live" else image
        self.holding = replace(self._known(), held=Held.RUNNING, restored_from=image)
        self.error = None
        self._tell.engine_back()
        self._change(_S.READY, Tier.DEVICE, move.cause)
        self._ended_move(move, Tier.DEVICE)
        self._tell.post(
            EngineReady(
                engine=self.model.name,
                footprint_bytes=self.footprint_bytes or 0,
                seconds=move.trace.seconds,
            )
        )
        await self._look()
        self._measure_in(FIRST_MEASURE_S)

    async def _failed_in(self, error: SwapServeError) -> None:
        self._tell.engine_gone()
        self._fail(error, _S.FAILED, Tier.NONE, leases_lost=True)
        await self._look()

    async def _swap_out(self, order: Order) -> None:
        self._change(_S.SWAPPING_OUT, self.tier, order.cause)
        kept, known = self._keeps_cache(), self._known()
        ways = ways_out(self.model, known, in_flight=order.in_flight, keep_cache=kept)
        for way in ways:
            move = Move("swap_out", way, Tier.DEVICE, order.cause)
            try:
                await self._mover.leave(way, move.trace)
            except KeeperUnavailable:
                raise
            except SwapServeError as error:
                if isinstance(error, ImageError) and way != ways[-1]:
                    self.notice(f"{error}; it leaves without")
                    continue
                await self._failed_out(error, move)
            else:
                await self._went(way, order, move)
            return

    async def _went(self, way: WayOut, order: Order, move: Move) -> None:
        if way == "live":
            self._cache.dumped(move.trace.seconds)
        else:
            self._tell.engine_gone()
        tier = tier_after(way)
        self._change(_S.SWAPPED_OUT, tier, order.cause)
        self._ended_move(move, tier)
        self._left(tier, move, leases_lost=bool(order.in_flight) and way != "live")
        await self._look()

    def _left(self, tier: Tier, move: Move, *, leases_lost: bool) -> None:
        self.holding = replace(self._known(), pid=None)  # until the keeper is asked again
        self._tell.post(
            EngineLeft(
                engine=self.model.name,
                tier=tier,
                seconds=move.trace.seconds,
                leases_lost=leases_lost,
            )
        )

    def _keeps_cache(self) -> bool:
        if self.model.keep_cache == "never" or not self._cache.tokens:
            return False
        if self.model.keep_cache == "always":
            return True
        return self._cache.worth_keeping(self.footprint_bytes or 0)

    async def _failed_out(self, error: SwapServeError, move: Move) -> None:
        """Find out what a failed swap out left, and never guess that the memory is free."""
        serves = await self._mover.still_serves()
        if not serves:
            await self._mover.stop(Trace())
        # A CRIU that was killed cannot put the connections back that it had locked.
        lost = not serves or (isinstance(error, CriuError) and error.killed)
        if lost:
            self._tell.engine_gone()
        else:
            self._tell.engine_back()
        state, tier = (_S.READY, Tier.DEVICE) if serves else (_S.FAILED, Tier.NONE)
        self._fail(error, state, tier, leases_lost=lost)
        self._ended_move(move, tier, error)
        await self._look()

    def _fail(
        self, error: SwapServeError, state: EngineState, tier: Tier, *, leases_lost: bool
    ) -> None:
        self.error = str(error)
        self._change(state, tier, error.code)
        self._tell.post(
            TransitionFailed(
                engine=self.model.name,
                error=error,
                state=state,
                tier=tier,
                leases_lost=leases_lost,
            )
        )

    async def _stop(self, cause: str) -> None:
        move = Move("stop", "kill", self.tier, cause)
        self._change(_S.STOPPING, self.tier, cause)
        self._tell.engine_gone()
        try:
            await self._mover.stop(move.trace)
        except KeeperUnavailable:
            raise
        except SwapServeError as error:
            # It may still hold its memory: the tier stays what it was.
            self._fail(error, _S.FAILED, self.tier, leases_lost=True)
            self._ended_move(move, self.tier, error)
            return
        self._cache.emptied()
        self._change(_S.STOPPED, Tier.NONE, cause)
        self._ended_move(move, Tier.NONE)
        self._left(Tier.NONE, move, leases_lost=True)
        await self._look()

    async def _ended(self, exited: Exited) -> None:
        """The process ended on its own; a move under way has dealt with it already."""
        if self.state not in {_S.READY, _S.DRAINING}:
            return
        holding = await self._look()
        if holding.held is Held.RUNNING and holding.pid != exited.pid:
            return  # old news: it has come back since
        error = await self._mover.crashed(exited)
        self.error = f"{error}\n{error.log_tail}"
        self._tell.engine_gone()
        self._change(_S.FAILED, Tier.NONE, error.code)
        self._tell.post(EngineExited(engine=self.model.name, error=error))

    # ------------------------------------------------------------ helpers

    def _known(self) -> Holding:
        """Return what the keeper last said; each move looks again when it is over."""
        assert self.holding is not None
        return self.holding

    async def _look(self) -> Holding:
        self.holding = await self._mover.holding()
        return self.holding

    def _measure_in(self, seconds: float) -> None:
        if self._measure_timer is not None:
            self._measure_timer.cancel()
        loop = asyncio.get_running_loop()
        self._measure_timer = loop.call_later(seconds, self._inbox.put_nowait, Measure())

    async def _measure(self) -> None:
        if self.state not in {_S.READY, _S.DRAINING}:
            return
        try:
            footprint = await self._mover.measure()
        except KeeperUnavailable:
            raise
        except SwapServeError as error:
            log.debug("event=not_measured engine=%s error=%s", self.model.name, error)
        else:
            self._journal.measured(self.model.name, footprint)
            self._tell.post(FootprintMeasured(engine=self.model.name, footprint_bytes=footprint))
        self._measure_in(MEASURE_EVERY_S)

    def _change(self, new: EngineState, tier: Tier, cause: str, *, check: bool = True) -> None:
        old = self.state
        if old is new and tier is self.tier:
            return
        if check and old is not new and new not in TRANSITIONS[old]:
            raise IllegalTransition(self.model.name, old, new, cause)
        self.state, self.tier, self.since = new, tier, _now()
        log.info(
            "event=engine_changed engine=%s from=%s to=%s tier=%s cause=%s",
            self.model.name, old, new, tier, cause,
        )  # fmt: skip
        self._bus.publish(
            EngineChanged(
                at=self.since, engine=self.model.name, old=old, new=new, tier=tier, cause=cause
            )
        )

    def _ended_move(self, move: Move, to_tier: Tier, error: SwapServeError | None = None) -> None:
        summary = self.last_swap = move.summary(to_tier, error)
        log.info(
            "event=swap_ended engine=%s kind=%s mechanism=%s seconds=%.3f bytes=%d error=%s",
            self.model.name, summary.kind, summary.mechanism, summary.seconds, summary.bytes,
            error.code if error else "-",
        )  # fmt: skip
        ended = SwapEnded(at=summary.finished_at, engine=self.model.name, summary=summary)
        self._bus.publish(ended)

    def notice(self, message: str) -> None:
        """Tell operators something that changes no state."""
        log.warning("event=notice engine=%s message=%s", self.model.name, message)
        self._bus.publish(Notice(at=_now(), engine=self.model.name, message=message))


def _now() -> float:
    return datetime.now(UTC).timestamp()
