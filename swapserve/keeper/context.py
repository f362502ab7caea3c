"""What all engines of one keeper share: configuration, directories, tools, and its own tag."""

import asyncio
import hashlib
import ipaddress
import logging
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from swapserve.config.machine import resolve_profile
from swapserve.config.schema import Config
from swapserve.errors import CommandError, CriuError
from swapserve.keeper.criu import Criu
from swapserve.keeper.cuda.calls import Features
from swapserve.keeper.cuda.pool import Workers
from swapserve.keeper.hugepages import HugePages
from swapserve.keeper.images import ImageStore
from swapserve.keeper.network import Network
from swapserve.keeper.phases import Phases
from swapserve.keeper.runtimes import Runtimes
from swapserve.keeper.sandbox import slug
from swapserve.system import cgroup, host
from swapserve.system.cgroup import Cgroup
from swapserve.system.gpu import Nvml, NvmlUnavailable
from swapserve.system.tools import find_tool, prefix_dirs

log = logging.getLogger(__name__)


class Context:
    """Shared by all `HeldEngine`s; `open` looks at the machine once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.profile = resolve_profile(config.keeper.profile)
        paths = config.paths
        self.tag = hashlib.sha256(str(paths.run_dir.absolute()).encode()).hexdigest()[:5]
        self.records_dir = paths.state_dir / "keeper"
        self.images = ImageStore(
            paths.image_dir,
            budget_bytes=config.images.budget_bytes,
            min_free_bytes=config.images.min_free_bytes,
        )
        self.huge_pages = HugePages(
            self.records_dir / "huge_pages", wanted=config.keeper.huge_pages
        )
        self.criu: Criu | None = None
        self.criu_missing = "the profile is unprivileged"
        self.nft: Path | None = None
        self.workers = Workers(config.keeper)
        self.runtimes = Runtimes(config.keeper)
        self.nvml = Nvml()
        self.cuda: Features | None = None
        """What the CUDA driver can do; None without GPUs in the configuration."""
        self._gpus: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._cgroups: Path | None = None

    async def open(self) -> None:
        """Make the directories, find the tools, undo what a killed keeper left switched.

        Raises:
            OSError: a directory cannot be made.
        """
        for directory in (self.records_dir, self.config.paths.run_dir):
            directory.mkdir(parents=True, exist_ok=True)
        self.records_dir.chmod(0o700)
        self.images.open()
        self.huge_pages.recover()
        self.nft = find_tool("nft")
        if self.profile == "root":
            self.criu = await self._find_criu()
        self._cgroups = self._find_cgroups()
        if any(model.gpus for model in self.config.models.values()):
            self.cuda = await self.workers.features()

    @property
    def can_sandbox(self) -> bool:
        """Whether engines get their own namespaces."""
        return self.profile == "root"

    @asynccontextmanager
    async def gpus(self, uuids: Sequence[str], phases: Phases) -> AsyncIterator[None]:
        """Hold these GPUs: nothing else is moved onto or off them meanwhile.

        Taken in one order by everybody, so two engines on several GPUs never wait for each other.
        """
        async with AsyncExitStack() as held:
            with phases.phase("gpu_wait"):
                for uuid in sorted(uuids):
                    await held.enter_async_context(self._gpus[uuid])
            yield

    def leaving_s(self) -> float:
        """Return how long GPU state of all engines may take to leave, one after the other."""
        gpus = [one.memory_bytes for one in self.config.devices.values() if one.kind == "gpu"]
        rate = self.config.keeper.cuda_rate_bytes
        return sum(size / rate + self.config.keeper.cuda_lock_timeout_s for size in gpus)

    def kinds(self, uuids: Sequence[str]) -> list[str]:
        """Return the names of these GPUs' models; of one that NVML does not know, its UUID."""
        try:
            known = {gpu.uuid: gpu.name for gpu in self.nvml.gpus()}
        except NvmlUnavailable:
            known = {}
        return [known.get(uuid, uuid) for uuid in uuids]

    def cannot_move(self, uuids: Sequence[str]) -> str:
        """Return why GPU state on these GPUs cannot be moved; empty if it can (blocks)."""
        if self.cuda is None or not uuids:
            return "it runs on no GPU"
        return self.cuda.why_not or next(self._unfit(uuids), "")

    def _unfit(self, uuids: Sequence[str]) -> Iterator[str]:
        try:
            known = {gpu.uuid: gpu for gpu in self.nvml.gpus()}
            mps = self.nvml.mps()
        except NvmlUnavailable as error:
            yield str(error)
            return
        for uuid in uuids:
            if uuid not in known:
                yield f"NVML knows no GPU {uuid}; `nvidia-smi -L` lists them"
            elif known[uuid].mig:
                yield (
                    f"GPU {uuid} is split by MIG, of which the driver cannot move state; switch"
                    " it off with `nvidia-smi -mig 0`, or set mechanism: sleep"
                )
        if mps:
            yield (
                "MPS serves the GPUs, and the driver cannot move the state of its clients; end"
                " nvidia-cuda-mps-control, or set mechanism: sleep"
            )

    def engine_dir(self, engine: str) -> Path:
        """Return where an engine's root directory and pid file are."""
        return self.config.paths.run_dir / "engines" / slug(engine)

    def log_dir(self, engine: str) -> Path:
        """Return where an engine's own output goes."""
        return self.config.paths.state_dir / "logs" / slug(engine)

    def cache_dir(self, engine: str) -> Path:
        """Return the engine's home directory."""
        return self.config.paths.state_dir / "cache" / slug(engine)

    def record_path(self, engine: str) -> Path:
        """Return the file of an engine's record."""
        return self.records_dir / f"{slug(engine)}.json"

    def group(self, engine: str) -> Cgroup | None:
        """Return the engine's cgroup, made if need be; None where there are none."""
        if self._cgroups is None:
            return None
        group = Cgroup(self._cgroups / slug(engine))
        group.make()
        return group

    def network(self, index: int) -> Network:
        """Return the network with that place in the subnet."""
        return Network(self.tag, index, ipaddress.IPv4Network(self.config.keeper.subnet))

    def free_index(self, taken: set[int]) -> int:
        """Return the first place in the subnet that neither we nor another program uses.

        Raises:
            ValueError: the subnet is full.
        """
        used = host.addresses()
        places = ipaddress.IPv4Network(self.config.keeper.subnet).num_addresses // 4
        for index in range(places):
            if index not in taken and self.network(index).host_ip not in used:
                return index
        raise ValueError(f"keeper.subnet {self.config.keeper.subnet} has no free /30 left")

    async def close(self) -> None:
        """End the workers; remove the keeper's own cgroup, except where an engine still is."""
        await self.workers.close()
        if self._cgroups is not None:
            Cgroup(self._cgroups).remove()

    async def _find_criu(self) -> Criu | None:
        configured = self.config.keeper.criu
        candidates = [configured] if configured else [find_tool("criu")]
        if configured is None:  # a distribution's own CRIU may be too old
            candidates += [prefix / "bin" / "criu" for prefix in prefix_dirs()]
        self.criu_missing = "no criu on PATH or in the private prefix; run scripts/host-setup"
        for binary in candidates:
            if binary is None or not binary.exists():
                continue
            criu = Criu(binary)
            try:
                await criu.check()
            except (CommandError, CriuError) as error:
                self.criu_missing = str(error)
                continue
            return criu
        log.warning("event=no_criu reason=%s", self.criu_missing)
        return None

    def _find_cgroups(self) -> Path | None:
        mount = cgroup.mount_point()
        if mount is None or os.geteuid() != 0:
            return None
        group = Cgroup(mount / f"swapserve-{self.tag}")
        try:
            group.make()
        except OSError as error:
            log.warning("event=no_cgroups error=%s", error)
            return None
        return group.path
