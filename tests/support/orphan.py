"""Start programs that are nobody's children here: as somebody else would have started them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from swapserve.system.process import ProcessRef
from tests.support.leaks import wait_for

_STARTER = """
import json, os, subprocess, sys
argv, log, session = json.loads(sys.argv[1])
out = open(log, "ab")
child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                         start_new_session=session)
print(child.pid, flush=True)
os._exit(0)
"""


@contextlib.contextmanager
def orphan(argv: Sequence[str], log: Path, *, session: bool = True) -> Iterator[ProcessRef]:
    """Run a program whose parent has ended; kill it and all below it afterwards."""
    words = json.dumps([list(map(str, argv)), str(log), session])
    done = subprocess.run(
        [sys.executable, "-c", _STARTER, words], capture_output=True, text=True, check=True
    )
    made = ProcessRef.of(int(done.stdout))
    try:
        yield made
    finally:
        for pid in _tree(made.pid) if made.alive() else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for("it has ended", lambda: not made.alive(), 10)


def _tree(root: int) -> list[int]:
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in children.read_text().split()]
    return found
