"""The schedule experiment, as short as it can be: two real engines under real CRIU."""

import json
import sys
from pathlib import Path

import pytest

import evaluation.session
from evaluation.engines import Missing
from evaluation.schedule.ground import ground
from swapserve.system.command import run_sync
from tests.support.daemon import needs_criu

pytestmark = [*needs_criu, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_a_daemon_that_never_serves_leaves_no_keeper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.session, "START_TIMEOUT_S", 0.4)  # its keeper is just starting
    with (
        ground(engines=2, size="tiny", held=1, scheduling={}, parent=tmp_path) as here,
        pytest.raises(Missing, match="did not start"),
        here.daemon("adaptive"),
    ):
        pass
    keepers = run_sync(["pgrep", "-af", f"keeper.server {tmp_path}"], timeout_s=10, check=False)
    assert keepers.stdout == ""


def test_a_trace_is_replayed_simulated_and_compared_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    work = tmp_path / "work"
    work.mkdir()
    argv = [sys.executable, "-m", "evaluation", "schedule", "--profiles", "balanced,mixed"]
    argv += ["--rounds", "1", "--engines", "2", "--size", "tiny", "--part", "0.1"]
    argv += ["--repeats", "2", "--simulations", "2", "--json", str(out), "--work-dir", str(work)]
    # Whether figures so few are within the bound is a matter of luck.
    done = run_sync(argv, timeout_s=110, cwd=ROOT, check=False)
    assert out.exists(), done.tail
    result = json.loads(out.read_text())
    assert result["calibration"]["busy"]["out_s"] > 0
    balanced = result["profiles"]["balanced, adaptive"]
    mixed = result["profiles"]["mixed, adaptive"]
    assert (balanced["requests"], mixed["requests"]) == (8, 4)
    for profile in (balanced, mixed):
        assert profile["figures"]["failed"]["real"] == [0]
        (run,) = profile["runs"]
        assert all(error is None for *_, error in run["requests"])
        assert all(move["error"] is None for move in run["moves"])
    # Each pair is for both engines, of which one fits.
    assert balanced["figures"]["swaps"]["real"][0] >= 4
    assert {row[1] for row in mixed["runs"][0]["requests"]} == {"interactive", "batch"}
    assert "balanced, adaptive" in done.stdout
    assert list(work.iterdir()) == []
