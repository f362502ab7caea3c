"""How one engine leaves: its devices, or further down from there; or it ends for good."""

import logging
from dataclasses import replace

from swapserve.errors import (
    CriuError,
    EngineUnavailable,
    ImageError,
    KeeperUnavailable,
    SwapServeError,
)
from swapserve.keeper.protocol import Held
from swapserve.lifecycle.kit import Kit
from swapserve.lifecycle.orders import Order
from swapserve.messages import EngineLeft, Footprint
from swapserve.states import EngineState, Tier
from swapserve.swap.plan import KEEPS_CACHE, WayOut, tier_after, tier_failed, ways_out
from swapserve.swap.trace import Move, Trace

log = logging.getLogger(__name__)

_S = EngineState


class Leaving:
    """Carries out what takes an engine away. KeeperUnavailable goes through everywhere."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._name = kit.model.name

    async def swap_out(self, order: Order) -> None:
        """Take it off its devices, or further down, by the best way that works."""
        kit, standing = self._kit, self._kit.standing
        if standing.state is _S.FAILED:  # it ended while the order was on its way
            ended = EngineUnavailable(self._name, str(standing.error))
            kit.fail(ended, _S.FAILED, standing.tier, leases_lost=True)
            return
        standing.change(_S.SWAPPING_OUT, None, order.cause)
        from_tier = standing.tier
        ways = self._ways(order, from_tier)
        if not ways:
            move = Move("swap_out", "none", from_tier, order.cause)
            message = f"'{self._name}' has no room to go to with its requests."
            await self._failed(EngineUnavailable(self._name, message), move)
        for way in ways:
            move = Move("swap_out", way, from_tier, order.cause)
            try:
                await kit.mover.leave(way, move.trace)
                residue = await kit.meter.residue(way)
            except KeeperUnavailable:
                raise
            except SwapServeError as error:
                if isinstance(error, ImageError) and way != ways[-1]:
                    standing.notice(f"{error}; it leaves without")
                    continue
                kit.figures.failed(way, error)
                await self._failed(error, move)
            else:
                await self._went(way, order, move, residue)
            return

    def _ways(self, order: Order, from_tier: Tier) -> tuple[WayOut, ...]:
        kit = self._kit
        mechanism = kit.figures.mechanism(
            kit.known(),
            in_flight=order.in_flight,
            rests=from_tier is Tier.HOST,
            cache_s=order.cache_s,
        )
        return tuple(
            ways_out(
                kit.model,
                kit.known(),
                to=order.to,
                mechanism=mechanism,
                in_flight=order.in_flight,
                keep_cache=kit.figures.keeps_cache(order.cache_s),
            )
        )

    async def _went(self, way: WayOut, order: Order, move: Move, residue: Footprint) -> None:
        kit = self._kit
        ended = way in {"discard", "kill"}
        if ended:
            kit.tell.engine_gone()
        kit.figures.left(way, move.trace.seconds, rested=move.from_tier is Tier.HOST)
        tier = tier_after(way)
        in_ram = move.trace.bytes + kit.figures.kept_bytes if tier is Tier.HOST else 0
        kit.standing.change(_S.SWAPPED_OUT, tier, order.cause)
        kit.standing.moved(move, tier)
        left = EngineLeft(
            engine=self._name,
            tier=tier,
            seconds=move.trace.seconds,
            leases_lost=bool(order.in_flight) and ended,
            cache_kept=way in KEEPS_CACHE,
            host_bytes=in_ram,
            residue=residue,
        )
        await self._is_gone(left)

    async def _is_gone(self, left: EngineLeft) -> None:
        if left.tier is not Tier.HOST:  # until the keeper is asked again
            self._kit.holding = replace(self._kit.known(), pid=None)
        self._kit.tell.post(left)
        await self._kit.look()

    async def _failed(self, error: SwapServeError, move: Move) -> None:
        """Find out what a failed swap out left, and never guess that the memory is free."""
        kit = self._kit
        if move.from_tier is Tier.HOST:
            holding = await kit.look()
            if holding.held in {Held.SUSPENDED, Held.RUNNING}:  # it rests as before
                kit.fail(error, _S.SWAPPED_OUT, Tier.HOST, leases_lost=False)
                kit.standing.moved(move, Tier.HOST, error)
                return
        serves = await kit.mover.still_serves()
        tier = Tier.DEVICE if serves else await self._end()
        # A CRIU that was killed cannot put the connections back that it had locked.
        lost = not serves or (isinstance(error, CriuError) and error.killed)
        if lost:
            kit.tell.engine_gone()
        else:
            kit.tell.engine_back()
        kit.fail(error, _S.READY if serves else _S.FAILED, tier, leases_lost=lost)
        kit.standing.moved(move, tier, error)
        await kit.look()

    async def _end(self) -> Tier:
        """End what neither serves nor has left; return where it is now: it may not have ended."""
        try:
            await self._kit.mover.stop(Trace())
        except SwapServeError as error:
            if isinstance(error, KeeperUnavailable):
                raise
            log.warning("event=not_ended engine=%s error=%s", self._name, error)
        return tier_failed(await self._kit.look())

    async def stop(self, cause: str) -> None:
        """End it for good."""
        kit, standing = self._kit, self._kit.standing
        move = Move("stop", "kill", standing.tier, cause)
        standing.change(_S.STOPPING, None, cause)
        kit.tell.engine_gone()
        try:
            await kit.mover.stop(move.trace)
        except KeeperUnavailable:
            raise
        except SwapServeError as error:
            # It may still hold its memory: the tier stays what it was.
            kit.fail(error, _S.FAILED, standing.tier, leases_lost=True)
            standing.moved(move, standing.tier, error)
            return
        kit.figures.gone()
        standing.change(_S.STOPPED, Tier.NONE, cause)
        standing.moved(move, Tier.NONE)
        left = EngineLeft(
            engine=self._name, tier=Tier.NONE, seconds=move.trace.seconds, leases_lost=True
        )
        await self._is_gone(left)
