"""A daemon of the demonstration's own, in a directory of its own: started, found again, stopped."""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from swapserve.client.control import ControlClient
from swapserve.errors import SwapServeError
from swapserve.quickstart.screen import Screen
from swapserve.system.detached import spawn_detached

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 90.0
LOG_TAIL_LINES = 30
_POLL_S = 0.05


class QuickstartError(SwapServeError):
    """The demonstration cannot go on."""

    code = "quickstart_failed"


@dataclass(frozen=True, slots=True)
class Place:
    """Everything the demonstration writes, models apart, is below one directory."""

    root: Path

    @property
    def config(self) -> Path:
        """The configuration it makes."""
        return self.root / "swapserve.yaml"

    @property
    def log(self) -> Path:
        """What the daemon says."""
        return self.root / "daemon.log"

    @property
    def cold_starts(self) -> Path:
        """Seconds that each model's last cold start took, for runs that need none."""
        return self.root / "cold_starts.json"

    @property
    def run_dir(self) -> Path:
        """Sockets and the keeper's lock."""
        return self.root / "run"

    def url(self) -> str | None:
        """Return the address that the last daemon announced here."""
        try:
            said = json.loads((self.root / "state" / "daemon" / "endpoint.json").read_text())
        except (OSError, ValueError):
            return None
        return str(said["urls"][0])

    def keeper_pid(self) -> int | None:
        """Return the pid of the keeper that runs here, None if none does.

        It holds the lock on its file for as long as it lives, so the pid in there is its own.
        """
        try:
            with (self.run_dir / "keeper.lock").open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(lock.read() or 0) or None
        except OSError:
            return None
        return None


async def start(place: Place, screen: Screen) -> str:
    """Start a daemon and return its address.

    Raises:
        QuickstartError: it did not come up; has the end of its log.
    """
    place.log.unlink(missing_ok=True)
    (place.root / "state" / "daemon" / "endpoint.json").unlink(missing_ok=True)
    argv = [sys.executable, "-m", "swapserve", "--config", str(place.config), "serve"]
    child = spawn_detached(argv, log=place.log)
    deadline = time.monotonic() + START_TIMEOUT_S
    async with screen.watching(lambda: "starting keeper and daemon"):
        while child.poll() is None and time.monotonic() < deadline:
            if url := place.url():
                return url
            await asyncio.sleep(_POLL_S)
        if child.poll() is None:
            child.kill()
    raise QuickstartError(f"The daemon did not start. It said:\n{log_tail(place)}")


def log_tail(place: Place) -> str:
    """Return the last lines of the daemon's log."""
    with contextlib.suppress(OSError):
        return "\n".join(place.log.read_text().splitlines()[-LOG_TAIL_LINES:])
    return "(nothing)"


async def stop(place: Place) -> None:
    """End the daemon, the keeper and every engine that run here; returns when they are gone.

    Raises:
        QuickstartError: they did not end in time.
    """
    url = place.url()
    keeper = place.keeper_pid()
    if keeper is None:
        return
    if not await _asked_to_end(url):
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGTERM)
    await _until_gone(place, keeper)


async def _asked_to_end(url: str | None) -> bool:
    if url is None:
        return False
    try:
        with ControlClient(url) as control:
            await asyncio.to_thread(control.shutdown)
    except SwapServeError:
        return False
    return True


async def _until_gone(place: Place, keeper: int) -> None:
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            while place.keeper_pid() is not None:  # noqa: ASYNC110 - another process's lock
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise QuickstartError(
            f"The keeper (pid {keeper}) did not end within {STOP_TIMEOUT_S:.0f} s."
        ) from error
