"""How an engine comes to run: the contract of a start, whatever is started, and its cgroup.

A process of this machine is started by `Place` and `sandbox_init`; a container by
`containers.ContainerLauncher` or `apptainer.ApptainerLauncher`; an engine that others have started
is found by `attach.AttachedLauncher`. What comes after (freeze, suspend, resume, measure, notice
the end) needs no more than a `Launched`.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swapserve.errors import CommandError, StartFailed
from swapserve.keeper.phases import Phases
from swapserve.keeper.sandbox import SandboxSpec
from swapserve.system import process
from swapserve.system.cgroup import Cgroup, group_of
from swapserve.system.command import run
from swapserve.system.process import ProcessRef

SPAWN_TIMEOUT_S = 60.0
LOG_TAIL_LINES = 25
GROUP_LOOKS = 3
"""How often a cgroup is compared with a tree: processes come and go between the two looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """An engine that runs.

    Attributes:
        root: its first process; the engine is that one and all below it.
        group: a cgroup v2 with this engine in it and nobody else; None: it has none.
        address: `host:port` at which the daemon reaches it.
        frozen: whether something holds it frozen; never after a `launch`.
    """

    root: ProcessRef
    group: Cgroup | None
    address: str
    frozen: bool = False


class Launcher(Protocol):
    """Starts one engine, or finds it, and ends it.

    Each call is bounded by timeouts of its own. None is to be called while another one of the
    same engine is under way.
    """

    @property
    def owned(self) -> bool:
        """Whether it is ours to end. If not, it is never signalled but to freeze it."""

    async def launch(self, phases: Phases) -> Launched:
        """Start it (an attached one: find it). What is left of an earlier start is removed.

        Raises:
            StartFailed: with the reason and its last words; nothing of it is left.

        Cancellation:
            A container may be left; the next `launch`, `end` or sweep removes it.
        """

    async def find(self, known: ProcessRef | None) -> Launched | None:
        """Return what an earlier keeper left; None if it does not run any more.

        Args:
            known: its first process, as that keeper noted it; None: it noted none.

        Raises:
            KeeperError: nobody can tell.
        """

    async def end(self, grace_s: float) -> None:
        """End it the way of its runtime and remove what is left of it; harmless if it is gone.

        Frozen or not: without `grace_s` it is killed at once. Nothing happens to one that is not
        `owned`.

        Raises:
            KeeperError: it is still there.
        """

    async def pause(self, on: bool) -> bool:
        """Freeze or thaw it by its runtime, for one without a `group`.

        Returns:
            False if its runtime cannot: signals are left.

        Raises:
            KeeperError: the runtime failed; nobody knows whether it runs.
        """

    async def log_tail(self, lines: int) -> str:
        """Return the last lines of its output, as far as its runtime keeps them; else nothing."""

    async def exit_status(self) -> str:
        """Return how it ended: `exit 1`, `signal SIGKILL`, or `unknown`."""


def own_group(root: int) -> Cgroup | None:
    """Return the cgroup that holds this tree and nothing else; None if there is none.

    Freezing or killing a group hits all of it, so a stranger in it rules it out: a user's session,
    a service with two engines, our own. Processes in the tree's own PID namespace are no strangers
    (`docker exec`). Blocks for a walk over the tree.
    """
    for _ in range(GROUP_LOOKS):
        group = group_of(root)
        if group is None or _is_above_us(group):
            return None
        tree = {pid for pid in process.tree(root) if process.stopped(pid) is not None}
        inside = _members(group)
        if tree and tree <= inside and not _strangers(inside - tree, root):
            return group
    return None


def is_frozen(root: int) -> bool:
    """Whether a signal or a cgroup holds a process frozen."""
    group = group_of(root)
    return process.stopped(root) is True or (group is not None and group.frozen())


async def execute(engine: str, spec: SandboxSpec, log_tail: Callable[[int], str]) -> ProcessRef:
    """Start a process as the keeper's own child, by `sandbox_init`.

    Raises:
        StartFailed: it could not be executed, or ended at once; nothing of it is left.
    """
    argv = [sys.executable, "-m", "swapserve.keeper.sandbox_init"]
    order = json.dumps({**spec.as_json(), "parent": os.getpid()}).encode()
    try:
        done = await run(argv, timeout_s=SPAWN_TIMEOUT_S, stdin=order)
        return ProcessRef.of(json.loads(done.stdout)["pid"])
    except ProcessLookupError as error:
        tail = await asyncio.to_thread(log_tail, LOG_TAIL_LINES)
        raise StartFailed(engine, "it ended at once", tail) from error
    except (CommandError, ValueError, KeyError) as error:
        reason = error.output_tail if isinstance(error, CommandError) else str(error)
        raise StartFailed(engine, reason) from error


def _strangers(others: set[int], root: int) -> bool:
    namespace = _pid_namespace(root)
    if namespace is None or namespace == _pid_namespace(os.getpid()):
        return bool(others)
    return any(_pid_namespace(pid) != namespace for pid in others)


def _is_above_us(group: Cgroup) -> bool:
    own = group_of(os.getpid())
    return own is not None and own.path.is_relative_to(group.path)


def _members(group: Cgroup) -> set[int]:
    """Return the processes in a group and in the groups below it."""
    found: set[int] = set()
    for listed in group.path.rglob("cgroup.procs"):
        found |= Cgroup(listed.parent).pids()
    return found


def _pid_namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return None
