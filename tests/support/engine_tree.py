"""An engine's tree as the keeper has it, on real processes: a shell is the engine."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from swapserve.keeper import record as records
from swapserve.keeper.launch import Launcher
from swapserve.keeper.protocol import Exited
from swapserve.keeper.record import Record
from swapserve.keeper.tree import EngineTree
from swapserve.system.cgroup import Cgroup
from swapserve.system.process import ProcessRef

QUIET = "sleep 300 & wait"


@dataclass
class Here:
    """A tree, the first process of its engine, and what was told of ends."""

    tree: EngineTree
    path: Path
    root: subprocess.Popen[bytes]
    exits: list[Exited] = field(default_factory=list)

    def noted(self) -> Record:
        found = records.load(self.path)
        assert found is not None
        return found


@asynccontextmanager
async def engine(
    tmp_path: Path,
    script: str = QUIET,
    group: Cgroup | None = None,
    launcher: Launcher | None = None,
) -> AsyncIterator[Here]:
    """Run a shell as an engine."""
    path = tmp_path / "a.json"
    exits: list[Exited] = []
    async with asyncio.TaskGroup() as tasks:

        async def watch(work: Awaitable[None]) -> None:
            await work

        tree = EngineTree(
            Record(engine="a", index=None, port=1),
            path,
            group,
            start_watch=lambda work: _keep(tasks.create_task(watch(work))),
            exited=exits.append,
            launcher=launcher,
        )
        root = spawn("sh", "-c", script)
        tree.adopt(ProcessRef.of(root.pid), restored_from=None)
        try:
            yield Here(tree, path, root, exits)
        finally:
            await tree.kill()
            root.wait()


def _keep(task: "asyncio.Task[None]") -> None:
    """The group holds it."""
    assert not task.cancelled()


def spawn(*argv: str) -> "subprocess.Popen[bytes]":
    """Start what an engine's tree is to adopt; whoever does waits for its end."""
    return subprocess.Popen(argv, start_new_session=True)
