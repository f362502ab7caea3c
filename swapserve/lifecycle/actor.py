"""One task per engine: the only writer of its state.

It takes one order at a time from its inbox (bring in, swap out, stop, or news from the keeper),
carries it out with a `Mover`, and posts the outcome to the scheduler. Every change of state is one
event on the bus and one line in the log. An order runs to its end whoever gave it.
"""

import asyncio
import logging
from dataclasses import replace

from swapserve.config.schema import ModelConfig
from swapserve.errors import (
    CriuError,
    EngineUnavailable,
    ImageError,
    KeeperUnavailable,
    SwapServeError,
)
from swapserve.events import RequestEnded
from swapserve.keeper.protocol import Exited, Held, Holding, ImageKind
from swapserve.lifecycle.figures import Figures
from swapserve.lifecycle.meter import Meter
from swapserve.lifecycle.orders import Callbacks, Measure, Order
from swapserve.lifecycle.standing import Standing
from swapserve.messages import (
    EngineExited,
    EngineLeft,
    EngineReady,
    EngineSeen,
    Footprint,
    FootprintMeasured,
    TransitionFailed,
)
from swapserve.states import EngineState, Tier
from swapserve.swap.moves import Mover, nothing_tried
from swapserve.swap.plan import (
    WayIn,
    WayOut,
    survives,
    tier_after,
    tier_failed,
    to_disk,
    ways_in,
    ways_out,
)
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
        figures: Figures,
        standing: Standing,
        callbacks: Callbacks,
    ) -> None:
        self.model = model
        self.standing = standing
        self.holding: Holding | None = None
        self._mover = mover
        self.figures = figures
        self._meter = Meter(model.name, mover, figures)
        self._tell = callbacks
        self._inbox: asyncio.Queue[Order | Exited | Measure] = asyncio.Queue()
        self._measure_timer: asyncio.TimerHandle | None = None

    @property
    def host_bytes(self) -> int:
        """GPU state that rests in host memory now, moved there by the driver or by itself."""
        return (self.holding.host_bytes if self.holding else 0) + self.figures.kept_bytes

    # --------------------------------------------------- from other tasks

    def order(self, order: Order) -> None:
        """Hand in what the scheduler wants; carried out in its turn."""
        self._inbox.put_nowait(order)

    def drain(self, on: bool) -> None:
        """Show the engine as draining, or as ready again (unless it has just ended)."""
        if self.standing.state not in {_S.READY, _S.DRAINING}:
            return
        self.standing.change(
            _S.DRAINING if on else _S.READY, None, "drain" if on else "drain ended"
        )

    def exited(self, exited: Exited) -> None:
        """Take in the keeper's word that the process ended on its own."""
        self._mover.exited(exited)
        self._inbox.put_nowait(exited)

    def request_ended(self, event: RequestEnded) -> None:
        """Learn from a finished request what the engine's cache is worth."""
        self.figures.served(event)

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
        if holding.held in {Held.LIVE_IMAGE, Held.NOTHING}:
            if holding.golden or holding.held is Held.LIVE_IMAGE:
                self.standing.change(_S.SWAPPED_OUT, Tier.DISK, "recovered", check=False)
            self._seen()
            return
        left = await self._meter.found_asleep(holding)
        if holding.held is Held.SUSPENDED or left is not None:
            self.standing.change(_S.SWAPPED_OUT, Tier.HOST, "recovered", check=False)
            self._seen(residue=left)
            return
        self.standing.change(_S.STARTING, Tier.DEVICE, "recovered", check=False)
        self._seen()
        await self._bring_in("recovered", began=True)

    def _seen(self, residue: Footprint | None = None) -> None:
        self._tell.post(
            EngineSeen(
                engine=self.model.name,
                state=self.standing.state,
                tier=self.standing.tier,
                footprint=self.figures.footprint,
                can_preempt=survives(self.model, self._known()),
                can_dump=to_disk(self.model, self._known()),
                host_bytes=self.host_bytes,
                residue=residue or {},
            )
        )

    # -------------------------------------------------------------- moves

    async def _bring_in(self, cause: str, *, began: bool = False) -> None:
        from_tier, holding = self.standing.tier, self._known()
        resting = from_tier is Tier.HOST
        for way in ways_in(self.model, holding, resting=resting):
            cold = way in {"cold", "adopt"}
            move = Move("cold_start" if cold else "swap_in", way, from_tier, cause)
            if not (began and way == "adopt"):
                self.standing.change(_S.STARTING if cold else _S.SWAPPING_IN, None, cause)
            try:
                if way == "cold":  # whether it ends with a golden image depends on what is there
                    holding = await self._look()
                await self._mover.enter(way, holding, move.trace)
            except KeeperUnavailable:
                raise
            except SwapServeError as error:
                if nothing_tried(error):
                    await self._stays(error, move)
                    return
                self.standing.moved(move, Tier.NONE, error)
                if way == "cold":
                    await self._failed_in(error)
                    return
                await self._way_failed(way, error)
                cause = f"{way} failed"
                from_tier = Tier.DISK if holding.golden and way != "golden" else Tier.NONE
            else:
                await self._came(way, move)
                return

    async def _stays(self, error: SwapServeError, move: Move) -> None:
        """Nothing was tried, since a GPU has no room or nobody could tell; it rests as before."""
        self._fail(error, _S.SWAPPED_OUT, move.from_tier, leases_lost=False)
        self.standing.moved(move, move.from_tier, error)
        await self._look()

    async def _way_failed(self, way: WayIn, error: SwapServeError) -> None:
        """An image did not work: whoever was in it is told, then the next way is tried."""
        self._tell.post(EngineExited(engine=self.model.name, error=error))
        self._tell.engine_gone()
        self.figures.lost(way)
        await self._mover.quarantine(way, error)

    async def _came(self, way: WayIn, move: Move) -> None:
        if self.figures.footprint is None:
            with move.trace.phase("measure"):
                await self._meter.reading()  # if that fails it is charged what it was promised
        self.figures.came(way, seconds := move.trace.seconds)
        if way == "cold":
            await self._look()  # its address
        # Asking the keeper again would stand in the way of the first token; it is done below.
        image: ImageKind | None = None
        match way:
            case "live" | "golden":
                image = way
            case "adopt" | "resume" | "wake":  # the same process as before
                image = self._known().restored_from
            case "cold":
                pass
        self.holding = replace(self._known(), held=Held.RUNNING, restored_from=image, host_bytes=0)
        self.standing.error = None
        self._tell.engine_back()
        self.standing.change(_S.READY, Tier.DEVICE, move.cause)
        self.standing.moved(move, Tier.DEVICE)
        self._tell.post(
            EngineReady(
                engine=self.model.name, footprint=self.figures.footprint or {}, seconds=seconds
            )
        )
        await self._look()
        self._measure_in(FIRST_MEASURE_S)

    async def _failed_in(self, error: SwapServeError) -> None:
        self._tell.engine_gone()
        self._fail(error, _S.FAILED, tier_failed(await self._look()), leases_lost=True)

    async def _swap_out(self, order: Order) -> None:
        if self.standing.state is _S.FAILED:  # it ended while the order was on its way
            ended = EngineUnavailable(self.model.name, str(self.standing.error))
            self._fail(ended, _S.FAILED, self.standing.tier, leases_lost=True)
            return
        self.standing.change(_S.SWAPPING_OUT, None, order.cause)
        from_tier, known = self.standing.tier, self._known()
        ways = ways_out(
            self.model,
            known,
            to=order.to,
            mechanism=self.figures.mechanism(
                known, in_flight=order.in_flight, rests=from_tier is Tier.HOST
            ),
            in_flight=order.in_flight,
            keep_cache=self.figures.keeps_cache(),
        )
        if not ways:
            move = Move("swap_out", "none", from_tier, order.cause)
            message = f"'{self.model.name}' has no room to go to with its requests."
            await self._failed_out(EngineUnavailable(self.model.name, message), move)
        for way in ways:
            move = Move("swap_out", way, from_tier, order.cause)
            try:
                await self._mover.leave(way, move.trace)
                residue = await self._meter.residue(way)
            except KeeperUnavailable:
                raise
            except SwapServeError as error:
                if isinstance(error, ImageError) and way != ways[-1]:
                    self.standing.notice(f"{error}; it leaves without")
                    continue
                self.figures.failed(way, error)
                await self._failed_out(error, move)
            else:
                await self._went(way, order, move, residue)
            return

    async def _went(self, way: WayOut, order: Order, move: Move, residue: Footprint) -> None:
        ended = way in {"discard", "kill"}
        if ended:
            self._tell.engine_gone()
        self.figures.left(way, move.trace.seconds, rested=move.from_tier is Tier.HOST)
        tier = tier_after(way)
        in_ram = move.trace.bytes + self.figures.kept_bytes if tier is Tier.HOST else 0
        self.standing.change(_S.SWAPPED_OUT, tier, order.cause)
        self.standing.moved(move, tier)
        left = EngineLeft(
            engine=self.model.name,
            tier=tier,
            seconds=move.trace.seconds,
            leases_lost=bool(order.in_flight) and ended,
            host_bytes=in_ram,
            residue=residue,
        )
        await self._is_gone(left)

    async def _is_gone(self, left: EngineLeft) -> None:
        if left.tier is not Tier.HOST:  # until the keeper is asked again
            self.holding = replace(self._known(), pid=None)
        self._tell.post(left)
        await self._look()

    async def _failed_out(self, error: SwapServeError, move: Move) -> None:
        """Find out what a failed swap out left, and never guess that the memory is free."""
        if move.from_tier is Tier.HOST:
            holding = await self._look()
            if holding.held in {Held.SUSPENDED, Held.RUNNING}:  # it rests as before
                self._fail(error, _S.SWAPPED_OUT, Tier.HOST, leases_lost=False)
                self.standing.moved(move, Tier.HOST, error)
                return
        serves = await self._mover.still_serves()
        tier = Tier.DEVICE if serves else await self._end()
        # A CRIU that was killed cannot put the connections back that it had locked.
        lost = not serves or (isinstance(error, CriuError) and error.killed)
        if lost:
            self._tell.engine_gone()
        else:
            self._tell.engine_back()
        self._fail(error, _S.READY if serves else _S.FAILED, tier, leases_lost=lost)
        self.standing.moved(move, tier, error)
        await self._look()

    async def _end(self) -> Tier:
        """End what neither serves nor has left; return where it is now: it may not have ended."""
        try:
            await self._mover.stop(Trace())
        except SwapServeError as error:
            if isinstance(error, KeeperUnavailable):
                raise
            log.warning("event=not_ended engine=%s error=%s", self.model.name, error)
        return tier_failed(await self._look())

    def _fail(
        self, error: SwapServeError, state: EngineState, tier: Tier, *, leases_lost: bool
    ) -> None:
        self.standing.error = str(error)
        self.standing.change(state, tier, error.code)
        self._tell.post(
            TransitionFailed(
                engine=self.model.name, error=error, state=state, tier=tier, leases_lost=leases_lost
            )
        )

    async def _stop(self, cause: str) -> None:
        move = Move("stop", "kill", self.standing.tier, cause)
        self.standing.change(_S.STOPPING, None, cause)
        self._tell.engine_gone()
        try:
            await self._mover.stop(move.trace)
        except KeeperUnavailable:
            raise
        except SwapServeError as error:
            # It may still hold its memory: the tier stays what it was.
            self._fail(error, _S.FAILED, self.standing.tier, leases_lost=True)
            self.standing.moved(move, self.standing.tier, error)
            return
        self.figures.gone()
        self.standing.change(_S.STOPPED, Tier.NONE, cause)
        self.standing.moved(move, Tier.NONE)
        await self._is_gone(
            EngineLeft(
                engine=self.model.name, tier=Tier.NONE, seconds=move.trace.seconds, leases_lost=True
            )
        )

    async def _ended(self, exited: Exited) -> None:
        """The process ended on its own; a move under way has dealt with it already."""
        at_rest = self.standing.state is _S.SWAPPED_OUT and self.standing.tier is Tier.HOST
        if self.standing.state not in {_S.READY, _S.DRAINING} and not at_rest:
            return
        if (await self._look()).pid not in {None, exited.pid}:
            return  # old news: it has come back since
        error = await self._mover.crashed(exited)
        self.figures.gone()
        self.standing.error = f"{error}\n{error.log_tail}"
        self._tell.engine_gone()
        self.standing.change(_S.FAILED, Tier.NONE, error.code)
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
        if self.standing.state not in {_S.READY, _S.DRAINING}:
            return
        if (footprint := await self._meter.reading()) is not None:
            self._tell.post(FootprintMeasured(engine=self.model.name, footprint=footprint))
        self._measure_in(MEASURE_EVERY_S)
