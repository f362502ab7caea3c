"""A process with GPU memory that CRIU dumps and restores, outside of any sandbox."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from swapserve.system.tools import find_tool
from tests.support.cuda import PATIENCE_S
from tests.support.gpu import StandIn
from tests.support.leaks import wait_for

PATTERN = """
import os, sys, time
from pathlib import Path
from swapserve.testing.cuda_driver import Cuda
cuda, place = Cuda(0), Path(sys.argv[1])
data = os.urandom(1 << 20) * 8
address = cuda.allocate(len(data))
cuda.write(address, data)
count = 0
while True:
    count += 1
    place.with_suffix(".new").write_text(f"{count} {cuda.read(address, len(data)) == data}")
    place.with_suffix(".new").rename(place)
    time.sleep(0.01)
"""


class Imaged:
    """A process that CRIU dumps and restores."""

    def __init__(self, gpu: StandIn, directory: Path) -> None:
        self.directory = directory
        self.said = directory / "said"
        files = {name: (directory / name).open("w+") for name in ("in", "out")}
        process = subprocess.Popen(
            [sys.executable, "-c", PATTERN, str(self.said)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **gpu.env},
            stdin=files["in"],
            stdout=files["out"],
            stderr=files["out"],
            cwd=directory,
            start_new_session=True,
        )
        for file in files.values():
            file.close()
        self.pid = process.pid
        process.returncode = 0  # it is reaped below, like its later lives

    def criu(self, *words: str) -> int:
        argv = [str(find_tool("criu")), *words, "-D", str(self.directory / "image")]
        (self.directory / "image").mkdir(exist_ok=True)
        done = subprocess.run(
            [*argv, "-o", "log", "-v2", "--shell-job", "--network-lock", "skip"],
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
        return done.returncode

    def goes_on(self) -> bool:
        """Whether it reads its memory again, and finds it as it was."""
        self.said.unlink(missing_ok=True)
        wait_for("it reads", self.said.exists)
        return self.said.read_text().endswith("True")

    def reap(self) -> None:
        """Wait until it has ended."""
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.reap()
