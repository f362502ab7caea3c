"""What NVML says while GPU state is moved: read in threads, for a bounded time."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from swapserve.system.gpu import Gpu, Nvml, NvmlUnavailable

NVML_TIMEOUT_S = 20.0
POLL_S = 0.05

_T = TypeVar("_T")


class Readings:
    """Coroutines around `Nvml`; each raises `NvmlUnavailable` when NVML cannot answer."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml

    async def gpus(self) -> tuple[Gpu, ...]:
        """Return every GPU."""
        return await self._read(self._nvml.gpus)

    async def mps(self) -> bool:
        """Return whether MPS serves GPUs here."""
        return await self._read(self._nvml.mps)

    async def used_by(self, pids: Collection[int]) -> dict[str, int]:
        """Return the bytes of processes, by GPU."""
        return await self._read(lambda: self._nvml.used_by(pids))

    async def free(self, uuids: Collection[str]) -> dict[str, int]:
        """Return the free bytes of GPUs."""
        return await self._read(lambda: {uuid: self._nvml.free(uuid) for uuid in uuids})

    async def used_if_told(self, pids: Collection[int]) -> dict[str, int]:
        """Return the bytes of processes, by GPU; empty also where NVML does not tell.

        It lists other pids from inside a container, and some drivers give no figures by process.
        """
        try:
            return {uuid: used for uuid, used in (await self.used_by(pids)).items() if used}
        except NvmlUnavailable:
            return {}

    async def shortage(
        self, needs: Mapping[str, int], *, timeout_s: float
    ) -> tuple[str, int, int] | None:
        """Wait until GPUs have that much free memory: what was freed is so only after a while.

        Returns:
            None if they have, or the first that has not: UUID, bytes needed, bytes free.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while True:
            free = await self.free(needs)
            short = [uuid for uuid, needed in needs.items() if free[uuid] < needed]
            if not short:
                return None
            if loop.time() >= end:
                return short[0], needs[short[0]], free[short[0]]
            await asyncio.sleep(POLL_S)

    async def still_used(self, pids: Callable[[], Collection[int]], *, timeout_s: float) -> int:
        """Wait until processes hold no GPU memory; return the bytes that they hold at the end."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while used := sum((await self.used_by(pids())).values()):
            if loop.time() >= end:
                break
            await asyncio.sleep(POLL_S)
        return used

    async def freed(self, before: Mapping[str, int], *, timeout_s: float) -> dict[str, int]:
        """Return by how much GPUs became freer, once that has come to rest."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        last: dict[str, int] | None = None
        while True:
            now = await self.free(before)
            gained = {uuid: now[uuid] - free for uuid, free in before.items() if now[uuid] > free}
            if (gained and gained == last) or loop.time() >= end:
                return gained
            last = gained
            await asyncio.sleep(POLL_S)

    async def _read(self, question: Callable[[], _T]) -> _T:
        try:
            async with asyncio.timeout(NVML_TIMEOUT_S):
                return await asyncio.to_thread(question)
        except TimeoutError as error:
            raise NvmlUnavailable(f"NVML has not answered for {NVML_TIMEOUT_S:g} s") from error
