"""Where the seconds of a move went, and its summary for status, events and metrics."""

import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from swapserve.errors import SwapServeError
from swapserve.keeper.protocol import VerbReport
from swapserve.states import Tier
from swapserve.status import MoveKind, SwapSummary


@dataclass(slots=True)
class Trace:
    """Seconds by phase of the move under way; the keeper's phases are taken apart."""

    started: float = field(default_factory=time.monotonic)
    phases: dict[str, float] = field(default_factory=dict)
    bytes: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Account the block's time to a phase."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._add(name, time.monotonic() - begun)

    async def verb(self, name: str, work: Awaitable[VerbReport]) -> VerbReport:
        """Await a keeper's verb; its own phases and the rest of its time become phases here."""
        begun = time.monotonic()
        report = await work
        for phase, seconds in report.phases.items():
            self._add(phase if phase == name else f"{name}.{phase}", seconds)
        self._add(f"{name}.keeper", time.monotonic() - begun - sum(report.phases.values()))
        self.bytes += report.bytes
        return report

    def _add(self, name: str, seconds: float) -> None:
        self.phases[name] = self.phases.get(name, 0.0) + seconds

    @property
    def seconds(self) -> float:
        """Time since the move began."""
        return time.monotonic() - self.started

    @property
    def unaccounted_s(self) -> float:
        """Seconds that no phase explains."""
        return self.seconds - sum(self.phases.values())


@dataclass(slots=True)
class Move:
    """One transition under way."""

    kind: MoveKind
    mechanism: str
    from_tier: Tier
    cause: str
    trace: Trace = field(default_factory=Trace)

    def summary(self, to_tier: Tier, error: SwapServeError | None) -> SwapSummary:
        """Return the account of the finished move."""
        return SwapSummary(
            kind=self.kind,
            mechanism=self.mechanism,
            from_tier=self.from_tier,
            to_tier=to_tier,
            cause=self.cause,
            seconds=self.trace.seconds,
            phases=dict(self.trace.phases),
            unaccounted_s=self.trace.unaccounted_s,
            bytes=self.trace.bytes,
            finished_at=datetime.now(UTC).timestamp(),
            error=str(error) if error else None,
        )
