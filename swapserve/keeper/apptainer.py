"""Engines in containers of apptainer, which is a process of ours with the engine below it.

There is no daemon and no name: the program stays as the engine's first process, hands signals on,
and ends with it. So it is started, watched and ended like an engine without a container; only the
command line and the rights differ (it builds the container itself and drops them for the engine).

Tried with apptainer 1.4.5; options as in `apptainer exec --help`.
"""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

from swapserve.config.recipes import launch_argv, launch_env
from swapserve.config.schema import ModelConfig
from swapserve.errors import KeeperError, StartFailed
from swapserve.keeper import seccomp
from swapserve.keeper.containers import mounts
from swapserve.keeper.launch import Launched, execute, is_frozen
from swapserve.keeper.phases import Phases
from swapserve.keeper.sandbox import CACHE_DIR, SandboxSpec
from swapserve.system import process
from swapserve.system.cgroup import Cgroup
from swapserve.system.process import ProcessRef

KILL_TIMEOUT_S = 30.0
_LOOPBACK = "127.0.0.1"
_ENV_PREFIX = "APPTAINERENV_"
"""Sets a variable inside, whatever is in its value; `--env` would cut it at commas."""


class ApptainerLauncher:
    """One engine in a container of apptainer; it shares the host's network, on loopback.

    Args:
        model: with an image.
        program: asks for apptainer's program (KeeperError: there is none).
        port: of 127.0.0.1, at which it is to be reached.
        group: cgroup to start it in, None where there are none.
        log: file that its output goes to.
        cache: directory for what it compiles and keeps; its home directory.
        work: directory for its /tmp.
        seccomp_file: where to write the profile.
        gpu_paths: further host paths that engines on a GPU are shown, writable.
        log_tail: reads the end of `log`.
    """

    owned = True

    def __init__(
        self,
        model: ModelConfig,
        program: Path,
        *,
        port: int,
        group: Cgroup | None,
        log: Path,
        cache: Path,
        work: Path,
        seccomp_file: Path,
        log_tail: Callable[[int], str],
        gpu_paths: tuple[Path, ...] = (),
    ) -> None:
        self._model = model
        self._program = program
        self._port = port
        self._group = group
        self._log = log
        self._cache = cache
        self._work = work
        self._seccomp_file = seccomp_file
        self._log_tail = log_tail
        self._gpu_paths = gpu_paths
        self._root: ProcessRef | None = None

    async def launch(self, phases: Phases) -> Launched:
        """Start it; see `Launcher.launch`."""
        image = self._model.container_image or ""
        if not Path(image).exists():
            raise StartFailed(self._model.name, f"apptainer has no image {image}")
        with phases.phase("container"):
            try:
                await asyncio.to_thread(self._prepare)
            except OSError as error:
                raise StartFailed(self._model.name, str(error)) from error
            self._root = await execute(self._model.name, self.spec(), self._log_tail)
        return self._launched(self._root)

    async def find(self, known: ProcessRef | None) -> Launched | None:
        """Return what an earlier keeper had started, if it is still there."""
        if known is None or not known.alive():
            return None
        self._root = known
        return await asyncio.to_thread(self._launched, known)

    async def end(self, grace_s: float) -> None:
        """End it by TERM, which it hands on, then KILL; the keeper reaps it."""
        root = self._root
        if root is None:
            return
        try:
            pidfd = root.open()
        except ProcessLookupError:
            return
        try:
            if grace_s > 0 and not is_frozen(root.pid):
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                if await _ends(pidfd, grace_s):
                    return
            if self._group is None or not self._group.kill():
                for pid in reversed(process.tree(root.pid)):
                    _kill(pid)
            if not await _ends(pidfd, KILL_TIMEOUT_S):
                raise KeeperError(f"the processes of '{self._model.name}' did not end")
        finally:
            os.close(pidfd)

    async def pause(self, on: bool) -> bool:
        """Say that apptainer cannot."""
        return False

    async def log_tail(self, lines: int) -> str:
        """Return the last lines of its output."""
        return await asyncio.to_thread(self._log_tail, lines)

    async def exit_status(self) -> str:
        """Say nothing: it is the keeper's own child, which reaps it."""
        return "unknown"

    def spec(self) -> SandboxSpec:
        """Return the process that `launch` starts."""
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SWAPSERVE_", "APPTAINER", "SINGULARITY"))
        }
        inside = launch_env(self._model, host=_LOOPBACK, port=self._port)
        inside.setdefault("XDG_CACHE_HOME", CACHE_DIR)
        return SandboxSpec(
            argv=tuple(self._words()),
            env=env | {f"{_ENV_PREFIX}{name}": value for name, value in inside.items()},
            cwd=str(self._log.parent),
            log=str(self._log),
            root=None,
            netns=None,
            cgroups=(str(self._group.path),) if self._group else (),
            binds=(),
            tmpfs={},
            keeps_rights=True,
        )

    def _words(self) -> list[str]:
        model = self._model
        words = [str(self._program), "exec", "--containall", "--cleanenv", "--no-eval"]
        if os.geteuid() == 0:  # others have none to drop
            words += ["--no-privs", f"--security=seccomp:{self._seccomp_file}"]
        if model.gpus:
            words.append("--nv")
        words += ["--home", f"{self._cache}:{CACHE_DIR}", "--workdir", str(self._work)]
        for mount in mounts(model, self._cache, self._gpu_paths):
            if mount.target != CACHE_DIR:
                mode = "ro" if mount.read_only else "rw"
                words += ["--bind", f"{mount.source}:{mount.target}:{mode}"]
        argv = launch_argv(model, host=_LOOPBACK, port=self._port)
        return [*words, *model.recipe.container_args, model.container_image or "", *argv]

    def _prepare(self) -> None:
        seccomp.write(self._seccomp_file, chooses_errno=False)
        for directory in (self._cache, self._work, self._log.parent):
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)

    def _launched(self, root: ProcessRef) -> Launched:
        address = f"{_LOOPBACK}:{self._port}"
        return Launched(root=root, group=self._group, address=address, frozen=is_frozen(root.pid))


async def _ends(pidfd: int, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await process.ended(pidfd)
    except TimeoutError:
        return False
    return True


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
