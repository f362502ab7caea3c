"""Start a program that outlives us: own session, no terminal, output to a log."""

import subprocess
from collections.abc import Sequence
from pathlib import Path


def spawn_detached(argv: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
    """Start it; the caller may `poll` for an early end.

    Raises:
        OSError: it cannot be executed or the log not be opened.
    """
    with log.open("ab") as out:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            cwd="/",
        )
