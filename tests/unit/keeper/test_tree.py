"""The processes of one engine without cgroups: stopped by signals, ended, and what is noted."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from swapserve.errors import KeeperError
from swapserve.keeper import tree as trees
from swapserve.keeper.launch import Launched
from swapserve.keeper.phases import Phases
from swapserve.keeper.tree import EngineTree
from swapserve.system import process
from swapserve.system.cgroup import Cgroup
from swapserve.system.process import ProcessRef
from tests.support.engine_tree import Here, engine, spawn
from tests.support.leaks import wait_for

pytestmark = pytest.mark.anyio

FORKING = "while :; do sleep 0.003; done"


def whole(here: Here) -> list[int]:
    return process.tree(here.root.pid)


def with_child(here: Here) -> set[int]:
    """Return all of it once the root has started what it starts."""
    wait_for("a child", lambda: len(whole(here)) == 2)
    return set(whole(here))


async def test_all_of_it_stops_also_what_is_forked_meanwhile(tmp_path: Path) -> None:
    async with engine(tmp_path, FORKING) as here:
        for _ in range(10):
            await here.tree.freeze(True)
            assert here.tree.frozen
            assert here.noted().frozen
            before = whole(here)
            await asyncio.sleep(0.02)
            assert whole(here) == before
            assert all(process.stopped(pid) is not False for pid in before)
            await here.tree.freeze(False)
            assert not here.noted().frozen
            await asyncio.sleep(0.01)
        first = set(whole(here))
        wait_for("it goes on", lambda: set(whole(here)) != first)


async def test_it_can_be_killed_while_it_is_frozen(tmp_path: Path) -> None:
    async with engine(tmp_path) as here:
        await here.tree.freeze(True)
        pids = whole(here)
        await here.tree.kill()
        assert here.tree.root is None
        assert not here.tree.frozen
        assert not here.noted().frozen
        assert here.exits == [], "it was asked for"
        wait_for("all ended", lambda: all(process.stopped(pid) is None for pid in pids))


async def test_a_parent_that_waits_for_a_stopped_child_of_vfork_counts_as_stopped(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "fifo")
    spawn = (
        "import os\nopens = [(os.POSIX_SPAWN_OPEN, 0, 'fifo', os.O_RDONLY, 0)]\n"
        "os.posix_spawn('/bin/sleep', ['sleep', '300'], {}, file_actions=opens)\n"
        "open('spawned', 'w').close()\nos.wait()"
    )
    script = f'cd {tmp_path}; exec {sys.executable} -c "{spawn}"'
    async with engine(tmp_path, script) as here:
        with_child(here)
        await here.tree.freeze(True)
        assert all(map(process.stopped, whole(here)))
        await here.tree.freeze(False)
        with (tmp_path / "fifo").open("w"):
            wait_for("it goes on", (tmp_path / "spawned").exists)
        assert not any(map(process.stopped, whole(here)))


async def test_one_that_was_stopped_by_somebody_else_is_thawed_too(tmp_path: Path) -> None:
    async with engine(tmp_path) as here:
        with_child(here)
        child = whole(here)[-1]
        os.kill(child, signal.SIGSTOP)
        wait_for("stopped", lambda: process.stopped(child) is True)
        await here.tree.freeze(False)
        assert process.stopped(child) is False


async def test_what_has_ended_cannot_be_frozen(tmp_path: Path) -> None:
    async with engine(tmp_path) as here:
        await here.tree.kill()
        with pytest.raises(KeeperError, match="has ended"):
            await here.tree.freeze(True)


async def test_an_end_in_the_middle_of_a_freeze_is_no_freeze(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that cannot be stopped keeps the freeze waiting until all is killed."""
    real = process.stopped
    monkeypatch.setattr(process, "stopped", lambda pid: None if real(pid) is None else False)
    async with engine(tmp_path) as here, asyncio.TaskGroup() as tasks:
        freezing = tasks.create_task(_refused(here.tree))
        await asyncio.sleep(0.02)
        os.kill(here.root.pid, signal.SIGKILL)
        assert "has ended" in str(await freezing)
        await here.tree.gone()
        assert not here.tree.frozen
        assert [exited.status for exited in here.exits] == ["signal SIGKILL"]


async def _refused(tree: EngineTree) -> KeeperError:
    with pytest.raises(KeeperError) as refused:
        await tree.freeze(True)
    return refused.value


async def test_what_does_not_come_to_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "FREEZE_TIMEOUT_S", 0.1)
    async with engine(tmp_path) as here:
        with monkeypatch.context() as patch:
            patch.setattr(process, "stopped", lambda _: False)
            with pytest.raises(TimeoutError):
                await here.tree.freeze(True)
        assert not here.tree.frozen
        wait_for("none is stopped", lambda: not any(map(process.stopped, whole(here))))


