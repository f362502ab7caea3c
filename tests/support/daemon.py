"""A daemon and its keeper, run as an operator runs them, in a directory of their own."""

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from swapserve.status import EngineStatus, Status, SwapSummary
from swapserve.system.tools import find_tool
from swapserve.testing.models import cached
from tests.support.leaks import no_leak, remove, wait_for
from tests.support.llama_server import llama_server

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 90.0
ROOM = "500MiB"
"""Room on the device of `pair`: enough for one of its engines."""
Model = dict[str, Any]

needs_llama = [
    pytest.mark.engines,
    pytest.mark.skipif(llama_server() is None, reason="no llama-server; run scripts/host-setup"),
]
needs_criu = [
    *needs_llama,
    pytest.mark.criu,
    pytest.mark.skipif(
        os.geteuid() != 0 or find_tool("criu") is None,
        reason="needs root and CRIU; run scripts/host-setup",
    ),
]


def cache_dir() -> Path:
    """Return where scripts/setup keeps engines and models."""
    return Path(os.environ.get("SWAPSERVE_CACHE", "/var/cache/swapserve"))


def llama(name: str, *, seed: int = 1, size: str = "tiny", **extra: Any) -> Model:
    """Return a model of 400 MiB (so it says) that llama-server serves in one thread."""
    model = cached("gguf", cache_dir() / "models", seed=seed, size=size)
    entry = {
        "name": name,
        "recipe": "llamacpp",
        "model": str(model),
        "args": ["-np", "1", "-c", "8192", "-t", "1"],
        "memory": "400MiB",
        "stop_grace": "0s",
    }
    return {**entry, **extra}


def pair(*, size: str = "tiny", **extra: Any) -> list[Model]:
    """Return two engines of which only one fits `ROOM`."""
    return [llama("a", seed=1, size=size, **extra), llama("b", seed=2, size=size, **extra)]


@dataclass(slots=True)
class Site:
    """Directories, configuration and what runs of them. `close` ends everything."""

    directory: Path
    models: Sequence[Model]
    sections: dict[str, Any] = field(default_factory=dict)
    python: Sequence[str] = (sys.executable,)
    """How Python is run; may be as another account."""
    env: dict[str, str] = field(default_factory=dict)
    """What everything started here has in its environment beyond the tests' own."""
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.configure(self.models, **self.sections)

    @property
    def config(self) -> Path:
        return self.directory / "swapserve.yaml"

    @property
    def log(self) -> Path:
        return self.directory / "daemon.log"

    @property
    def keeper_log(self) -> Path:
        """Where a keeper writes that a test has started, or else one that a daemon has."""
        own = self.directory / "keeper.log"
        return own if own.exists() else self.directory / "state" / "logs" / "keeper.log"

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "keeper.sock"

    def configure(self, models: Sequence[Model], **sections: Any) -> None:
        """Write the configuration; a section replaces or adds keys of the usual one."""
        content: dict[str, Any] = {
            "server": {"port": 0, "keepalive": "100ms", "headers_after": "100ms"},
            "paths": {
                "state_dir": str(self.directory / "state"),
                "image_dir": str(self.directory / "images"),
                "run_dir": str(self.directory / "run"),
            },
            "devices": {"host": {"memory": ROOM}},
            # Nothing moves but what a test asks for, and a busy engine pauses after its quantum.
            "scheduling": {
                "policy": "lru",
                "quantum": "300ms",
                "max_wait": "20s",
                "retry_backoff": "100ms",
                "look_ahead": False,
            },
        }
        for name, section in sections.items():
            whole = isinstance(section, dict)
            content[name] = {**content.get(name, {}), **section} if whole else section
        content["models"] = list(models)
        self.config.write_text(json.dumps(content, indent=1))  # JSON is YAML

    def run(self, *argv: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a program of this project that is ended with everything else."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*self.python, *argv],
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, **self.env},
            )
        self._started.append(process)
        return process

    def start(self) -> "Daemon":
        """Start a daemon and wait until its front door is open."""
        process = self.run("-m", "swapserve", "--config", str(self.config), "serve", log=self.log)
        endpoint = self.directory / "state" / "daemon" / "endpoint.json"

        def url() -> str | None:
            assert process.poll() is None, f"the daemon ended:\n{self.logs()}"
            with suppress(OSError, ValueError):
                said = json.loads(endpoint.read_text())
                return str(said["urls"][0]) if said["pid"] == process.pid else None
            return None

        wait_for("the daemon serves", url, START_TIMEOUT_S, self.logs)
        return Daemon(self, process, str(url()).rstrip("/"))

    def keeper_pid(self) -> int | None:
        """Return the pid of the running keeper: it holds the lock on its file while it lives."""
        try:
            with (self.directory / "run" / "keeper.lock").open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(lock.read() or 0) or None
        except OSError:
            return None
        return None

    def logs(self) -> str:
        """Return the ends of the daemon's and the keeper's logs."""
        text = ""
        for path in (self.log, self.keeper_log):
            with suppress(OSError):
                lines = path.read_text(errors="replace").splitlines()[-40:]
                text += f"--- {path.name}\n" + "\n".join(lines) + "\n"
        return text

    def close(self) -> None:
        """End daemon, keeper and engines, the way an operator does; then by force."""
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        if (keeper := self.keeper_pid()) is not None:
            with suppress(ProcessLookupError):
                os.kill(keeper, signal.SIGTERM)
        try:
            for process in self._started:
                process.wait(STOP_TIMEOUT_S)
            wait_for("the keeper ended", lambda: self.keeper_pid() is None, STOP_TIMEOUT_S)
        except (subprocess.TimeoutExpired, AssertionError):
            remove(self.directory)
            raise
        finally:
            for process in self._started:
                if process.poll() is None:
                    process.kill()
                    process.wait()


