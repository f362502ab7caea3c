"""One small JSON file that may be lost: written by atomic rename, set aside if it is damaged."""

import json
import logging
from pathlib import Path

log = logging.getLogger(__name__)


class JsonFile:
    """What is kept at one path.

    Args:
        path: the file; its directory is made when it is first read.
        what: one word for the log.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._what = what

    def read(self) -> object | None:
        """Return what is there; None if there is nothing, or nothing that can be understood.

        Raises:
            OSError: the directory cannot be made.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return None
        try:
            found: object = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            self.set_aside(error)
            return None
        return found

    def set_aside(self, error: Exception) -> None:
        """Keep a file that makes no sense out of the way, for whoever wants to look at it."""
        aside = self._path.with_suffix(".unreadable")
        self._path.replace(aside)
        log.warning("event=%s_unreadable kept=%s error=%s", self._what, aside, error)

    def write(self, data: object) -> None:
        """Replace what is there. A full disk costs the memory, not the service."""
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(data), encoding="utf-8")
            temporary.rename(self._path)
        except OSError as error:
            log.warning("event=%s_not_written error=%s", self._what, error)
