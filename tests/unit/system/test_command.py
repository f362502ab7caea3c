"""Tools run to their end, and nothing of them stays when they do not."""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swapserve.errors import CommandError, CommandTimeout
from swapserve.system.command import run, run_sync

PYTHON = sys.executable


def gone(pid: int) -> bool:
    """Whether no process has that pid (a zombie still has it)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def until(probe: Callable[[], bool]) -> None:
    """Wait for something outside this process that gives no signal."""
    async with asyncio.timeout(20):
        while not probe():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_written(path: Path) -> int:
    """Return the number that a child writes to `path`."""
    await until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def test_output_and_status_come_back() -> None:
    code = "import sys; print(sys.stdin.read()); print('warn', file=sys.stderr)"
    done = asyncio.run(run([PYTHON, "-c", code], timeout_s=20, stdin=b"hello"))
    assert (done.status, done.stdout, done.stderr) == (0, "hello\n", "warn\n")
    assert 0 < done.seconds < 20


def test_without_stdin_the_tool_reads_end_of_file() -> None:
    done = run_sync([PYTHON, "-c", "import sys; print(repr(sys.stdin.read()))"], timeout_s=20)
    assert done.stdout == "''\n"


def test_an_exit_status_is_an_error_with_the_tools_last_words() -> None:
    code = "import sys; print('why it failed', file=sys.stderr); sys.exit(3)"
    with pytest.raises(CommandError) as caught:
        asyncio.run(run([PYTHON, "-c", code], timeout_s=20))
    assert caught.value.status == 3
    assert caught.value.output_tail == "why it failed"
    assert caught.value.argv[0] == PYTHON


def test_an_exit_status_can_be_looked_at_instead() -> None:
    done = run_sync([PYTHON, "-c", "import sys; sys.exit(3)"], timeout_s=20, check=False)
    assert done.status == 3


def test_a_death_by_signal_is_a_negative_status() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_sync([PYTHON, "-c", code], timeout_s=20, check=False).status == -9


def test_a_missing_tool_and_a_file_that_is_no_program_say_so(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="No such file") as missing:
        run_sync([str(tmp_path / "absent")], timeout_s=20)
    assert missing.value.status == 127
    (tmp_path / "data").write_text("")
    with pytest.raises(CommandError, match="denied") as refused:
        asyncio.run(run([str(tmp_path / "data")], timeout_s=20))
    assert refused.value.status == 126


def test_a_megabyte_of_output_does_not_block_the_tool() -> None:
    done = run_sync([PYTHON, "-c", "print('x' * (1 << 20))"], timeout_s=20)
    assert len(done.stdout) == (1 << 20) + 1


def test_a_tool_that_leaves_a_child_behind_is_over_when_it_ends(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {note}; echo done"
    done = asyncio.run(run(["/bin/sh", "-c", script], timeout_s=20))
    child = int(note.read_text())
    assert done.stdout == "done\n"
    assert not gone(child)
    os.kill(child, 9)


def test_a_timeout_kills_the_tool_and_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {note}; echo begun; wait"
    with pytest.raises(CommandTimeout, match="begun") as caught:
        asyncio.run(run(["/bin/sh", "-c", script], timeout_s=0.5))
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.status == -15
    orphan = int(note.read_text())  # its new parent reaps it at its own pace
    asyncio.run(until(lambda: gone(orphan) or "State:\tZ" in state(orphan)))


def test_a_timeout_without_an_event_loop_kills_the_tool_too() -> None:
    with pytest.raises(CommandTimeout):
        run_sync(["/bin/sleep", "60"], timeout_s=0.1)


def test_cancellation_ends_a_tool_that_ignores_term_and_reaps_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = f"trap '' TERM; echo $$ > {note}; while :; do sleep 1; done"

    async def cancel_twice() -> int:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(run(["/bin/sh", "-c", script], timeout_s=60))
            pid = await until_written(note)
            task.cancel()
            await asyncio.sleep(0.05)  # TERM was sent and ignored
            assert not gone(pid)
            task.cancel()  # in a hurry now: KILL
        assert task.cancelled()
        return pid

    pid = asyncio.run(cancel_twice())
    assert gone(pid)


def test_no_descriptor_stays_open() -> None:
    async def many() -> int:
        await run(["/bin/true"], timeout_s=20)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            await run(["/bin/true"], timeout_s=20)
            with pytest.raises(CommandTimeout):
                await run(["/bin/sleep", "60"], timeout_s=0.02)
        return len(list(Path("/proc/self/fd").iterdir())) - before

    assert asyncio.run(many()) == 0


def test_descriptors_are_passed_on_request(tmp_path: Path) -> None:
    with (tmp_path / "given").open("w") as file:
        code = f"import os; os.write({file.fileno()}, b'through')"
        asyncio.run(run([PYTHON, "-c", code], timeout_s=20, pass_fds=[file.fileno()]))
    assert (tmp_path / "given").read_text() == "through"


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return "State:\tZ"


def test_a_tool_may_stay_in_our_process_group_and_still_has_its_time_limit() -> None:
    code = "import os; print(os.getpgid(0))"
    said = run_sync([PYTHON, "-c", code], timeout_s=20, own_session=False).stdout
    assert int(said) == os.getpgid(0)
    begun = time.monotonic()
    with pytest.raises(CommandTimeout):
        run_sync(["/bin/sleep", "60"], timeout_s=0.05, own_session=False)
    assert time.monotonic() - begun < 20
