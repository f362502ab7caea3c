"""Where one engine stands: its state and tier, and the only place that changes them.

Every change is legal by the table, one event on the bus and one line in the log.
"""

import logging
from datetime import UTC, datetime

from swapserve.errors import IllegalTransition, SwapServeError
from swapserve.events import Bus, EngineChanged, Notice, SwapEnded
from swapserve.ids import EngineName
from swapserve.states import TRANSITIONS, EngineState, Tier
from swapserve.status import SwapSummary
from swapserve.swap.trace import Move

log = logging.getLogger(__name__)


class Standing:
    """State, tier, last swap and last error. Attributes are for reading by others."""

    def __init__(self, engine: EngineName, bus: Bus) -> None:
        self.state = EngineState.STOPPED
        self.tier = Tier.NONE
        self.since = _now()
        """Wall clock at which it came into this state."""
        self.last_swap: SwapSummary | None = None
        self.error: str | None = None
        self._engine = engine
        self._bus = bus

    def change(
        self, new: EngineState, tier: Tier | None, cause: str, *, check: bool = True
    ) -> None:
        """Go to another state or tier (None: it stays).

        Raises:
            IllegalTransition: the table has no such change (not asked with `check` False: what is
                found at the start need not follow from anything).
        """
        old, tier = self.state, tier or self.tier
        if old is new and tier is self.tier:
            return
        if check and old is not new and new not in TRANSITIONS[old]:
            raise IllegalTransition(self._engine, old, new, cause)
        self.state, self.tier, self.since = new, tier, _now()
        log.info(
            "event=engine_changed engine=%s from=%s to=%s tier=%s cause=%s",
            self._engine, old, new, tier, cause,
        )  # fmt: skip
        self._bus.publish(
            EngineChanged(
                at=self.since, engine=self._engine, old=old, new=new, tier=tier, cause=cause
            )
        )

    def moved(self, move: Move, to_tier: Tier, error: SwapServeError | None = None) -> None:
        """Tell of a finished move."""
        summary = self.last_swap = move.summary(to_tier, error)
        log.info(
            "event=swap_ended engine=%s kind=%s mechanism=%s seconds=%.3f bytes=%d error=%s",
            self._engine, summary.kind, summary.mechanism, summary.seconds, summary.bytes,
            error.code if error else "-",
        )  # fmt: skip
        if error is not None:  # its first line: the tools' own last words are in the status
            why = str(error).partition("\n")[0]
            log.warning("event=swap_failed engine=%s message=%s", self._engine, why)
        ended = SwapEnded(at=summary.finished_at, engine=self._engine, summary=summary)
        self._bus.publish(ended)

    def notice(self, message: str) -> None:
        """Tell operators something that changes no state."""
        log.warning("event=notice engine=%s message=%s", self._engine, message)
        self._bus.publish(Notice(at=_now(), engine=self._engine, message=message))


def _now() -> float:
    return datetime.now(UTC).timestamp()
