"""How one engine comes: onto its devices, way after way until one works, or into host memory."""

from dataclasses import replace

from swapserve.errors import (
    CanaryFailed,
    CudaError,
    ImageError,
    KeeperUnavailable,
    SwapServeError,
)
from swapserve.keeper.protocol import Held, Holding, ImageKind
from swapserve.lifecycle.kit import Kit
from swapserve.messages import EngineExited, EngineLeft, EngineReady
from swapserve.states import EngineState, Tier
from swapserve.swap.moves import nothing_tried
from swapserve.swap.plan import WayIn, tier_failed, tier_of_images, way_up, ways_in
from swapserve.swap.trace import Move

_S = EngineState


class Coming:
    """Carries out what brings an engine in. KeeperUnavailable goes through everywhere."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._name = kit.model.name

    async def bring_in(self, cause: str, *, began: bool = False) -> bool:
        """Bring it onto its devices; return whether it serves now.

        Args:
            cause: why.
            began: an earlier daemon has begun it.
        """
        kit, standing = self._kit, self._kit.standing
        from_tier, holding = standing.tier, kit.known()
        resting = from_tier is Tier.HOST
        for way in ways_in(kit.model, holding, resting=resting):
            if way == "golden" and not holding.golden:
                continue  # dropped, since what came from it answered wrongly
            cold = way in {"cold", "adopt"}
            move = Move("cold_start" if cold else "swap_in", way, from_tier, cause)
            if not (began and way == "adopt"):
                standing.change(_S.STARTING if cold else _S.SWAPPING_IN, None, cause)
            try:
                if way == "cold":  # whether it ends with a golden image depends on what is there
                    holding = await kit.look()
                await kit.mover.enter(way, holding, move.trace)
            except KeeperUnavailable:
                raise
            except SwapServeError as error:
                if not await self._goes_on(way, error, move):
                    return False
                holding = kit.known()
                cause = f"{way} failed"
                from_tier = Tier.DISK if holding.golden and way != "golden" else Tier.NONE
            else:
                await self._came(way, move)
                return True
        return False

    async def _goes_on(self, way: WayIn, error: SwapServeError, move: Move) -> bool:
        """Take in that a way failed; return whether the next one is to be tried."""
        if nothing_tried(error):
            await self._stays(error, move)
            return False
        self._kit.standing.moved(move, Tier.NONE, error)
        if way == "cold":
            await self._failed(error)
            return False
        # An image did not work: whoever was in it is told.
        self._kit.tell.post(EngineExited(engine=self._name, error=error))
        self._kit.tell.engine_gone()
        self._kit.figures.lost(way)
        await self._kit.mover.quarantine(way, error)
        if isinstance(error, CanaryFailed):  # of what came from the golden image, now dropped
            await self._kit.look()
        return True

    async def _stays(self, error: SwapServeError, move: Move) -> None:
        """Nothing was tried, since a GPU has no room or nobody could tell; it rests as before."""
        self._kit.fail(error, _S.SWAPPED_OUT, move.from_tier, leases_lost=False)
        self._kit.standing.moved(move, move.from_tier, error)
        await self._kit.look()

    async def _came(self, way: WayIn, move: Move) -> None:
        kit = self._kit
        if kit.figures.footprint is None:
            with move.trace.phase("measure"):
                await kit.meter.reading()  # if that fails it is charged what it was promised
        kit.figures.came(way, seconds := move.trace.seconds)
        if way == "cold":
            await kit.look()  # its address
        # Asking the keeper again would stand in the way of the first token; it is done below.
        kit.holding = _serving(kit.known(), way)
        kit.standing.error = None
        kit.tell.engine_back()
        kit.standing.change(_S.READY, Tier.DEVICE, move.cause)
        kit.standing.moved(move, Tier.DEVICE)
        kit.tell.post(
            EngineReady(engine=self._name, footprint=kit.figures.footprint or {}, seconds=seconds)
        )
        await kit.look()

    async def _failed(self, error: SwapServeError) -> None:
        self._kit.tell.engine_gone()
        self._kit.fail(error, _S.FAILED, tier_failed(await self._kit.look()), leases_lost=True)

    # ------------------------------------------------------------ to host memory

    async def promote(self, cause: str) -> None:
        """Bring its image to host memory and leave it suspended there, off its devices."""
        kit, standing = self._kit, self._kit.standing
        kind = way_up(kit.model, kit.known())
        move = Move("promote", kind or "none", standing.tier, cause)
        standing.change(_S.SWAPPING_IN, None, cause)
        try:
            if kind is None:
                raise ImageError(self._name, "promotion", "there is no image of its GPU state")
            await kit.mover.promote(kind, move.trace)
            holding = await kit.look()
            if holding.held is not Held.SUSPENDED:
                raise CudaError(self._name, "promotion", "it has ended meanwhile", lost=True)
        except KeeperUnavailable:
            raise
        except SwapServeError as error:
            if nothing_tried(error):
                await self._stays(error, move)
            else:
                await self._not_promoted(kind, error, move)
            return
        kit.figures.promoted()
        standing.error = None
        standing.change(_S.SWAPPED_OUT, Tier.HOST, cause)
        standing.moved(move, Tier.HOST)
        left = EngineLeft(
            engine=self._name,
            tier=Tier.HOST,
            seconds=move.trace.seconds,
            cache_kept=kind == "live",
            host_bytes=holding.host_bytes,
        )
        kit.tell.post(left)

    async def _not_promoted(
        self, kind: ImageKind | None, error: SwapServeError, move: Move
    ) -> None:
        """Find out what a failed promotion left. What was in a used up live image is lost."""
        kit = self._kit
        if kind is not None:
            kit.figures.lost(kind)
            await kit.mover.quarantine(kind, error)
        holding = await kit.look()
        stuck = holding.held in {Held.RUNNING, Held.SUSPENDED}
        lost = stuck or (kind == "live" and holding.held is not Held.LIVE_IMAGE)
        if lost:
            kit.tell.engine_gone()
        tier = tier_failed(holding) if stuck else tier_of_images(kit.model, holding)
        kit.fail(error, _S.FAILED if stuck else _S.SWAPPED_OUT, tier, leases_lost=lost)
        kit.standing.moved(move, tier, error)


def _serving(holding: Holding, way: WayIn) -> Holding:
    """Return what the keeper would say of an engine that has just come that way."""
    image: ImageKind | None = None
    match way:
        case "live" | "golden":
            image = way
        case "adopt" | "resume" | "wake":  # the same process as before
            image = holding.restored_from
        case "cold":
            pass
    return replace(holding, held=Held.RUNNING, restored_from=image, host_bytes=0)
