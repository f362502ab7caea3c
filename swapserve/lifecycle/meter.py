"""Readings of one engine by the keeper, taken into its figures; what if there is none."""

import logging

from swapserve.errors import KeeperUnavailable, SwapServeError
from swapserve.keeper.protocol import Holding
from swapserve.lifecycle.figures import Figures
from swapserve.messages import Footprint
from swapserve.swap.moves import Mover
from swapserve.swap.plan import RESTING_WAYS, WayOut

log = logging.getLogger(__name__)


class Meter:
    """Every method raises KeeperUnavailable if the keeper is gone."""

    def __init__(self, engine: str, mover: Mover, figures: Figures) -> None:
        self._engine = engine
        self._mover = mover
        self._figures = figures

    async def reading(self) -> Footprint | None:
        """Return what it takes now, while it serves; None if nobody can tell."""
        try:
            return self._figures.measured(await self._mover.measure())
        except KeeperUnavailable:
            raise
        except SwapServeError as error:
            log.debug("event=not_measured engine=%s error=%s", self._engine, error)
            return None

    async def found_asleep(self, holding: Holding) -> Footprint | None:
        """Return what one that sleeps holds of its devices.

        None if it does not sleep, or nobody can tell: then it has to serve.
        """
        if not await self._mover.resting(holding):
            return None
        try:
            return self._figures.found_asleep(await self._mover.measure())
        except KeeperUnavailable:
            raise
        except SwapServeError as error:
            log.warning("event=not_measured engine=%s error=%s", self._engine, error)
            return None

    async def residue(self, way: WayOut) -> Footprint:
        """Return what it still holds of its devices after it left that way.

        Raises:
            SwapServeError: nobody can tell, so its memory must not be given to others.
        """
        if way not in RESTING_WAYS:
            return {}
        return self._figures.rested(way, await self._mover.measure())
