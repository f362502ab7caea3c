"""Which processes of an engine use CUDA."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from swapserve.keeper.cuda.crew import Crew
from swapserve.system.process import ProcessRef

PASSES = 20
"""How often an engine's processes are gone through until two passes agree."""
PASS_PAUSE_S = 0.01
PROC_TIMEOUT_S = 30.0
KEEPS_CHANGING = "its processes keep coming, going or starting to use CUDA"
LIBRARY = b"/libcuda.so"
DEVICES = "/dev/nvidia"


class Unstable(Exception):
    """It cannot be told which processes use CUDA."""


class Finder:
    """Finds them. `pids` gives all processes of the engine at this moment."""

    def __init__(self, pids: Callable[[], Sequence[int]]) -> None:
        self.pids = pids

    async def find(self, crew: Crew, known: Sequence[ProcessRef] = ()) -> list[ProcessRef]:
        """Return the processes that use CUDA, in the order of the tree.

        The passes are repeated until two agree: a process may start to use CUDA, or be forked,
        while the others are looked at (gVisor issue 13933). Of `known` ones only their being there
        is asked: one that is locked may not answer.

        Raises:
            Unstable: two passes never agreed, or /proc did not answer.
            CudaCallFailed: the driver would not say it of one.
            CudaOutcomeUnknown: it did not answer.
        """
        using = set(known)
        last: list[ProcessRef] | None = None
        for _ in range(PASSES):
            found = []
            for ref in await self.candidates():
                if ref in using or await crew.has_context(ref):
                    using.add(ref)
                    found.append(ref)
            if found == last:
                return found
            last = found
            await asyncio.sleep(PASS_PAUSE_S)
        raise Unstable(KEEPS_CHANGING)

    async def candidates(self) -> list[ProcessRef]:
        """Return the processes that may use CUDA: cheap to ask, and sure in one direction.

        Raises:
            Unstable: /proc did not answer.
        """
        try:
            async with asyncio.timeout(PROC_TIMEOUT_S):
                return await asyncio.to_thread(self._candidates)
        except TimeoutError as error:
            raise Unstable(f"/proc has not answered for {PROC_TIMEOUT_S:g} s") from error

    def _candidates(self) -> list[ProcessRef]:
        found = []
        for pid in self.pids():
            try:
                ref = ProcessRef.of(pid)
            except ProcessLookupError:
                continue
            if _may_use_cuda(Path(f"/proc/{pid}")):
                found.append(ref)
        return found


def _may_use_cuda(process: Path) -> bool:
    """Whether the driver is loaded or a GPU open; also if that cannot be seen."""
    try:
        if LIBRARY in (process / "maps").read_bytes():
            return True
        return any(str(link.readlink()).startswith(DEVICES) for link in _links(process / "fd"))
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:
        return True


def _links(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_symlink()]
