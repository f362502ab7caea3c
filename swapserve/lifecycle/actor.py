"""One task per engine: the only writer of its state.

It takes one order at a time from its inbox (bring in, swap out, stop, or news from the keeper),
carries it out (`coming`, `leaving`), and posts the outcome to the scheduler. Every change of state
is one event on the bus and one line in the log. An order runs to its end whoever gave it.
"""

import asyncio
import logging

from swapserve.config.schema import ModelConfig
from swapserve.keeper.protocol import Exited, Held, Holding
from swapserve.lifecycle.coming import Coming
from swapserve.lifecycle.figures import Figures
from swapserve.lifecycle.kit import Kit
from swapserve.lifecycle.leaving import Leaving
from swapserve.lifecycle.orders import Callbacks, Measure, Order
from swapserve.lifecycle.standing import Standing
from swapserve.messages import EngineExited, EngineSeen, Footprint, FootprintMeasured
from swapserve.states import EngineState, Tier
from swapserve.swap.moves import Mover
from swapserve.swap.plan import survives, to_disk

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
        self.figures = figures
        self._kit = Kit(model, mover, figures, standing, callbacks)
        self._coming = Coming(self._kit)
        self._leaving = Leaving(self._kit)
        self._mover = mover
        self._tell = callbacks
        self._inbox: asyncio.Queue[Order | Exited | Measure] = asyncio.Queue()
        self._measure_timer: asyncio.TimerHandle | None = None

    @property
    def holding(self) -> Holding | None:
        """What the keeper last said of it; None before it was asked."""
        return self._kit.holding

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

    def served(self) -> None:
        """Take in that a request was answered to its end: there is something in its cache."""
        self.figures.served()

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
                case Order(what="bring_in", to=Tier.HOST):
                    await self._coming.promote(item.cause)
                case Order(what="bring_in"):
                    await self._bring_in(item.cause)
                case Order(what="swap_out"):
                    await self._leaving.swap_out(item)
                case Order():
                    await self._leaving.stop(item.cause)
                case Exited():
                    await self._ended(item)
                case Measure():
                    await self._measure()

    async def _recover(self) -> None:
        """Find out what there is, finish a start that an earlier daemon began, tell all."""
        holding = await self._kit.look()
        if holding.held in {Held.LIVE_IMAGE, Held.NOTHING}:
            if holding.golden or holding.held is Held.LIVE_IMAGE:
                self.standing.change(_S.SWAPPED_OUT, Tier.DISK, "recovered", check=False)
            self._seen()
            return
        left = await self._kit.meter.found_asleep(holding)
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
                can_preempt=survives(self.model, self._kit.known()),
                can_dump=to_disk(self.model, self._kit.known()),
                host_bytes=self.host_bytes,
                residue=residue or {},
            )
        )

    async def _bring_in(self, cause: str, *, began: bool = False) -> None:
        if await self._coming.bring_in(cause, began=began):
            self._measure_in(FIRST_MEASURE_S)

    async def _ended(self, exited: Exited) -> None:
        """The process ended on its own; a move under way has dealt with it already."""
        at_rest = self.standing.state is _S.SWAPPED_OUT and self.standing.tier is Tier.HOST
        if self.standing.state not in {_S.READY, _S.DRAINING} and not at_rest:
            return
        if (await self._kit.look()).pid not in {None, exited.pid}:
            return  # old news: it has come back since
        error = await self._mover.crashed(exited)
        self.figures.gone()
        self.standing.error = f"{error}\n{error.log_tail}"
        self._tell.engine_gone()
        self.standing.change(_S.FAILED, Tier.NONE, error.code)
        self._tell.post(EngineExited(engine=self.model.name, error=error))

    def _measure_in(self, seconds: float) -> None:
        if self._measure_timer is not None:
            self._measure_timer.cancel()
        loop = asyncio.get_running_loop()
        self._measure_timer = loop.call_later(seconds, self._inbox.put_nowait, Measure())

    async def _measure(self) -> None:
        if self.standing.state not in {_S.READY, _S.DRAINING}:
            return
        if (footprint := await self._kit.meter.reading()) is not None:
            self._tell.post(FootprintMeasured(engine=self.model.name, footprint=footprint))
        self._measure_in(MEASURE_EVERY_S)
