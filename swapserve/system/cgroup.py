"""A cgroup v2 group per engine: freeze it, thaw it, kill it whole.

Works in the v2 hierarchy also where the controllers are v1 (`/sys/fs/cgroup/unified`): freezing
and killing are core features of cgroup v2 (kernel Documentation/admin-guide/cgroup-v2.rst).
"""

import asyncio
import os
from pathlib import Path

POLL_S = 0.005


def mount_point() -> Path | None:
    """Return where the cgroup v2 hierarchy is mounted, None if nowhere."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.split()[0] == "cgroup2":
            return Path(left.split()[4])
    return None


class Cgroup:
    """One group, made on demand; its directory may be removed when no process is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Create it (and its parents).

        Raises:
            OSError: no right to.
        """
        self.path.mkdir(parents=True, exist_ok=True)

    def pids(self) -> set[int]:
        """Return the processes in it; empty if it does not exist."""
        try:
            return {int(pid) for pid in (self.path / "cgroup.procs").read_text().split()}
        except FileNotFoundError:
            return set()

    def add(self, pid: int) -> None:
        """Move a process into it."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def enter(self) -> None:
        """Move the calling process into it."""
        self.add(os.getpid())

    async def freeze(self, on: bool, *, timeout_s: float) -> None:
        """Freeze or thaw everything in it and wait until that is true.

        Raises:
            TimeoutError: with the processes still in the old state; the request stays in force.
        """
        (self.path / "cgroup.freeze").write_text("1" if on else "0")
        wanted = f"frozen {int(on)}"
        async with asyncio.timeout(timeout_s):
            while wanted not in (self.path / "cgroup.events").read_text().splitlines():  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)

    def frozen(self) -> bool:
        """Whether all of it is frozen, by this group or one above it; False if it is gone."""
        try:
            return "frozen 1" in (self.path / "cgroup.events").read_text().splitlines()
        except OSError:
            return False

    def let_run(self) -> None:
        """Ask for a thaw and do not wait for it; harmless if the group is gone."""
        try:
            (self.path / "cgroup.freeze").write_text("0")
        except OSError:
            return

    def kill(self) -> bool:
        """Send SIGKILL to everything in it, frozen or not; False if it cannot be done this way."""
        try:
            (self.path / "cgroup.kill").write_text("1")
        except OSError:
            return False
        return True

    def remove(self) -> None:
        """Remove it if it exists and is empty; its children first."""
        if not self.path.is_dir():
            return
        for child in self.path.iterdir():
            if child.is_dir():
                Cgroup(child).remove()
        try:
            self.path.rmdir()
        except OSError:
            return  # busy: a process is still ending; the next start of a keeper sweeps it


def group_of(pid: int) -> Cgroup | None:
    """Return the v2 group that a process is in; None if that is the root, or cannot be told.

    A group above this process's own cgroup namespace cannot be told: its path begins with `/..`.
    """
    mount = mount_point()
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    if mount is None or path == "/" or path.startswith("/.."):
        return None
    group = Cgroup(mount / path.lstrip("/"))
    return group if group.path.is_dir() else None
