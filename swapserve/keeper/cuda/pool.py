"""Workers for CUDA calls: each transition leases one, and one that hangs is killed and replaced."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swapserve.config.schema import KeeperConfig
from swapserve.keeper.cuda.calls import (
    CudaOutcomeUnknown,
    CudaState,
    CudaUnavailable,
    Features,
    Pairs,
)
from swapserve.keeper.cuda.link import CLOSE_TIMEOUT_S, KILL_WAIT_S, Link
from swapserve.system.process import ProcessRef
from swapserve.system.tools import find_tool

START_TIMEOUT_S = 60.0
"""Longest start of the driver (`cuInit`); 2.7 s were seen on eight H100 (NVIDIA/nvcf 437)."""
PROBE_TIMEOUT_S = 10.0
"""Longest question about a process; with NCCL one may hang (NVIDIA/cuda-checkpoint issue 30)."""
LOCK_MARGIN_S = 10.0
"""What a lock may take beyond the time that the driver itself was given."""
IDLE_KEPT = 2
"""Idle workers that are kept: each holds a driver that has been started."""

log = logging.getLogger(__name__)


class Worker:
    """A leased worker. Every call makes sure first that the pid still is that process.

    Each raises `CudaCallFailed` (the driver said no), `CudaTargetGone` (the process ended) or
    `CudaOutcomeUnknown` (no answer; this worker is gone with all its calls, nothing is tried
    again). Cancellation: the call itself goes on; the worker is lent to nobody until it is over.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._link.pid

    @property
    def usable(self) -> bool:
        """Whether it can still be asked."""
        return self._link.usable

    async def state(
        self, ref: ProcessRef, *, deadline_s: float = PROBE_TIMEOUT_S
    ) -> CudaState | None:
        """Return the driver's state of a process, None if it has no CUDA state."""
        value = await self._link.call("state", ref, deadline_s=deadline_s)
        return None if value is None else CudaState(value)

    async def restore_thread(
        self, ref: ProcessRef, *, deadline_s: float = PROBE_TIMEOUT_S
    ) -> int | None:
        """Return the driver's thread in a process, None if it has none, thus no CUDA context.

        It is the better question than `state` for that: a coordinator of several processes has a
        state too (ai-dynamo/snapshot, agent/internal/cuda/cuda.go, FilterProcesses).
        """
        value: int | None = await self._link.call("restore_thread", ref, deadline_s=deadline_s)
        return value

    async def lock(self, ref: ProcessRef, *, timeout_s: float) -> None:
        """Hold up its CUDA calls; one that times out in the driver leaves it running."""
        await self._link.call(
            "lock", ref, deadline_s=timeout_s + LOCK_MARGIN_S, timeout_s=timeout_s
        )

    async def checkpoint(self, ref: ProcessRef, *, deadline_s: float) -> None:
        """Move the GPU state of a locked process to its host memory."""
        await self._link.call("checkpoint", ref, deadline_s=deadline_s)

    async def restore(self, ref: ProcessRef, *, deadline_s: float, pairs: Pairs = ()) -> None:
        """Bring GPU state back, by `pairs` (old UUID, new UUID) to other GPUs; it stays locked."""
        await self._link.call("restore", ref, deadline_s=deadline_s, pairs=list(pairs))

    async def unlock(self, ref: ProcessRef, *, deadline_s: float) -> None:
        """Let the CUDA calls of a process go on."""
        await self._link.call("unlock", ref, deadline_s=deadline_s)


class Workers:
    """All workers of a keeper."""

    def __init__(self, keeper: KeeperConfig) -> None:
        self._keeper = keeper
        self._features: Features | None = None
        self._looking = asyncio.Lock()
        self._links: set[Link] = set()
        self._lent: set[Link] = set()
        self._idle: list[Link] = []
        self._closed = False

    async def features(self) -> Features:
        """Say what can be done here; never raises for what is missing.

        Only a definite answer is kept: a driver that did not answer is asked again.
        """
        async with self._looking:
            why_not = ""
            if self._features is None:
                try:
                    async with self.lease():
                        pass
                except CudaUnavailable as error:
                    why_not = str(error)
            return self._known() or Features(why_not=why_not)

    def _known(self) -> Features | None:
        return self._features

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Worker]:
        """Lend a worker to one transition, started if none is idle.

        Raises:
            CudaUnavailable: CUDA calls are not possible here.

        Cancellation: a worker that just starts is ended.
        """
        link = await self._take()
        self._lent.add(link)
        try:
            yield Worker(link)
        finally:
            self._lent.discard(link)
            self._put_back(link)

    async def close(self) -> None:
        """End all workers and wait for that, for a bounded time."""
        self._closed = True
        links = tuple(self._links)
        for link in links:
            link.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S + KILL_WAIT_S):
                for link in links:
                    await link.over.wait()

    async def _take(self) -> Link:
        if self._features is not None and self._features.api is None:
            raise CudaUnavailable(self._features.why_not)
        while self._idle:
            link = self._idle.pop()
            if link.usable:
                return link
        return await self._start()

    async def _start(self) -> Link:
        binary = find_tool("cuda-checkpoint", self._keeper.cuda_checkpoint)
        try:
            link = Link(binary, idle=self._put_back, ended=self._forget)
        except OSError as error:
            raise CudaUnavailable(f"the worker for CUDA calls cannot start: {error}") from error
        self._links.add(link)
        self._lent.add(link)
        try:
            said = await link.call("hello", None, deadline_s=START_TIMEOUT_S)
        except CudaOutcomeUnknown as error:
            raise CudaUnavailable(f"the CUDA driver does not start: {error.reason}") from error
        except BaseException:
            link.kill("nobody waits for its start")
            raise
        finally:
            self._lent.discard(link)
        features = Features(**said)
        if features != self._features:
            log.info("event=cuda_features %s", features)
        self._features = features
        if features.api is None:
            link.close()
            raise CudaUnavailable(features.why_not)
        return link

    def _put_back(self, link: Link) -> None:
        if link in self._lent or link in self._idle or link.busy or not link.usable:
            return
        if self._closed or len(self._idle) >= IDLE_KEPT:
            link.close()
        else:
            self._idle.append(link)

    def _forget(self, link: Link) -> None:
        self._links.discard(link)
        if link in self._idle:
            self._idle.remove(link)
