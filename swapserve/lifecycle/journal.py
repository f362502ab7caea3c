"""What the daemon remembers across its own death: measured footprints and operators' pins.

What there is of each engine is not here: that the keeper knows. Written by atomic rename.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Content:
    footprints: dict[str, int] = field(default_factory=dict)
    pins: dict[str, bool] = field(default_factory=dict)


class Journal:
    """One small JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = _Content()

    def open(self) -> None:
        """Read what is there; a file that cannot be understood is set aside, not lost.

        Raises:
            OSError: the directory cannot be made.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return
        try:
            self._content = _Content(**json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            aside = self._path.with_suffix(".unreadable")
            self._path.replace(aside)
            log.warning("event=journal_unreadable kept=%s error=%s", aside, error)

    def footprint(self, engine: str) -> int | None:
        """Return the bytes last measured of an engine on its device."""
        return self._content.footprints.get(engine)

    def measured(self, engine: str, footprint_bytes: int) -> None:
        """Remember a measurement that differs by more than a tenth from the last one."""
        old = self._content.footprints.get(engine)
        if old is not None and abs(footprint_bytes - old) * 10 < old:
            return
        self._content.footprints[engine] = footprint_bytes
        self._save()

    def pinned(self, engine: str) -> bool | None:
        """Return an operator's last word on pinning the engine, None if there was none."""
        return self._content.pins.get(engine)

    def pin(self, engine: str, pinned: bool) -> None:
        """Remember an operator's word."""
        self._content.pins[engine] = pinned
        self._save()

    def _save(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(asdict(self._content)))
            temporary.rename(self._path)
        except OSError as error:  # a full disk costs the memory, not the service
            log.warning("event=journal_not_written error=%s", error)
