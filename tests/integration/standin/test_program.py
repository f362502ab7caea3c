"""The stand-in for the program cuda-checkpoint, and a driver without the API."""

from pathlib import Path

import pytest

from tests.support.cuda import (
    FORWARD,
    NOT_ROOT,
    Ended,
    cuda_engine,
    ended,
)
from tests.support.gpu import StandIn, libraries, standin


def run(gpu: StandIn, *words: str) -> Ended:
    return ended(gpu, gpu.program, *words)


@pytest.mark.skipif(bool(NOT_ROOT), reason=NOT_ROOT)
def test_an_old_driver_has_only_the_program(tmp_path: Path) -> None:
    with standin(tmp_path / "gpu", driver="555.42.02", cuda=12050, api=False) as gpu:
        symbols = (libraries(api=False) / "libcuda.so.1").read_bytes()
        assert b"cuCheckpointProcessLock" not in symbols
        assert b"cuCheckpointProcessLock" in (libraries(api=True) / "libcuda.so.1").read_bytes()
        with cuda_engine(gpu, "--vram-mb=16") as engine:
            pid = str(engine.rank)
            tid = run(gpu, "--get-restore-tid", "--pid", pid)
            assert Path(f"/proc/{pid}/task/{int(tid.stdout)}/comm").read_text().startswith("cuda")
            after = ["running"]
            for op in FORWARD:
                timeout = ("--timeout", "1000") if op == "lock" else ()
                done = run(gpu, "--action", op, "--pid", pid, *timeout)
                assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
                after.append(run(gpu, "--get-state", "--pid", pid).stdout.strip())
            assert after == ["running", "locked", "checkpointed", "locked", "running"]
            for expected in ("checkpointed", "running"):
                assert run(gpu, "--toggle", "-p", pid).returncode == 0
                assert run(gpu, "--get-state", "-p", pid).stdout.strip() == expected
            assert engine.is_whole()
            refused = run(gpu, "--action", "unlock", "--pid", pid)
        assert refused.returncode == 1
        assert refused.stderr == (
            f"Could not unlock on process ID {pid}: "
            '"the operation cannot be performed in the present state"\n'
        )


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--pid", "1"),
        ("--action", "freeze", "--pid", "1"),
        ("--action", "state", "--pid", "1"),
        ("--action", "lock"),
        ("--action", "lock", "--pid", "x"),
        ("--action", "lock", "--pid", "1", "more"),
        ("--action", "unlock", "--pid", "1", "--timeout", "5"),
        ("--get-state", "--toggle", "--pid", "1"),
        ("--get-state", "--pid", "1", "--verbose"),
    ],
)
def test_the_program_is_strict_about_its_options(gpu: StandIn, words: tuple[str, ...]) -> None:
    assert run(gpu, *words).returncode == 1
    assert gpu.calls() == []
