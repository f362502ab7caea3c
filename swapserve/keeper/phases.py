"""Seconds by phase of a keeper's verb, for its report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from swapserve.keeper.protocol import VerbReport


@dataclass(slots=True)
class Phases:
    """Seconds by phase of the verb under way."""

    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Account the block's time to a phase."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun

    def report(self, moved_bytes: int = 0) -> VerbReport:
        """Return the finished verb's report."""
        total = time.monotonic() - self.started
        return VerbReport(seconds=total, phases=dict(self.seconds), bytes=moved_bytes)