class Group(Cgroup):
    """A group without a cgroup file system: the root and what it has started."""

    def __init__(self, path: Path, said: list[str]) -> None:
        super().__init__(path)
        self.said = said
        self.members: set[int] = set()

    def pids(self) -> set[int]:
        return {pid for pid in self.members if process.stopped(pid) is not None}

    def kill(self) -> bool:
        self.said.append("kill")
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        return True


@pytest.mark.parametrize("gpu", ["on_device", "moving"])
async def test_what_outlives_its_root_leaves_its_gpus_before_it_is_killed(
    tmp_path: Path, gpu: str
) -> None:
    """Where a verb is moving it, that one decides: it may wait for this very end."""
    said: list[str] = []

    async def leave() -> None:
        assert here.tree.root is not None, "its processes are found by it"
        said.append("leave")

    group = Group(tmp_path, said)
    async with engine(tmp_path, group=group) as here:
        group.members = with_child(here)
        here.tree.leave_gpus = leave
        if gpu == "moving":
            here.tree.gpu_moves({})
        os.kill(here.root.pid, signal.SIGKILL)
        await here.tree.gone()
        assert said == (["leave", "kill"] if gpu == "on_device" else ["kill"])
        wait_for("no stray", lambda: not group.pids())


async def test_an_end_that_was_asked_for_has_left_its_gpus_already(tmp_path: Path) -> None:
    said: list[str] = []
    group = Group(tmp_path, said)
    async with engine(tmp_path, group=group) as here:
        group.members = with_child(here)

        async def leave() -> None:
            said.append("leave")

        here.tree.leave_gpus = leave
        await here.tree.kill()
        assert said == ["kill"]


async def test_what_others_have_started_is_left_to_them(tmp_path: Path) -> None:
    said: list[str] = []
    group = Group(tmp_path, said)
    async with engine(tmp_path, group=group, launcher=Theirs()) as here:
        group.members = with_child(here)

        async def leave() -> None:
            said.append("leave")

        here.tree.leave_gpus = leave
        os.kill(here.root.pid, signal.SIGKILL)
        await here.tree.gone()
        assert said == []
        assert group.pids(), "what it has started is not ours to end either"
        group.kill()


class Theirs:
    """A launcher that has started nothing."""

    owned = False

    async def launch(self, phases: Phases) -> Launched:
        raise AssertionError

    async def find(self, known: ProcessRef | None) -> Launched | None:
        return None

    async def end(self, grace_s: float) -> None:
        """Leave it alone."""

    async def pause(self, on: bool) -> bool:
        return False

    async def log_tail(self, lines: int) -> str:
        return ""

    async def exit_status(self) -> str:
        return "unknown"


class TestFullDisk:
    """The record cannot be written any more."""

    async def test_its_end_is_noticed_all_the_same(self, tmp_path: Path) -> None:
        async with engine(_made(tmp_path / "records")) as here:
            _lost(here.path.parent)
            await here.tree.kill()
            assert here.tree.root is None

    async def test_no_move_of_gpu_state_begins(self, tmp_path: Path) -> None:
        async with engine(_made(tmp_path / "records")) as here:
            _lost(here.path.parent)
            with pytest.raises(OSError, match=r"a\.tmp"):
                here.tree.gpu_moves({})
            assert here.tree.gpu == "on_device"

    async def test_a_move_that_has_begun_ends(self, tmp_path: Path) -> None:
        async with engine(_made(tmp_path / "records")) as here:
            here.tree.gpu_moves({"GPU-0": 5})
            assert here.noted().gpu == "moving"
            assert here.noted().device_bytes == {"GPU-0": 5}
            _lost(here.path.parent)
            here.tree.gpu_in_host_memory((), {"GPU-0": 7})
            await here.tree.freeze(True)
            assert (here.tree.gpu, here.tree.frozen) == ("in_host_memory", True)
            await here.tree.freeze(False)
            here.tree.gpu_on_device(revived=True)
            assert (here.tree.gpu, here.tree.revived) == ("on_device", True)

    async def test_a_process_that_cannot_be_noted_can_be_ended(self, tmp_path: Path) -> None:
        async with engine(_made(tmp_path / "records")) as here:
            await here.tree.kill()
            _lost(here.path.parent)
            again = spawn("sleep", "300")
            with pytest.raises(OSError, match=r"a\.tmp"):
                here.tree.adopt(ProcessRef.of(again.pid), restored_from=None)
            await here.tree.kill()
            again.wait()
            assert here.tree.root is None


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _lost(directory: Path) -> None:
    """Make a directory in which nothing can be written: not by root either."""
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
