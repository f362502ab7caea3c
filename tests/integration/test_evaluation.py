"""The experiment itself, as short as it can be, with a real engine under real CRIU."""

import json
import sys
from pathlib import Path

import pytest

from swapserve.system.command import run_sync
from tests.support.daemon import needs_criu

pytestmark = [*needs_criu, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_one_cycle_measures_every_arm_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    work = tmp_path / "work"
    work.mkdir()
    argv = [sys.executable, "-m", "evaluation", "swap", "--engines", "llamacpp", "--cycles", "1"]
    argv += ["--idle", "0", "--size", "tiny", "--json", str(out), "--work-dir", str(work)]
    done = run_sync(argv, timeout_s=110, cwd=ROOT)
    result = json.loads(out.read_text())
    summary = result["summary"]["llamacpp"]
    assert [arm["huge_pages"] for arm in summary["arms"]] == ["off", "on"]
    assert summary["swapin_over_bare"]["n"] == 8
    assert summary["preempt_tokens_equal"] is True
    assert all(arm["cold_over_swapin"]["n"] == 1 for arm in summary["arms"])
    assert "swap in / bare" in done.stdout
    assert list(work.iterdir()) == []
