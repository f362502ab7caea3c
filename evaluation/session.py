"""A daemon of our own in a directory of its own, and its end without a trace."""

import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from evaluation.engines import EngineKind, Missing, entries, python_command
from swapserve.client.control import ControlClient, DaemonUnreachable
from swapserve.config.load import load
from swapserve.config.schema import Config
from swapserve.keeper.context import Context
from swapserve.status import EngineStatus, SwapSummary
from swapserve.system.detached import spawn_detached
from swapserve.system.process import ProcessRef

SUBNET = "10.233.0.0/16"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 60.0
ORPHAN_S = 2.0
"""A keeper that was just being started has its lock file by then."""
POLL_S = 0.02
LOG_LINES = 20

HugePages = Literal["off", "on"]


class Place:
    """Directories and configurations of one run, one configuration per huge page setting."""

    def __init__(
        self, directory: Path, run_dir: Path, kinds: Sequence[EngineKind], *, size: str
    ) -> None:
        self.directory = directory
        self._run_dir = run_dir
        self._configs = {
            setting: self._write(setting, entries(kinds, size=size)) for setting in ("off", "on")
        }

    def config(self, huge_pages: HugePages) -> Config:
        """Return the loaded configuration.

        Raises:
            ConfigError: this machine lacks something.
        """
        return load(self._configs[huge_pages])

    def _write(self, huge_pages: str, models: list[dict[str, Any]]) -> Path:
        content = {
            "paths": {
                "state_dir": str(self.directory / "state"),
                "image_dir": str(self.directory / "images"),
                "run_dir": str(self._run_dir),
            },
            "server": {"port": 0},
            "keeper": {"subnet": SUBNET, "huge_pages": huge_pages == "on"},
            # Swapped out in mid-stream, an engine stays away until it is told to come back.
            "scheduling": {"quantum": "1h", "look_ahead": False},
            "models": models,
        }
        path = self.directory / f"huge-pages-{huge_pages}.yaml"
        path.write_text(json.dumps(content, indent=1))  # JSON is YAML
        return path


@contextmanager
def place(kinds: Sequence[EngineKind], *, size: str, parent: Path | None) -> Iterator[Place]:
    """Make a directory for one run and delete it with everything in it at the end.

    Raises:
        Missing: an engine is not installed.
    """
    with ExitStack() as stack:

        def make(where: Path | None) -> Path:
            made = Path(tempfile.mkdtemp(prefix="swapserve-evaluation-", dir=where))
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            return made

        # The path of a socket may have 107 characters: not below the caller's own directory.
        yield Place(make(parent), make(None), kinds, size=size)


class Session:
    """A running daemon: where to send requests, and commands to it."""

    def __init__(self, config: Config, url: str) -> None:
        self.config = config
        self.address = url.removeprefix("http://").rstrip("/")
        self.control = ControlClient(url)
        self.context = Context(config)

    def engine(self, model: str) -> EngineStatus:
        """Return one engine as it is now."""
        return self.control.engine(model)

    def quiet(self, model: str) -> EngineStatus:
        """Return an engine as it is once the daemon knows that its last request is over."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while (status := self.engine(model)).active:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{model} is still busy: {status}")
            time.sleep(POLL_S)
        return status

    def swap_out(self, model: str) -> tuple[float, SwapSummary]:
        """Swap an engine out; return the seconds as a caller sees them and the daemon's account."""
        return self._move("swap-out", model)

    def swap_in(self, model: str) -> tuple[float, SwapSummary]:
        """Swap an engine in; otherwise like `swap_out`."""
        return self._move("swap-in", model)

    def _move(
        self, action: Literal["swap-in", "swap-out"], model: str
    ) -> tuple[float, SwapSummary]:
        begun = time.monotonic()
        after = self.control.command(action, model)
        seconds = time.monotonic() - begun
        if after.last_swap is None:
            raise RuntimeError(f"{action} of {model} left no account")
        return seconds, after.last_swap


@contextmanager
def running(config: Config) -> Iterator[Session]:
    """Run a daemon and its keeper for the time of the block.

    Raises:
        Missing: it does not start; has the end of its log.
    """
    state = config.paths.state_dir
    (state / "logs").mkdir(parents=True, exist_ok=True)
    endpoint = state / "daemon" / "endpoint.json"
    endpoint.unlink(missing_ok=True)
    log = state / "logs" / "daemon.log"
    argv = python_command("swapserve", "--config", str(config.source), "serve")
    daemon = spawn_detached(argv, log=log)
    keeper: ProcessRef | None = None
    try:
        session = Session(config, _url(endpoint, daemon.poll, log))
        keeper = ProcessRef.of(session.control.status().keeper_pid)
        yield session
        session.control.close()
    finally:
        daemon.terminate()
        try:
            daemon.wait(STOP_TIMEOUT_S)
        finally:
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
            if keeper is None:
                _end_orphan(config.paths.run_dir)
            else:
                _end(keeper, (None, signal.SIGTERM, signal.SIGKILL))


def _url(endpoint: Path, poll: Any, log: Path) -> str:  # noqa: ANN401
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and poll() is None:
        if endpoint.exists():
            url = str(json.loads(endpoint.read_text())["urls"][0])
            with ControlClient(url) as control:
                try:
                    control.status()
                except DaemonUnreachable:
                    pass
                else:
                    return url
        time.sleep(POLL_S)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    raise Missing(f"the daemon did not start. Its log ends:\n{tail}")


def _end_orphan(run_dir: Path) -> None:
    """End the keeper of a daemon that never served, and may have left it without a word."""
    deadline = time.monotonic() + ORPHAN_S
    while time.monotonic() < deadline:
        if (keeper := _holder(run_dir / "keeper.lock")) is not None:
            _end(keeper, (signal.SIGTERM, signal.SIGKILL))
            return
        time.sleep(POLL_S)


def _holder(lock: Path) -> ProcessRef | None:
    """Return who holds a lock file, None if nobody does."""
    try:
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return ProcessRef.of(int(file.read()))
    except (FileNotFoundError, ProcessLookupError, ValueError):
        pass
    return None


def _end(keeper: ProcessRef, numbers: Sequence[signal.Signals | None]) -> None:
    """Wait for the keeper to end, after each of these signals; None: it was told to already."""
    for number in numbers:
        if number is not None:
            _signal(keeper, number)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            if not keeper.alive():
                with suppress(ChildProcessError):  # it may have become our child
                    os.waitpid(keeper.pid, os.WNOHANG)
                return
            time.sleep(POLL_S)


def _signal(process: ProcessRef, number: signal.Signals) -> None:
    try:
        pidfd = process.open()
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)
