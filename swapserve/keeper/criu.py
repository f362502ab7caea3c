"""CRIU: dump and restore of one sandboxed process tree.

Options follow CRIU 4.2's `criu(8)`; each is here because an engine needs it:
`--tcp-established` keeps streams in flight, `--link-remap` and `--file-locks` for vLLM's deleted
and locked files, `--ext-unix-sk` for its sockets in /tmp, `--manage-cgroups=ignore` because the
restored tree is put into our own group by starting CRIU there, `-S` makes it our own child.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from swapserve.errors import CommandError, CommandTimeout, CriuError
from swapserve.keeper.sandbox import Bind
from swapserve.system import linux
from swapserve.system.cgroup import Cgroup
from swapserve.system.command import run

NETNS_KEY = "engine"
LEAST_VERSION = (4, 0)
VERSION_TIMEOUT_S = 10.0
_COMMON = (
    "--tcp-established",
    "--shell-job",
    "--ext-unix-sk",
    "--file-locks",
    "--link-remap",
    "--manage-cgroups=ignore",
    "--network-lock",
    "nftables",
    "-v2",
)
_TAIL_LINES = 12
_KILLED = (-9, -15)


class Criu:
    """One CRIU binary."""

    def __init__(self, binary: Path) -> None:
        self.binary = binary
        self.version = ""

    async def check(self) -> None:
        """Find out its version.

        Raises:
            CommandError: it does not run.
            CriuError: it is too old.
        """
        done = await run([str(self.binary), "--version"], timeout_s=VERSION_TIMEOUT_S)
        match = re.search(r"Version: (\d+)\.(\d+)(\S*)", done.stdout)
        if match is None or (int(match[1]), int(match[2])) < LEAST_VERSION:
            found = done.stdout.strip() or "no version"
            raise CriuError("-", "version", f"{self.binary} says {found}; 4.0 or later is needed")
        self.version = match[0].removeprefix("Version: ")

    async def dump(
        self,
        engine: str,
        pid: int,
        directory: Path,
        *,
        netns_inode: int,
        binds: tuple[Bind, ...],
        leave_running: bool,
        frozen_group: Path | None,
        timeout_s: float,
    ) -> None:
        """Write the tree's image into `directory`; unless `leave_running`, the tree is gone then.

        Args:
            engine: for errors.
            pid: host pid of the tree's root.
            directory: empty, ours.
            netns_inode: of the tree's network namespace, which stays.
            binds: mounts that are the host's, not the engine's.
            leave_running: for a golden image.
            frozen_group: cgroup v2 directory if the tree is frozen in it, so that CRIU thaws it.
            timeout_s: CRIU is killed after it.

        Raises:
            CriuError: `killed` tells whether CRIU could not undo its work; else the tree runs on
                as before.
        """
        argv = [str(self.binary), "dump", "-t", str(pid), "-D", str(directory), "-o", "dump.log"]
        argv += [*_COMMON, "--external", f"net[{netns_inode}]:{NETNS_KEY}"]
        for bind in binds:
            argv += ["--external", f"mnt[{bind.target}]:{bind.key}"]
        if leave_running:
            argv.append("--leave-running")
        if frozen_group is not None:
            argv += ["--freeze-cgroup", str(frozen_group)]
        await self._run(engine, "dump", argv, directory / "dump.log", timeout_s=timeout_s)

    async def restore(
        self,
        engine: str,
        directory: Path,
        *,
        pidfile: Path,
        netns: Path,
        binds: dict[str, str],
        root: Path,
        group: Cgroup | None,
        timeout_s: float,
    ) -> int:
        """Restore an image and return the host pid of its root, now our own child.

        Args:
            engine: for errors.
            directory: the image.
            pidfile: CRIU writes here; removed first.
            netns: file of the network namespace to restore into.
            binds: host path by key, as in the image's manifest.
            root: directory that becomes the tree's `/`.
            group: cgroup that the tree is to live in.
            timeout_s: CRIU is killed after it.

        Raises:
            CriuError: nothing of the tree runs.
        """
        pidfile.unlink(missing_ok=True)
        fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            argv = [str(self.binary), "restore", "-D", str(directory), "-o", "restore.log"]
            argv += [*_COMMON, "--inherit-fd", f"fd[{fd}]:{NETNS_KEY}", "--root", str(root)]
            argv += ["-d", "-S", "--pidfile", str(pidfile)]
            for key, source in binds.items():
                argv += ["--external", f"mnt[{key}]:{source}"]
            await self._run(
                engine,
                "restore",
                argv,
                directory / "restore.log",
                timeout_s=timeout_s,
                pass_fds=(fd,),
                preexec=_place(root, group),
            )
        finally:
            os.close(fd)
        return int(pidfile.read_text())

    async def _run(
        self,
        engine: str,
        phase: str,
        argv: list[str],
        log: Path,
        *,
        timeout_s: float,
        pass_fds: tuple[int, ...] = (),
        preexec: Callable[[], None] | None = None,
    ) -> None:
        try:
            await run(argv, timeout_s=timeout_s, pass_fds=pass_fds, preexec=preexec)
        except CommandTimeout as error:
            raise CriuError(
                engine, phase, f"CRIU did not end within {timeout_s:.0f} s", tail(log), killed=True
            ) from error
        except CommandError as error:
            message = f"CRIU exited with {error.status}"
            raise CriuError(
                engine, phase, message, tail(log), killed=error.status in _KILLED
            ) from error


def tail(log: Path) -> str:
    """Return what CRIU's log says of the failure: its error lines, then its last ones."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "(CRIU wrote no log)"
    errors = [line for line in lines if "Error" in line]
    return "\n".join((errors or lines)[-_TAIL_LINES:])


def _place(root: Path, group: Cgroup | None) -> Callable[[], None]:
    def enter() -> None:
        """Enter the engine's group, and a mount namespace where its root is a mount point."""
        if group is not None:
            group.enter()
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
        linux.bind(str(root), str(root), read_only=False)

    return enter
