"""What the moves of one engine share: its tools, its figures, and the keeper's last word on it."""

from swapserve.config.schema import ModelConfig
from swapserve.errors import SwapServeError
from swapserve.keeper.protocol import Holding
from swapserve.lifecycle.figures import Figures
from swapserve.lifecycle.meter import Meter
from swapserve.lifecycle.orders import Callbacks
from swapserve.lifecycle.standing import Standing
from swapserve.messages import TransitionFailed
from swapserve.states import EngineState, Tier
from swapserve.swap.moves import Mover


class Kit:
    """Of one engine; used by its actor alone."""

    def __init__(
        self,
        model: ModelConfig,
        mover: Mover,
        figures: Figures,
        standing: Standing,
        callbacks: Callbacks,
    ) -> None:
        self.model = model
        self.mover = mover
        self.figures = figures
        self.meter = Meter(model.name, mover, figures)
        self.standing = standing
        self.tell = callbacks
        self.holding: Holding | None = None
        """What the keeper last said; each move looks again when it is over."""

    def known(self) -> Holding:
        """Return what the keeper last said; it has been asked."""
        assert self.holding is not None
        return self.holding

    async def look(self) -> Holding:
        """Ask the keeper what there is of the engine.

        Raises:
            KeeperUnavailable: it is gone.
        """
        self.holding = await self.mover.holding()
        return self.holding

    def fail(
        self, error: SwapServeError, state: EngineState, tier: Tier, *, leases_lost: bool
    ) -> None:
        """Tell of a move that ended badly, and where the engine is now."""
        self.standing.error = str(error)
        self.standing.change(state, tier, error.code)
        self.tell.post(
            TransitionFailed(
                engine=self.model.name, error=error, state=state, tier=tier, leases_lost=leases_lost
            )
        )
