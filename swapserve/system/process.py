"""Processes by identity (pid and start time), their trees, their memory, and their end."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import psutil

REAP_POLL_S = 0.005
STOP_POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """A process that cannot be mistaken for a later one with the same pid.

    Attributes:
        pid: as this process sees it.
        start_ticks: field 22 of /proc/PID/stat (clock ticks since boot).
    """

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> "ProcessRef":
        """Identify a running process.

        Raises:
            ProcessLookupError: there is none.
        """
        ticks = _start_ticks(pid)
        if ticks is None:
            raise ProcessLookupError(pid)
        return cls(pid, ticks)

    def alive(self) -> bool:
        """Whether this very process runs (a zombie does not)."""
        return _start_ticks(self.pid) == self.start_ticks

    def ending(self) -> bool:
        """Whether it is over, or on its way out: its memory goes before it becomes a zombie."""
        if not self.alive():
            return True
        try:
            return Path(f"/proc/{self.pid}/statm").read_bytes().startswith(b"0 ")
        except OSError:
            return True

    def open(self) -> int:
        """Return a pidfd of this very process; the caller closes it.

        Raises:
            ProcessLookupError: it is gone.
        """
        pidfd = os.pidfd_open(self.pid)
        if _start_ticks(self.pid, zombies=True) != self.start_ticks:
            os.close(pidfd)
            raise ProcessLookupError(self.pid)
        return pidfd


def _start_ticks(pid: int, *, zombies: bool = False) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name may hold spaces and brackets
    if fields[0] in {b"Z", b"X"} and not zombies:
        return None
    return int(fields[19])


def stopped(pid: int) -> bool | None:
    """Whether a signal has stopped the process; None if it is over.

    Also true where it waits in the kernel and will stop before it does anything more: the parent
    of a `vfork` waits like that for its child, which may itself be stopped before its `exec`.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        state = stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3]
        if state == b"D":
            return _stop_pending(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return None if state in {b"Z", b"X"} else state == b"T"


def _stop_pending(status: str) -> bool:
    """Whether /proc/PID/status tells of a SIGSTOP that is still to be taken."""
    pending = next(line for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending.split()[1], 16) >> (signal.SIGSTOP - 1) & 1)


async def stop_tree(root: int, on: bool, *, timeout_s: float) -> None:
    """Stop all of a process tree by signals, or let it continue, and wait until that is true.

    Over and over, since processes may be forked meanwhile.

    Raises:
        TimeoutError: it never was; a stop is taken back.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while moving := [pid for pid in tree(root) if stopped(pid) is (not on)]:
                for pid in moving:
                    _signal(pid, signal.SIGSTOP if on else signal.SIGCONT)
                await asyncio.sleep(STOP_POLL_S)
    except TimeoutError:
        if on:
            for pid in tree(root):
                _signal(pid, signal.SIGCONT)
        raise


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


async def ended(pidfd: int) -> None:
    """Wait until the process is over (it may still have to be reaped)."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        loop.remove_reader(pidfd)
        if not over.done():
            over.set_result(None)

    loop.add_reader(pidfd, wake)
    try:
        await over
    finally:
        loop.remove_reader(pidfd)


def _collect(pidfd: int) -> os.waitid_result | None:
    return os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


async def reap(pidfd: int) -> str:
    """Collect an ended process: `exit 1`, `signal SIGKILL`, or `unknown` if it is not our child.

    As long as a tracer holds on to it (CRIU, to what it has just dumped), only that one may.
    """
    try:
        while (end := _collect(pidfd)) is None:  # noqa: ASYNC110 - no event tells of its release
            await asyncio.sleep(REAP_POLL_S)
    except ChildProcessError:
        return "unknown"
    if end.si_code == os.CLD_EXITED:
        return f"exit {end.si_status}"
    return f"signal {signal.Signals(end.si_status).name}"


def reap_orphans(keep: Collection[int]) -> int:
    """Collect ended children of ours that nobody waits for; return how many there were.

    A subreaper is given what others leave behind, such as the half restored tree of a CRIU that
    failed, and an engine's processes that outlived their first one.
    """
    count = 0
    for pid in _children(os.getpid()):
        if pid not in keep and _start_ticks(pid) is None:
            with contextlib.suppress(ChildProcessError):
                count += os.waitpid(pid, os.WNOHANG)[0] == pid
    return count


def tree(root: int) -> list[int]:
    """Return the pids of a process and all its descendants, the root first.

    The walk is over every thread's children, and repeated until two walks agree, so that a
    process forked meanwhile is not missed.
    """
    seen = _walk(root)
    while (again := _walk(root)) != seen:
        seen = again
    return seen


def _walk(root: int) -> list[int]:
    found = [root]
    for pid in found:
        found.extend(_children(pid))
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found.extend(int(child) for child in children.read_text().split())
        except OSError:
            continue
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a process tree: its proportional share of memory, and what an image would hold."""

    pss: int
    dump: int


def memory(root: int) -> Memory:
    """Measure a process tree (blocks for milliseconds per GB: call it in a thread).

    Raises:
        ProcessLookupError: the root is gone.
    """
    pss = dump = 0
    for pid in tree(root):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            if pid == root:
                raise ProcessLookupError(pid) from None
            continue
        values = {line.split(":")[0]: line.split() for line in rollup.splitlines()[1:]}
        pss += int(values["Pss"][1]) * 1024
        dump += (int(values["Pss_Anon"][1]) + int(values["Pss_Shmem"][1])) * 1024
    return Memory(pss=pss, dump=dump)


def total_memory() -> int:
    """Return the machine's RAM in bytes."""
    return psutil.virtual_memory().total


def mapped_files(root: int) -> set[str]:
    """Return the paths of all files that the tree has mapped, as the tree sees them."""
    files: set[str] = set()
    for pid in tree(root):
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        for line in maps.splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):  # noqa: PLR2004
                files.add(fields[5])
    return files
