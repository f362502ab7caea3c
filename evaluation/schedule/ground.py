"""Directories and configurations of one run: engines of one model, a device for them."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from evaluation.engines import Missing, cache_dir
from evaluation.session import SUBNET, Session, running
from swapserve.config.load import load
from swapserve.config.machine import find_binary
from swapserve.config.schema import Config
from swapserve.ids import EngineName
from swapserve.testing.models import cached

MIB = 1 << 20
ENGINE_BYTES = 400 * MIB
"""Of each engine, so it says; that it is more than it takes does no harm."""
CONTEXT = 4096


class Ground:
    """Where engines live and their images stay from daemon to daemon.

    Args:
        directory: for state and images.
        run_dir: for sockets, whose paths have to be short.
        engines: how many.
        size: of their model.
        held: how many of them the device holds.
        scheduling: the section of the configuration, its keys as in YAML.

    Raises:
        Missing: there is no llama-server.
        OSError: the model cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        run_dir: Path,
        *,
        engines: int,
        size: str,
        held: int,
        scheduling: dict[str, Any],
    ) -> None:
        self.names = [EngineName(f"m{number}") for number in range(engines)]
        self.held = held
        self._directory = directory
        self._run_dir = run_dir
        self._scheduling = scheduling
        self._models = self._entries(size)

    @contextmanager
    def daemon(self, policy: str) -> Iterator[Session]:
        """Run a daemon with that policy for the time of the block.

        Raises:
            Missing: it does not start.
        """
        with running(self.config(policy)) as session:
            yield session

    def config(self, policy: str) -> Config:
        """Return the configuration with that policy.

        Raises:
            ConfigError: this machine lacks something.
        """
        content = {
            "paths": {
                "state_dir": str(self._directory / "state"),
                "image_dir": str(self._directory / "images"),
                "run_dir": str(self._run_dir),
            },
            "server": {"port": 0},
            "keeper": {"subnet": SUBNET},
            # A canary now and then would be a swap in that takes longer than others.
            "images": {"canary_rate": 0.0},
            "devices": {"host": {"memory": self.held * ENGINE_BYTES + MIB}},
            "scheduling": {**self._scheduling, "policy": policy},
            "models": self._models,
        }
        path = self._directory / f"{policy}.yaml"
        path.write_text(json.dumps(content, indent=1))  # JSON is YAML
        return load(path)

    def learnt(self) -> object:
        """Return what the last daemon has left of its scheduler's knowledge; None: nothing."""
        path = self._directory / "state" / "daemon" / "knowledge.json"
        try:
            return json.loads(path.read_text())["knowledge"]
        except FileNotFoundError:
            return None

    def _entries(self, size: str) -> list[dict[str, Any]]:
        binary = find_binary("llama-server")
        if binary is None:
            raise Missing(
                "no llama-server on PATH or in the private prefix. Run `scripts/host-setup`"
            )
        model = cached("gguf", cache_dir() / "models", seed=1, size=size)
        # One thread and one request at a time, and nothing of a prompt is found again.
        args = ["-t", "1", "-np", "1", "-c", str(CONTEXT), "--cache-ram", "0"]
        return [
            {
                "name": name,
                "recipe": "llamacpp",
                "model": str(model),
                "params": {"binary": str(binary)},
                "args": args,
                "memory": ENGINE_BYTES,
                "slots": 1,
                "stop_grace": "0s",
            }
            for name in self.names
        ]


@contextmanager
def ground(
    *,
    engines: int,
    size: str,
    held: int,
    scheduling: dict[str, Any],
    parent: Path | None = None,
) -> Iterator[Ground]:
    """Make directories for one run and delete them with everything in them at the end.

    Raises:
        Missing: there is no llama-server.
    """
    with ExitStack() as stack:

        def make(where: Path | None) -> Path:
            made = Path(tempfile.mkdtemp(prefix="swapserve-schedule-", dir=where))
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            return made

        yield Ground(
            make(parent),
            make(None),
            engines=engines,
            size=size,
            held=held,
            scheduling=scheduling,
        )
