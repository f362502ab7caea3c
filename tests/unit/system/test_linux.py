import os
import signal
import subprocess  # noqa: TID251 - a process and its parent
import sys

from tests.support.leaks import wait_for

CHILD = "import os, sys, time; from swapserve.system.linux import die_with; die_with({parent});"
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}.format(parent=os.getpid())])
print(child.pid, flush=True)
child.wait()
"""


def test_a_process_ends_with_its_parent() -> None:
    waiting = CHILD + 'print("set", flush=True); time.sleep(60)'
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(child=waiting)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "set\n"
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_for("its end", lambda: parent.stdout is not None and not parent.stdout.read(), 10)


def test_a_process_whose_parent_has_ended_already_does_not_go_on() -> None:
    code = CHILD.format(parent=os.getpid() + 1) + 'print("it goes on")'
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, "")
