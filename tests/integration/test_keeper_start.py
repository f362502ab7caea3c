"""A keeper that cannot begin."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

from swapserve.system.cgroup import mount_point
from swapserve.system.command import run_sync


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's keeper makes groups and networks")
def test_a_keeper_that_cannot_listen_says_why_and_leaves_no_group(tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    (run_dir / "keeper.sock").mkdir(parents=True)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"paths: {{state_dir: {tmp_path}/s, image_dir: {tmp_path}/i, run_dir: {run_dir}}}\n"
        "models: [{name: a, recipe: generic, params: {binary: /bin/sleep}, sandbox: false}]\n"
    )
    argv = [sys.executable, "-m", "swapserve.keeper.server", str(config)]
    done = run_sync(argv, timeout_s=30, check=False)
    assert done.status == 1
    assert "keeper.sock" in done.stderr
    assert "Traceback" not in done.stderr
    tag = hashlib.sha256(str(run_dir).encode()).hexdigest()[:5]
    groups = mount_point()
    assert groups is None or not (groups / f"swapserve-{tag}").exists()
