"""The driver path on the stand-in: real workers, real processes, NVML as the stand-in tells it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from swapserve.config.schema import KeeperConfig
from swapserve.keeper.cuda.calls import CudaState
from swapserve.keeper.cuda.pool import Workers
from swapserve.keeper.cuda.suspend import Suspended
from swapserve.keeper.cuda.tree import CudaTree
from swapserve.keeper.phases import Phases
from swapserve.system.gpu import Gpu, Nvml, NvmlUnavailable
from tests.support.cuda_target import Target
from tests.support.gpu import StandIn, standin
from tests.support.nvml import Asker, Unavailable, asker

WAIT_S = 20.0
POLL_S = 0.01


async def eventually(probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not probe():  # noqa: ASYNC110 - it is about other processes
            await asyncio.sleep(POLL_S)


class AskedNvml(Nvml):
    """NVML in a process of its own: a library, once loaded here, would stay for other tests."""

    def __init__(self, process: Asker) -> None:
        super().__init__()
        self._process = process
        self._one = threading.Lock()

    def free(self, uuid: str) -> int:
        return int(self._said(f"nvml.free({uuid!r})"))

    def used_by(self, pids: Collection[int]) -> dict[str, int]:
        return dict(self._said(f"nvml.used_by({sorted(pids)!r})"))

    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(
            Gpu(**gpu | {"instances": tuple(gpu["instances"])}) for gpu in self._said("nvml.gpus()")
        )

    def mps(self) -> bool:
        return bool(self._said("nvml.mps()"))

    def _said(self, expression: str) -> Any:
        with self._one:
            try:
                return self._process.ask(expression)
            except Unavailable as error:
                raise NvmlUnavailable(str(error)) from error


class Bench:
    """A machine with the stand-in's GPUs, and a keeper's workers on it."""

    def __init__(self, gpu: StandIn, workers: Workers, nvml: Nvml, keeper: KeeperConfig) -> None:
        self.gpu = gpu
        self.workers = workers
        self.nvml = nvml
        self.keeper = keeper

    def tree(self, *targets: Target) -> CudaTree:
        return CudaTree(
            "a",
            workers=self.workers,
            nvml=self.nvml,
            pids=lambda: [target.pid for target in targets],
            keeper=self.keeper,
        )

    async def suspended(self, *targets: Target) -> Suspended:
        return await self.tree(*targets).suspend(Phases())

    async def resumed(self, moved: Suspended, *targets: Target) -> None:
        await self.tree(*targets).resume(moved.processes, moved.device_bytes, Phases())

    async def states(self, *targets: Target) -> list[CudaState | None]:
        async with self.workers.lease() as worker:
            return [await worker.state(target.ref) for target in targets]

    async def running(self, *targets: Target) -> bool:
        """Whether all run and their memory is what it was."""
        if set(await self.states(*targets)) != {CudaState.RUNNING}:
            return False
        return all(target.told("check") == "same" for target in targets)

    async def under_way(self, op: str, nth: int = 1) -> None:
        """Wait until the nth call of an operation has begun."""
        await eventually(lambda: len(self.made(op)) >= nth)

    def made(self, op: str, target: Target | None = None) -> list[int]:
        """Return the pids that an operation was called for, in order."""
        return [
            call.pid
            for call in self.gpu.calls()
            if call.op == op and (target is None or call.pid == target.pid)
        ]


@asynccontextmanager
async def bench(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    legal: bool = True,
    keeper: Sequence[tuple[str, Any]] = (),
    **machine: Any,
) -> AsyncIterator[Bench]:
    """Set one up; at the end no worker is left, and no call was one that must not be made."""
    machine.setdefault("gpus", (64 << 20,))
    settings = {"gpu_margin_bytes": 1 << 20, "cuda_lock_timeout_s": 1.0, **dict(keeper)}
    with standin(tmp_path / "gpu", **machine) as gpu, asker(gpu.env) as process:
        for name, value in gpu.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        config = KeeperConfig(**settings)
        workers = Workers(config)
        try:
            yield Bench(gpu, workers, AskedNvml(process), config)
        finally:
            await workers.close()
        if legal:
            assert gpu.illegal() == []


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what hangs be given up soon."""
    for name, seconds in {
        "crew.PROBE_TIMEOUT_S": 0.5,
        "crew.MOVE_FIXED_S": 0.5,
        "crew.UNLOCK_TIMEOUT_S": 0.5,
        "pool.LOCK_MARGIN_S": 0.0,
        "suspend.FREED_TIMEOUT_S": 0.5,
        "tree.ADMIT_TIMEOUT_S": 0.5,
    }.items():
        monkeypatch.setattr(f"swapserve.keeper.cuda.{name}", seconds)
