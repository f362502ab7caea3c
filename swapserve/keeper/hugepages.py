"""Transparent huge pages for the time of a restore: host-wide, journalled, always put back.

Restoring an engine of some GB is bound by page faults; with huge pages it takes a third of the
time. The switch is the whole host's, so it is opt-in (`keeper.huge_pages`), held only while a
restore runs, and noted in a file first: a keeper that finds the note at its start puts back what
it says.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")

log = logging.getLogger(__name__)


class HugePages:
    """The switch, counted: on while any restore runs."""

    def __init__(self, journal: Path, *, wanted: bool, switch: Path = SWITCH) -> None:
        self._journal = journal
        self._wanted = wanted
        self._switch = switch
        self._users = 0

    def recover(self) -> None:
        """Put back what a killed keeper left switched."""
        if self._journal.exists():
            self._put_back()

    @contextmanager
    def during_restore(self) -> Iterator[None]:
        """Hold the switch at `always`; does nothing if that is not wanted or not possible."""
        if not self._wanted:
            yield
            return
        self._users += 1
        if self._users == 1:
            self._switch_on()
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0 and self._journal.exists():
                self._put_back()

    def _switch_on(self) -> None:
        try:
            now = self._switch.read_text().split("[")[1].split("]")[0]
            if now != "always":
                self._journal.write_text(now)
                self._switch.write_text("always")
        except (OSError, IndexError) as error:
            log.warning("event=huge_pages_off error=%s", error)
            self._journal.unlink(missing_ok=True)

    def _put_back(self) -> None:
        try:
            self._switch.write_text(self._journal.read_text())
        except OSError:
            log.exception("event=huge_pages_not_put_back journal=%s", self._journal)
            return
        self._journal.unlink(missing_ok=True)
