"""Each contract test runs on the stand-in, and on NVIDIA's driver where there is one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from swapserve.config.schema import KeeperConfig
from swapserve.keeper.cuda.calls import CudaState
from swapserve.keeper.cuda.pool import Worker, Workers
from swapserve.system.gpu import look
from swapserve.system.process import ProcessRef
from tests.support.cuda import NOT_ROOT, EngineOnGpu, cuda_engine
from tests.support.gpu import MIB, StandIn, standin
from tests.support.nvml import asker

LOCK_TIMEOUT_S = 30.0
MOVE_TIMEOUT_S = 60.0


class Machine:
    """A machine with a driver, and a worker of the keeper that calls it."""

    def __init__(self, worker: Worker, workers: Workers, standin: StandIn | None, ask: Any) -> None:
        self.worker = worker
        self.workers = workers
        self.standin = standin
        self.ask = ask

    @property
    def env(self) -> dict[str, str]:
        return self.standin.env if self.standin else {}

    @property
    def uuids(self) -> list[str]:
        return [gpu["uuid"] for gpu in self.ask("nvml.gpus()")]

    def free(self, uuid: str) -> int:
        return int(self.ask(f"nvml.free({uuid!r})"))

    async def lock(self, ref: ProcessRef) -> None:
        await self.worker.lock(ref, timeout_s=LOCK_TIMEOUT_S)

    async def checkpoint(self, ref: ProcessRef) -> None:
        await self.worker.checkpoint(ref, deadline_s=MOVE_TIMEOUT_S)

    async def restore(self, ref: ProcessRef, worker: Worker | None = None, **more: Any) -> None:
        await (worker or self.worker).restore(ref, deadline_s=MOVE_TIMEOUT_S, **more)

    async def unlock(self, ref: ProcessRef) -> None:
        await self.worker.unlock(ref, deadline_s=MOVE_TIMEOUT_S)

    async def suspend(self, *refs: ProcessRef) -> None:
        for ref in refs:
            await self.lock(ref)
        for ref in refs:
            await self.checkpoint(ref)

    async def resume(self, *refs: ProcessRef) -> None:
        for ref in refs:
            await self.restore(ref)
        for ref in refs:
            await self.unlock(ref)

    @asynccontextmanager
    async def engine(self, *args: str) -> AsyncIterator[EngineOnGpu]:
        """Run an engine. In the end its GPU state is put away before it is killed: the death of a
        restored process can hang a machine (NVIDIA/cuda-checkpoint#53)."""
        with cuda_engine(self, *args) as engine:
            refs = [ProcessRef.of(pid) for pid in engine.ranks]
            try:
                yield engine
            finally:
                for ref in refs:
                    state = await self.worker.state(ref)
                    if state is CudaState.RUNNING:
                        await self.lock(ref)
                    if state in {CudaState.RUNNING, CudaState.LOCKED}:
                        await self.checkpoint(ref)


@cache
def why_no_driver() -> str:
    """Return what keeps these tests from NVIDIA's driver here; empty: nothing."""
    found = look()
    if found.unavailable:
        return f"no NVIDIA GPU: {found.unavailable}"
    if not found.can_checkpoint:
        return f"driver {found.driver} cannot checkpoint; 570 is the first"
    return ""


@pytest.fixture(params=["standin", pytest.param("driver", marks=pytest.mark.gpu)])
async def machine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Machine]:
    if NOT_ROOT:
        pytest.skip(NOT_ROOT)
    if request.param == "standin":
        with standin(tmp_path / "gpu", gpus=[128 * MIB, 128 * MIB]) as gpu:
            for name, value in gpu.env.items():
                monkeypatch.setenv(name, value)
            async with using(gpu.env, gpu) as one:
                yield one
            assert gpu.hazards() == []
            return
    if reason := why_no_driver():
        pytest.skip(reason)
    async with using({}, None) as one:
        yield one


@asynccontextmanager
async def using(env: dict[str, str], gpu: StandIn | None) -> AsyncIterator[Machine]:
    workers = Workers(KeeperConfig())
    try:
        with asker(env) as process:
            async with workers.lease() as worker:
                yield Machine(worker, workers, gpu, process.ask)
    finally:
        await workers.close()
