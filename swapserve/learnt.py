"""What the scheduler has learnt, kept across the daemon's death: written now and then, not always.

Losing the last minutes of it costs little: it is learnt anew.
"""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path

from swapserve.events import BusEvent, SwapEnded
from swapserve.lifecycle.jsonfile import JsonFile
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.knowledge.stored import number

EVERY_S = 300.0
"""Shortest time between two saves: one of many engines takes a tenth of a second of everybody's."""


class Learnt:
    """The scheduler's knowledge and its file. `bus.listen(learnt.note)` keeps the file fresh."""

    def __init__(self, path: Path, *, every_s: float = EVERY_S) -> None:
        self.wall_offset_s = _wall() - time.monotonic()
        self.knowledge = Knowledge(self.wall_offset_s)
        self._file = JsonFile(path, "knowledge")
        self._every_s = every_s
        self._saved_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Read what an earlier daemon has learnt; what makes no sense is learnt anew.

        Raises:
            OSError: the directory cannot be made.
        """
        found = self._file.read()
        if not isinstance(found, dict):
            return
        saved_at = number(found.get("saved_at"))
        # Times are stored as seconds before the save, which was so long ago.
        away_s = 0.0 if saved_at is None else max(0.0, _wall() - saved_at)
        then = time.monotonic() - away_s
        self.knowledge = Knowledge.from_json(found.get("knowledge"), then, self.wall_offset_s)

    def note(self, event: BusEvent) -> None:
        """Save soon if something was learnt that is worth it: what a swap takes."""
        if not isinstance(event, SwapEnded) or self._timer is not None:
            return
        last = -self._every_s if self._saved_at is None else self._saved_at
        wait_s = max(0.0, last + self._every_s - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(wait_s, self.save)

    def save(self) -> None:
        """Write all of it now; a save that was to come is done with."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._saved_at = time.monotonic()
        self._file.write({"saved_at": _wall(), "knowledge": self.knowledge.as_json(now)})


def _wall() -> float:
    return datetime.now(UTC).timestamp()
