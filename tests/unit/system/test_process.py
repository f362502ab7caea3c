"""Processes by identity, and how they end."""

import os
import subprocess  # noqa: TID251 - a child that this test itself collects

from swapserve.system.process import ProcessRef


def test_a_process_on_its_way_out_is_told_from_one_that_runs() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        ref = ProcessRef.of(child.pid)
        assert not ref.ending()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert ref.ending(), "a zombie"
    assert ref.ending(), "gone"
