"""A process that asks NVML: a library is loaded once per process, and each test wants its own."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.gpu import FLAGS

ANSWER_TIMEOUT_S = 60.0
_ASKER = """
import json, sys
from dataclasses import asdict
from swapserve.system import gpu
nvml = gpu.Nvml()
for line in sys.stdin:
    try:
        answer = {"value": eval(json.loads(line))}
    except gpu.NvmlUnavailable as error:
        answer = {"unavailable": error.reason}
    print(json.dumps(answer, default=asdict), flush=True)
"""


class Unavailable(Exception):
    """What `NvmlUnavailable` said."""


class Asker:
    """Evaluates expressions with `gpu` (the module) and `nvml` (an `Nvml` of its own)."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def ask(self, expression: str) -> Any:
        """Return an expression's value, as JSON has it.

        Raises:
            Unavailable: NVML was not.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(expression) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that asks has ended"
        answer = json.loads(line)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer["value"]

    def why(self, expression: str) -> str:
        """Return why NVML cannot answer."""
        try:
            value = self.ask(expression)
        except Unavailable as error:
            return str(error)
        raise AssertionError(f"it answered: {value}")


@contextmanager
def asker(env: Mapping[str, str]) -> Iterator[Asker]:
    """Run one with these libraries."""
    process = subprocess.Popen(
        [sys.executable, "-c", _ASKER],
        env={"PATH": "/usr/bin:/bin", **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Asker(process)
        assert process.stdin is not None
        process.stdin.close()
        try:
            status = process.wait(timeout=ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert status == 0


def library(place: Path, source: str, name: str = "libnvidia-ml.so.1") -> dict[str, str]:
    """Compile a library that does what a test needs; return how it is found."""
    code = place / "library.c"
    code.write_text(source)
    subprocess.run(
        ["gcc", *FLAGS, "-fvisibility=default", "-shared", code, "-o", place / name],
        check=True,
        timeout=ANSWER_TIMEOUT_S,
    )
    return {"LD_LIBRARY_PATH": str(place)}


@contextmanager
def program_named(path: Path) -> Iterator[int]:
    """Run a program that sleeps under a name; yield its pid."""
    path.symlink_to("/bin/sleep")
    process = subprocess.Popen([path, "600"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
