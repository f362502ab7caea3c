"""`python -m evaluation gpu` on the stand-in for NVIDIA's driver: the code that a real GPU gets."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from evaluation.gpu.product import MANNERS
from evaluation.machine import huge_page_setting
from swapserve.system.command import Completed, run_sync
from swapserve.system.detached import spawn_detached
from tests.support.gpu import MIB, StandIn, standin
from tests.support.leaks import wait_for

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 110.0
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
SMALL = ("--sizes", "4MiB,24MiB", "--block", "4MiB", "--ram", "4GiB", "--minutes", "1.5")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[StandIn]:
    with standin(tmp_path / "gpu", ns_per_byte=0.5) as found:
        yield found
        assert found.illegal() == []
        assert found.hazards() == []
        assert found.used(found.uuids[0]) == 0


def _argv(out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "evaluation", "gpu", "--json", str(out), *SMALL, *words]


def _run(machine: StandIn | None, tmp_path: Path, *words: str) -> tuple[Completed, dict[str, Any]]:
    out = tmp_path / "out.json"
    env = {**os.environ, **(machine.env if machine else {})}
    done = run_sync(_argv(out, *words), timeout_s=TIMEOUT_S, cwd=ROOT, env=env)
    result: dict[str, Any] = json.loads(out.read_text())["parts"]
    return done, result


def test_facts_bandwidth_and_calls_are_measured_and_nothing_is_left(
    machine: StandIn, tmp_path: Path
) -> None:
    setting = huge_page_setting()
    done, parts = _run(machine, tmp_path, "--parts", "facts,bandwidth,calls")
    assert parts["facts"]["state"] == "done"
    assert parts["facts"]["gpu"]["uuid"] == machine.uuids[0]
    assert parts["facts"]["checkpoint"]["api"] == "driver"
    rates = {rate["what"]: rate for rate in parts["bandwidth"]["rates"]}
    assert rates["pinned to device"]["gb_per_s"] > 0.1
    assert "does not have it" in rates["page lock, huge pages on"]["why"]
    laps = parts["calls"]["laps"]
    kinds = {(lap["bytes"], lap["huge_pages"]) for lap in laps}
    assert kinds == {(size * MIB, huge) for size in (4, 24) for huge in (True, False)}
    assert all(lap["content"] == "equal" for lap in laps)
    assert all(lap["nvml_away_bytes"] == 0 for lap in laps)
    assert all(lap["away"]["AnonHugePages"] == 0 for lap in laps if not lap["huge_pages"])
    pairs = parts["calls"]["pairs"]
    assert [(pair["together"], pair["content"]) for pair in pairs] == [
        (False, "equal"),
        (True, "equal"),
    ]
    assert all(one["next_call_s"] < one["first_call_s"] for one in parts["calls"]["workers"])
    assert "content equal, n=3" in done.stdout
    assert huge_page_setting() == setting
    ended = [call for call in machine.calls() if call.op == "restore" and call.result == 0]
    assert len(ended) == len(laps) + 4


@pytest.mark.slow
def test_the_speed_of_the_driver_is_what_is_measured(machine: StandIn, tmp_path: Path) -> None:
    machine.set_config(checkpoint_ns_per_byte=10.0, restore_ns_per_byte=20.0)
    _, parts = _run(machine, tmp_path, "--parts", "calls", "--sizes", "24MiB")
    for name, wanted in (("checkpoint_s", 24 * MIB * 10e-9), ("restore_s", 24 * MIB * 20e-9)):
        found = [lap[name] for lap in parts["calls"]["laps"]]
        assert len(found) == 6
        assert wanted < min(found) < 1.5 * wanted


def test_a_driver_that_refuses_a_size_does_not_stop_the_others(
    machine: StandIn, tmp_path: Path
) -> None:
    machine.fault("checkpoint", "error", code=304)
    _, parts = _run(machine, tmp_path, "--parts", "calls")
    assert parts["calls"]["state"] == "with failures"
    assert "304" in parts["calls"]["failures"][0]["why"]
    whole = [lap for lap in parts["calls"]["laps"] if "content" in lap]
    assert {(lap["bytes"], lap["huge_pages"]) for lap in whole} == {
        (4 * MIB, False),
        (24 * MIB, True),
        (24 * MIB, False),
    }


def test_what_does_not_fit_is_not_tried(machine: StandIn, tmp_path: Path) -> None:
    _, parts = _run(machine, tmp_path, "--parts", "calls", "--sizes", "4MiB,4GiB")
    assert {lap["bytes"] for lap in parts["calls"]["laps"]} == {4 * MIB}
    assert "bytes of GPU memory needed" in parts["calls"]["failures"][0]["why"]


@pytest.mark.slow
def test_a_gpu_that_others_fill_meanwhile_is_not_restored_to(
    machine: StandIn, tmp_path: Path
) -> None:
    # Someone else's memory comes while the process is away: all but 2 MiB of what it needs.
    uuid, total = machine.uuids[0], machine.config.memory[0]
    argv = _argv(tmp_path / "out.json", "--parts", "calls", "--sizes", "24MiB")
    with _started(argv, machine, tmp_path) as process:
        wait_for("a process is away", lambda: _ops(machine).count("checkpoint") >= 1)
        machine.set_config(foreign=((uuid, 1, total - 20 * MIB),))
        assert process.wait(TIMEOUT_S) == 0
    part = json.loads((tmp_path / "out.json").read_text())["parts"]["calls"]
    assert "restore not tried" in " ".join(failure["why"] for failure in part["failures"])
    oom = [call for call in machine.calls() if call.op == "restore" and call.result != 0]
    assert oom == []
    machine.set_config(foreign=())


def test_without_a_driver_every_part_says_so(tmp_path: Path) -> None:
    done, parts = _run(None, tmp_path)
    assert {part["state"] for part in parts.values()} == {"impossible", "with failures"}
    for name in ("bandwidth", "calls", "engines"):
        assert parts[name]["state"] == "impossible"
        assert parts[name]["why"]
    assert parts["facts"]["machine"]["cores"] == os.cpu_count()
    assert "engines: impossible" in done.stdout


def test_a_run_that_is_told_to_end_leaves_what_it_has_and_no_process(
    machine: StandIn, tmp_path: Path
) -> None:
    machine.set_config(checkpoint_ns_per_byte=40.0)
    out = tmp_path / "out.json"
    argv = _argv(out, "--parts", "calls", "--sizes", "24MiB")
    with _started(argv, machine, tmp_path) as process:
        wait_for("something was restored", lambda: "restore" in _ops(machine))
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(TIMEOUT_S) != 0
    part = json.loads(out.read_text())["parts"]["calls"]
    assert part["state"] == "interrupted"
    assert part["laps"]


def test_a_run_that_is_killed_ends_its_processes_suspended(
    machine: StandIn, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    machine.set_config(restore_ns_per_byte=40.0)
    argv = _argv(out, "--parts", "calls", "--sizes", "24MiB")
    with _started(argv, machine, tmp_path):
        wait_for("something was restored", lambda: _ops(machine).count("unlock") >= 1)
    assert json.loads(out.read_text())["parts"]["calls"]["state"] == "running"
    wait_for("the GPU is free", lambda: machine.used(machine.uuids[0]) == 0, 30)


@contextmanager
def _started(argv: list[str], machine: StandIn, tmp_path: Path) -> Iterator[Any]:
    """Start a run in the background; it is killed at the end of the block."""
    # A killed run leaves its directory; `tmp_path` is too deep for the sockets in there.
    with tempfile.TemporaryDirectory(prefix="run-", ignore_cleanup_errors=True) as place:
        with pytest.MonkeyPatch.context() as patch:
            env = {**machine.env, "PYTHONPATH": str(ROOT), "TMPDIR": place}
            for name, value in env.items():
                patch.setenv(name, value)
            process = spawn_detached(argv, log=tmp_path / "run.log")
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _ops(machine: StandIn) -> list[str]:
    return [call.op for call in machine.calls() if call.ended is not None]


def _engines(machine: StandIn, tmp_path: Path, *words: str) -> tuple[Completed, dict[str, Any]]:
    words = ("--parts", "engines", "--engines", "cuda", "--vram-mb", "32", *words)
    quick = ("--quantum", "300ms", "--away", "0.3", "--load", "3", "--minutes", "1")
    shown = ("--gpu-path", str(machine.directory), "--gpu-path", str(machine.libs))
    return _run(machine, tmp_path, *words, *quick, *shown, "--pass-env", "STANDIN_GPU")


@needs_root
@pytest.mark.slow
def test_an_engine_goes_through_the_whole_product(machine: StandIn, tmp_path: Path) -> None:
    done, parts = _engines(machine, tmp_path)
    found = parts["engines"]["cuda"]
    assert found.get("failures", []) == [], found["logs"]
    assert len(found["cycles"]) >= 3
    assert all(cycle["equal"] and cycle["tier"] == "host" for cycle in found["cycles"])
    assert {cycle["resident_bytes"] for cycle in found["cycles"]} == {36 * MIB}
    assert all(cycle["nvml_away_bytes"] == 0 for cycle in found["cycles"])
    assert all(cycle["out"]["mechanism"] == "checkpoint" for cycle in found["cycles"])
    last = found["preempted"][-1]
    assert (last["equal"], last["in_mid_stream"]) == (True, True)
    assert found["load"]["wrong"] == found["load"]["lost"] == 0
    assert sum(move["kind"] == "swap_in" for move in found["load_moves"]) >= 2
    assert found["kills"][0]["swap"]["mechanism"] == "kill"
    count = len(found["cycles"])
    assert f"cycles: {count} of {count} with equal answers" in done.stdout
    assert done.status == 0


@needs_root
@pytest.mark.slow
def test_an_engine_that_is_lost_on_the_way_is_told_and_the_run_ends_well(
    machine: StandIn, tmp_path: Path
) -> None:
    machine.fault("restore", "failed", nth=2)
    _, parts = _engines(machine, tmp_path)
    found = parts["engines"]["cuda"]
    assert found["failures"][0]["what"] == "first cycles"
    assert "Lost" in found["failures"][0]["why"]
    assert found["status"]["engines"]
    assert any("daemon.log" in name for name in found["logs"]["sandboxes"])


PYTHON = """#!/bin/sh
case "$*" in
*importlib*) echo '{"torch": "2", "transformers": "5"}' ;;
*weights*) mkdir -p "$3" ;;
*) echo "no GPU for you" >&2; exit 3 ;;
esac
"""


@needs_root
def test_an_engine_that_never_starts_is_tried_in_every_manner_and_its_log_is_kept(
    tmp_path: Path,
) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    with standin(tmp_path / "gpu", gpus=(8 << 30,)) as machine:
        words = ("--engines", "torch,vllm", "--shape", "tiny", "--python", str(python))
        _, parts = _run(machine, tmp_path, "--parts", "engines", *words)
        assert machine.calls() == []
    found = parts["engines"]
    assert found["state"] == "impossible"
    assert "'torch-a' could not be started" in found["why"]
    assert f"vllm: {python} has no vllm" in found["why"]
    failures = found["torch"]["failures"]
    started = [failure["what"] for failure in failures if "not be started" in failure["why"]]
    assert started == list(MANNERS)
    for manner in MANNERS:
        logs = found["torch"]["logs"][manner]
        assert ["no GPU for you"] in [lines[:1] for lines in logs.values()]
