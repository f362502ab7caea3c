"""The processes of one engine: adopted, watched, frozen, ended, reaped.

The root is our own child (or was a former keeper's, then only its end can be seen, not its exit
status). Whatever ends it, `_watch` is the one place that notices, reaps and cleans up.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from swapserve.errors import KeeperError
from swapserve.keeper import record as records
from swapserve.keeper.launch import Launched, Launcher
from swapserve.keeper.protocol import Exited, ImageKind
from swapserve.keeper.record import GpuState, Record
from swapserve.system import process
from swapserve.system.cgroup import Cgroup
from swapserve.system.process import ProcessRef

FREEZE_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


class EngineTree:
    """The process tree that a record speaks of; writes the record at every change.

    Args:
        record: what was known of it.
        path: the record's file.
        group: its cgroup, None where there are none.
        start_watch: runs a coroutine in the keeper's task group.
        exited: told of an end that nobody asked for.
        launcher: of an engine that is no child of ours: a container, or started by others.
        gpus: those of its configuration.
    """

    def __init__(
        self,
        record: Record,
        path: Path,
        group: Cgroup | None,
        *,
        start_watch: Callable[[Awaitable[None]], None],
        exited: Callable[[Exited], None],
        launcher: Launcher | None = None,
        gpus: tuple[str, ...] = (),
    ) -> None:
        self.group = group
        self._gpus = gpus
        self._launcher = launcher
        self._record = record
        self._path = path
        self._start_watch = start_watch
        self._exited = exited
        self._gone = asyncio.Event()
        self._gone.set()
        self._end_expected = False
        self._watcher: asyncio.Task[object] | None = None
        self.leave_gpus: Callable[[], Awaitable[None]] | None = None
        """Takes GPU state that was once brought back off its GPUs (see `Suspension.quench`)."""

    @property
    def root(self) -> ProcessRef | None:
        """Its first process, None if it is away."""
        return self._record.process

    @property
    def frozen(self) -> bool:
        """Whether it was frozen by us."""
        return self._record.frozen

    @property
    def gpu(self) -> GpuState:
        """Where its GPU state is."""
        return self._record.gpu

    @property
    def cuda(self) -> tuple[ProcessRef, ...]:
        """The processes whose GPU state is in host memory."""
        return self._record.cuda

    @property
    def device_bytes(self) -> dict[str, int]:
        """What it held of each GPU when its state was last moved."""
        return self._record.device_bytes

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs that its state is of, in the order of its configuration at that time."""
        return self._record.gpus

    def gpu_moved(self, gpus: tuple[str, ...], device_bytes: dict[str, int]) -> None:
        """Note that its state is to come back to other GPUs than it came from."""
        self._record.gpus = gpus
        self._record.device_bytes = device_bytes

    @property
    def revived(self) -> bool:
        """Whether its GPU state was ever brought back."""
        return self._record.revived

    @property
    def restored_from(self) -> ImageKind | None:
        """Image its present process came from, None after a cold start."""
        return self._record.restored_from

    def adopt_launched(self, launched: Launched) -> None:
        """Take what a launcher has started or found, and watch it."""
        self.group = launched.group
        self._record.address = launched.address
        self.adopt(launched.root, restored_from=None)

    async def find_launched(self) -> None:
        """Ask the launcher what an earlier keeper left: its group, and whether it is frozen.

        Raises:
            KeeperError: nobody can tell.
        """
        if self._launcher is None or self.root is None:
            return
        found = await self._launcher.find(self.root)
        if found is not None:
            self.group = found.group
            self._record.frozen = found.frozen
            self._save()

    def adopt(
        self,
        ref: ProcessRef,
        *,
        restored_from: ImageKind | None,
        device_bytes: dict[str, int] | None = None,
        gpus: tuple[str, ...] | None = None,
    ) -> None:
        """Take a running process as the engine's root and watch it.

        Args:
            ref: the process.
            restored_from: kind of the image it came from; None: it began anew.
            device_bytes: what its GPU state, still in host memory, will take of each GPU, as far as
                it is known; None: it has none.
            gpus: the GPUs that this state is of; None: those of its configuration.

        Raises:
            OSError: it could not be noted, so a later keeper would not find it; it is watched, and
                can be ended.
        """
        away = device_bytes is not None
        self._record.process = ref
        self._record.restored_from = restored_from
        self._record.frozen = False
        self._record.revived = away
        self._record.gpu = "in_host_memory" if away else "on_device"
        self._record.device_bytes = device_bytes or {}
        self._record.gpus = self._gpus if gpus is None else gpus
        self._record.cuda = ()
        self._watch_over(ref)
        records.save(self._path, self._record)

    def _watch_over(self, ref: ProcessRef) -> None:
        self._end_expected = False
        self._gone.clear()
        self._start_watch(self._watch(ref))

    def recover(self) -> None:
        """Adopt what the record names if it still runs; else clean up after it."""
        ref = self._record.process
        if ref is None:
            self._kill_strays()  # of a start that an earlier keeper did not live to note down
            return
        if ref.alive():
            self._watch_over(ref)
            log.info("event=adopted engine=%s pid=%d", self._record.engine, ref.pid)
            return
        self._forget()
        self._kill_strays()
        self._save()

    def _forget(self) -> None:
        if self.group is not None:
            # Killed while it was frozen: the next process in the group would never begin.
            self.group.let_run()
        self._record.process = None
        self._record.frozen = False
        self._record.gpu = "on_device"
        self._record.cuda = ()
        self._record.revived = False

    def pids(self) -> list[int]:
        """Return its processes as they are at this moment, the root first."""
        if self.root is None:
            return []
        found = dict.fromkeys(process.tree(self.root.pid))
        if self.group is not None:  # also those whose parent has ended
            found |= dict.fromkeys(sorted(self.group.pids()))
        return list(found)

    def gpu_moves(self, device_bytes: dict[str, int]) -> None:
        """Note that calls of the driver begin: until they end nobody knows where its state is.

        Args:
            device_bytes: what it holds of each GPU; empty if that is not told.

        Raises:
            OSError: it could not be noted; they must not begin.
        """
        moving = replace(self._record, gpu="moving")
        moving.device_bytes = device_bytes or self._record.device_bytes
        records.save(self._path, moving)
        self._record.gpu, self._record.device_bytes = moving.gpu, moving.device_bytes

    def gpu_on_device(self, *, revived: bool) -> None:
        """Note that its GPU state is (again) where it belongs."""
        self._record.gpu = "on_device"
        self._record.cuda = ()
        self._record.revived = self._record.revived or revived
        self._save()

    def gpu_in_host_memory(
        self, processes: tuple[ProcessRef, ...], device_bytes: dict[str, int]
    ) -> None:
        """Note whose GPU state is in host memory, and what it took of each GPU."""
        self._record.gpu = "in_host_memory"
        self._record.cuda = processes
        self._record.device_bytes = device_bytes
        self._save()

    def gather(self) -> None:
        """Verify that every process is in the engine's group, moving strays there (blocks)."""
        if self.group is None or self.root is None:
            return
        inside = self.group.pids()
        for pid in process.tree(self.root.pid):
            if pid not in inside:
                self.group.add(pid)

    async def freeze(self, on: bool) -> None:
        """Freeze or thaw all of it.

        Raises:
            TimeoutError: it did not come to rest; a freeze is taken back.
            KeeperError: it has ended, before or meanwhile.
        """
        root = self.root
        if root is None:
            raise self._has_ended()
        if self.group is not None:
            try:
                await self.group.freeze(on, timeout_s=FREEZE_TIMEOUT_S)
            except TimeoutError:
                if on:  # the request would stay in force: an engine that nobody thaws
                    await self.group.freeze(False, timeout_s=FREEZE_TIMEOUT_S)
                raise
        elif not await self._paused(on):
            await process.stop_tree(root.pid, on, timeout_s=FREEZE_TIMEOUT_S)
        if not root.alive():
            raise self._has_ended()
        self._record.frozen = on
        self._save()

    def _has_ended(self) -> KeeperError:
        return KeeperError(f"'{self._record.engine}' has ended")

    async def _paused(self, on: bool) -> bool:
        """Freeze by the engine's own runtime; False if it has none that can."""
        if self._launcher is None:
            return False
        try:
            return await self._launcher.pause(on)
        except KeeperError as error:
            raise TimeoutError(str(error)) from error

    def expect_end(self, expected: bool) -> None:
        """Say whether an end that comes now was asked for (CRIU ends what it has dumped)."""
        self._end_expected = expected

    async def kill(self) -> None:
        """Kill all of it at once and wait until it is reaped; harmless if it is away.

        Raises:
            KeeperError: it did not end.
        """
        self._end_expected = True
        ref = self.root
        if self._launcher is not None:
            await self._end_launched(self._launcher, 0.0)
            return
        if not (self.group is not None and self.group.kill()) and ref is not None:
            for pid in reversed(process.tree(ref.pid)):
                _signal(pid, signal.SIGKILL)
        await self.gone()

    async def terminate(self, grace_s: float) -> None:
        """Ask it to end; kill it after `grace_s` seconds.

        At once if that is 0, or if it could not listen: frozen, or its GPU state is away.
        """
        self._end_expected = True
        ref = self.root
        if self._launcher is not None:
            can_listen = not self.frozen and self.gpu == "on_device"
            await self._end_launched(self._launcher, grace_s if can_listen else 0.0)
            return
        if ref is not None and grace_s > 0 and not self.frozen and self.gpu == "on_device":
            _signal(ref.pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s):
                    await self._gone.wait()
            except TimeoutError:
                log.warning("event=kill_after_grace engine=%s", self._record.engine)
        await self.kill()

    async def _end_launched(self, launcher: Launcher, grace_s: float) -> None:
        if launcher.owned:
            await launcher.end(grace_s)
            await self.gone()
        else:  # nobody's to end but theirs who have started it
            self._forget()
            self._record.address = None
            self._save()
            if self._watcher is not None:
                self._watcher.cancel()  # its end is no longer our business
            self._gone.set()

    async def gone(self) -> None:
        """Wait until the root is reaped.

        Raises:
            KeeperError: it did not end.
        """
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await self._gone.wait()
        except TimeoutError as error:
            message = f"the processes of '{self._record.engine}' did not end"
            raise KeeperError(message) from error

    async def _watch(self, ref: ProcessRef) -> None:
        self._watcher = asyncio.current_task()
        status = "unknown"
        try:
            pidfd = ref.open()
        except ProcessLookupError:
            pidfd = None
        if pidfd is not None:
            try:
                await process.ended(pidfd)
                await self._leave_gpus()
                status = await process.reap(pidfd)
            finally:
                os.close(pidfd)
        if status == "unknown" and self._launcher is not None:
            status = await self._launcher.exit_status()
        self._forget()
        expected = self._end_expected
        if not expected and self._ours:
            self._kill_strays()
        self._save()
        self._gone.set()
        if not expected:
            log.warning("event=exited engine=%s status=%s", self._record.engine, status)
            self._exited(Exited(engine=self._record.engine, pid=ref.pid, status=status))

    @property
    def _ours(self) -> bool:
        return self._launcher is None or self._launcher.owned

    async def _leave_gpus(self) -> None:
        """Take what has outlived the root off its GPUs (a verb that moves it sees to that)."""
        alone = self._ours and not self._end_expected and self.gpu == "on_device"
        if self.leave_gpus is not None and alone and self.group is not None and self.group.pids():
            await self.leave_gpus()

    def _kill_strays(self) -> None:
        """Kill what an ended root left (inside a sandbox it takes its namespace along)."""
        if self.group is not None and self.group.pids():
            self.group.kill()

    def _save(self) -> None:
        """Write down what has happened already: a full disk does not undo it.

        The record of a move that has begun says `moving`, so a later keeper looks for itself.
        """
        try:
            records.save(self._path, self._record)
        except OSError as error:
            log.warning("event=record_not_written engine=%s error=%s", self._record.engine, error)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
