"""The mechanism without SwapServe: fork, exec `criu restore`, ask the engine itself.

Written out here with nothing between: no daemon, no keeper, no event loop. The sandbox (network
namespace, root directory) and the golden image are those that the keeper made, and the options are
the keeper's, so what remains of a difference is SwapServe's own. A test compares the options.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.engines import Missing
from evaluation.stream import Answer, ask
from swapserve.ids import EngineName
from swapserve.keeper import record
from swapserve.keeper.context import Context
from swapserve.keeper.hugepages import HugePages
from swapserve.keeper.sandbox import slug
from swapserve.system import linux
from swapserve.system.cgroup import Cgroup, mount_point
from swapserve.system.tools import find_criu

OPTIONS = (
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
NETNS_KEY = "engine"
LOG_LINES = 12
_EXEC_FAILED = 127


class BareFailed(Exception):
    """CRIU itself failed; says what its log says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Where the keeper keeps one engine, whose golden image is to be restored.

    Attributes:
        address: of the engine, `host:port`.
        image: directory that CRIU reads.
        netns: file of its network namespace.
        root: directory that becomes its `/`.
        binds: host path by CRIU key.
    """

    address: str
    image: Path
    netns: Path
    root: Path
    binds: dict[str, str]


def locate(context: Context, model: EngineName) -> Engine:
    """Find everything of an engine that the keeper of `context` has made.

    Raises:
        Missing: it has no golden image, or no sandbox.
    """
    kept = record.load(context.record_path(model))
    manifest = context.images.manifest(slug(model), "golden")
    if kept is None or kept.index is None or manifest is None:
        raise Missing(f"{model} has no sandbox or no golden image, so nothing can be restored")
    network = context.network(kept.index)
    return Engine(
        address=f"{network.engine_ip}:{kept.port}",
        image=context.images.path(slug(model), "golden") / "criu",
        netns=network.path,
        root=context.engine_dir(model) / "root",
        binds=manifest.binds,
    )


class Bare:
    """Restores and kills engines; makes the calling process their parent."""

    def __init__(self, work: Path) -> None:
        criu = find_criu()
        if criu is None:
            raise Missing("no criu on PATH or in the private prefix; run scripts/host-setup")
        self._criu = criu
        self._work = work
        self._log = work / "bare-restore.log"
        self._journal = work / "huge-pages-journal"
        mount = mount_point()
        self._group = Cgroup(mount / f"swapserve-evaluation-{os.getpid()}") if mount else None
        linux.become_subreaper()

    @contextmanager
    def restored(
        self, engine: Engine, body: dict[str, Any], *, huge_pages: bool
    ) -> Iterator["Restored"]:
        """Restore, ask, and kill at the end of the block.

        Raises:
            BareFailed: CRIU failed.
            StreamFailed: the restored engine did.
        """
        found = Restored()
        pidfile = self._work / "bare.pid"
        with ExitStack() as stack:
            netns = os.open(engine.netns, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, netns)
            argv = self._argv(engine, netns, pidfile)
            pidfile.unlink(missing_ok=True)
            if self._group is not None:
                self._group.make()
                stack.callback(self._group.remove)
            # Set as the keeper sets it: for the time of the restore, and put back.
            switch = stack.enter_context(ExitStack())
            switch.enter_context(HugePages(self._journal, wanted=huge_pages).during_restore())
            started = time.monotonic()
            status = self._run(argv, engine.root, netns)
            switch.close()
            found.restore_s = time.monotonic() - started
            if status != 0 or not pidfile.exists():
                raise BareFailed(f"criu restore ended with {status}:\n{self._log_tail()}")
            pid = int(pidfile.read_text())
            try:
                answer = ask(engine.address, body, started=started)
                found.answer, found.first_token_s = answer, answer.first_token_s
                yield found
            finally:
                found.kill_s = self._kill(pid)

    def _argv(self, engine: Engine, netns: int, pidfile: Path) -> list[str]:
        argv = [str(self._criu), "restore", "-D", str(engine.image)]
        argv += ["-o", str(self._log), *OPTIONS]
        argv += ["--inherit-fd", f"fd[{netns}]:{NETNS_KEY}", "--root", str(engine.root)]
        argv += ["-d", "-S", "--pidfile", str(pidfile)]
        for key, source in engine.binds.items():
            argv += ["--external", f"mnt[{key}]:{source}"]
        return argv

    def _run(self, argv: list[str], root: Path, netns: int) -> int:
        """Fork and exec; return the exit status."""
        child = os.fork()
        if child == 0:
            try:
                os.set_inheritable(netns, True)
                self._enter(root)
                os.execv(argv[0], argv)  # noqa: S606 - an argument list, no shell
            finally:
                os._exit(_EXEC_FAILED)
        try:
            _, status = os.waitpid(child, 0)
        except BaseException:
            self._clear(child)
            raise
        return os.waitstatus_to_exitcode(status)

    def _clear(self, criu: int) -> None:
        """End a restore that was interrupted, and what it has restored so far."""
        left = {criu} | (self._group.pids() if self._group else set())
        if self._group is None or not self._group.kill():
            os.kill(criu, signal.SIGKILL)
        for pid in left:
            with suppress(ChildProcessError):  # not ours, but of another that is killed with it
                os.waitpid(pid, 0)

    def _enter(self, root: Path) -> None:
        """CRIU needs the root to be a mount point; a namespace of its own keeps the host clean."""
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(quiet, number)
        os.setsid()
        if self._group is not None:
            self._group.enter()
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
        linux.bind(str(root), str(root), read_only=False)

    def _kill(self, pid: int) -> float:
        """Kill the engine and reap it; return the seconds that takes."""
        started = time.monotonic()
        if self._group is None or not self._group.kill():
            os.kill(pid, signal.SIGKILL)  # the first process of a namespace takes all along
        os.waitpid(pid, 0)
        return time.monotonic() - started

    def _log_tail(self) -> str:
        lines = []
        if self._log.exists():
            lines = self._log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line]
        return "\n".join((errors or lines)[-LOG_LINES:])


@dataclass(slots=True)
class Restored:
    """What one bare restore took; `kill_s` is known after the block."""

    restore_s: float = 0.0
    first_token_s: float = 0.0
    kill_s: float = 0.0
    answer: Answer | None = None
