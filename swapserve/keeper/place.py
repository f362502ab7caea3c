"""One engine's own place on the machine: network, directories, log, and the sandbox it is shown."""

import asyncio
import os
from pathlib import Path

from swapserve.config.schema import ModelConfig
from swapserve.errors import StartFailed
from swapserve.keeper import sandbox
from swapserve.keeper.context import Context
from swapserve.keeper.network import Network
from swapserve.keeper.phases import Phases
from swapserve.keeper.record import Record
from swapserve.keeper.sandbox import SandboxSpec
from swapserve.system import host
from swapserve.system.cgroup import Cgroup

LOG_LIMIT_BYTES = 32 << 20
LINE_BYTES = 400
"""Guess of a log line's length, to read no more of the log than is asked for."""


class Place:
    """Where one engine lives; stays the same while the engine comes and goes."""

    def __init__(self, model: ModelConfig, context: Context, record: Record) -> None:
        self.model = model
        self.slug = sandbox.slug(model.name)
        self.group: Cgroup | None = context.group(model.name)
        self.dir = context.engine_dir(model.name)
        self.root = self.dir / "root"
        self.cache = context.cache_dir(model.name)
        self.log = context.log_dir(model.name) / sandbox.LOG_NAME
        self._context = context
        self._record = record

    @property
    def network(self) -> Network | None:
        """Its network namespace, None if it shares the host's."""
        index = self._record.index
        return None if index is None else self._context.network(index)

    @property
    def address(self) -> str:
        """Where the daemon reaches it, `host:port`."""
        if self._record.address is not None:
            return self._record.address
        network = self.network
        return f"{network.engine_ip if network else '127.0.0.1'}:{self._record.port}"

    @property
    def can_dump(self) -> bool:
        """Whether images of it are possible here."""
        return self.network is not None and self._context.criu is not None

    async def prepare(self, phases: Phases) -> SandboxSpec:
        """Make network, directories and log, and return the spec."""
        with phases.phase("sandbox"):
            for directory in (self.log.parent, self.cache):
                directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            _rotate(self.log)
            spec = self.spec()
            if network := self.network:
                await network.make()
                await asyncio.to_thread(sandbox.prepare_root, spec)
            return spec

    def claim_port(self) -> None:
        """Make sure that nobody else answers where the engine will listen.

        One without a network of its own was given its port when it was first seen, perhaps days
        ago; another program there would pass for it.

        Raises:
            StartFailed: the port that its configuration names is taken.
        """
        if self.network is not None or host.port_is_free(self._record.port):
            return
        if self.model.port is not None:
            reason = f"another program listens on port {self.model.port}; give it another `port`"
            raise StartFailed(self.model.name, reason)
        self._record.port = host.free_port()

    def spec(self) -> SandboxSpec:
        """Return what `sandbox_init` is given."""
        group = self.group.path if self.group else None
        network = self.network
        if network is None:
            return sandbox.plain(
                self.model, log_dir=self.log.parent, cgroup=group, port=self._record.port
            )
        return sandbox.sandboxed(
            self.model,
            root=self.root,
            log_dir=self.log.parent,
            cache_dir=self.cache,
            netns=network.path,
            cgroup=group,
            port=self._record.port,
            gpu_paths=self._context.config.keeper.gpu_paths,
        )

    def log_tail(self, lines: int) -> str:
        """Return the last lines of the engine's own output."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - lines * LINE_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


def new_record(model: ModelConfig, *, index: int | None) -> Record:
    """Return the record of an engine that was never seen before."""
    if index is not None:
        return Record(engine=model.name, index=index, port=model.port or model.recipe.port)
    return Record(engine=model.name, index=None, port=model.port or host.free_port())


def _rotate(path: Path) -> None:
    """Keep an engine's log bounded: copy and truncate, because a frozen image has it open."""
    if not path.exists():
        path.touch(mode=0o640)
    elif path.stat().st_size > LOG_LIMIT_BYTES:
        path.with_suffix(".log.1").write_bytes(path.read_bytes())
        os.truncate(path, 0)