@contextmanager
def site(
    directory: Path,
    models: Sequence[Model],
    *,
    python: Sequence[str] = (sys.executable,),
    env: dict[str, str] | None = None,
    **sections: Any,
) -> Iterator[Site]:
    """Yield a site; at the end all of it is ended, and it must not have left a trace."""
    with no_leak(directory):
        here = Site(directory, models, sections, python, env or {})
        try:
            yield here
        except BaseException:
            sys.stderr.write(here.logs())
            raise
        finally:
            here.close()


@dataclass(slots=True)
class Daemon:
    """A running daemon, asked over HTTP."""

    site: Site
    process: subprocess.Popen[bytes]
    url: str

    @property
    def completions(self) -> str:
        return f"{self.url}/v1/completions"

    @property
    def chat(self) -> str:
        return f"{self.url}/v1/chat/completions"

    def status(self) -> Status:
        return Status.from_json(httpx.get(f"{self.url}/admin/v1/status", timeout=10).json())

    def engine(self, name: str) -> EngineStatus:
        return next(engine for engine in self.status().engines if engine.name == name)

    def pid(self, name: str) -> int:
        """Return the pid of an engine that must run."""
        pid = self.engine(name).pid
        assert pid is not None, self.engine(name)
        return pid

    def command(self, verb: str, name: str) -> EngineStatus:
        """Carry an operator's command out and wait for it."""
        answer = httpx.post(f"{self.url}/admin/v1/engines/{name}/{verb}", timeout=120)
        assert answer.status_code == 200, answer.text
        return EngineStatus.from_json(answer.json())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the past events of a kind, the oldest first."""
        text = httpx.get(
            f"{self.url}/admin/v1/events", params={"since": 0, "follow": "false"}, timeout=10
        ).text
        lines = [line for line in text.splitlines() if line.startswith("data: ")]
        found = [json.loads(line.removeprefix("data: ")) for line in lines]
        return [event for event in found if event["event"] == kind]

    def swaps(self, name: str | None = None) -> list[SwapSummary]:
        """Return the moves so far, of one engine or of all."""
        events = self.events("swap_ended")
        wanted = [event for event in events if name in {None, event["engine"]}]
        return [SwapSummary.from_json(event["summary"]) for event in wanted]

    def away_s(self, name: str) -> float:
        """Return how long an engine's process was gone the last time, at the least."""
        moves = self.swaps(name)
        ways = [move for move in moves if move.kind in {"swap_out", "swap_in"}][-2:]
        assert [move.kind for move in ways] == ["swap_out", "swap_in"], ways
        return ways[1].finished_at - ways[1].seconds - ways[0].finished_at

    def http(self) -> aiohttp.ClientSession:
        """Return a client for streams, to be closed by the caller."""
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120))

    def wait_for_state(self, name: str, state: str, timeout_s: float = 60.0) -> EngineStatus:
        wait_for(
            f"'{name}' is {state}",
            lambda: self.engine(name).state == state,
            timeout_s,
            lambda: f"{self.engine(name)}\n{self.site.logs()}",
        )
        return self.engine(name)

    def kill(self) -> None:
        """Kill it as no shutdown would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end; return its exit status."""
        self.process.terminate()
        return self.process.wait(STOP_TIMEOUT_S)


def in_flight(daemon: Daemon, name: str) -> tuple[int, int, int]:
    engine = daemon.engine(name)
    return engine.active, engine.waiting, engine.suspended


def generating(daemon: Daemon, name: str) -> bool:
    """Ask the engine itself, past the front door."""
    slots = httpx.get(f"http://{daemon.engine(name).address}/slots", timeout=10).json()
    return bool(slots[0]["is_processing"])


async def until_busy(daemon: Daemon, name: str) -> None:
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(generating, daemon, name):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
