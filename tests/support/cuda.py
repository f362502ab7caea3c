"""Processes that meet the stand-in driver: callers of the checkpoint API, and the CUDA engine."""

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from tests.support.leaks import wait_for

PATIENCE_S = 30.0
OK, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 0, 1, 2, 3
OPERATING_SYSTEM, ILLEGAL_STATE, NOT_READY, UNKNOWN = 304, 401, 600, 999
RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
FORWARD = ("lock", "checkpoint", "restore", "unlock")
SOON_S = 0.3
"""Long enough for anything that does not hang."""


class Driven(Protocol):
    """A machine with a driver: the stand-in, or this one with NVIDIA's."""

    @property
    def env(self) -> dict[str, str]:
        """What finds it."""


Ended = subprocess.CompletedProcess[str]
NOT_ROOT = "" if os.geteuid() == 0 else "only root may call the driver for other processes"

PROGRAM = """
import ctypes, json, os, sys
if "drop" in sys.argv:
    from swapserve.system import linux
    linux.drop_all_capabilities()
cuda = ctypes.CDLL("libcuda.so.1")
if "no-init" not in sys.argv:
    assert cuda.cuInit(0) == 0
names = {"state": "GetState", "thread": "GetRestoreThreadId", "lock": "Lock",
         "checkpoint": "Checkpoint", "restore": "Restore", "unlock": "Unlock"}
print(json.dumps(os.getpid()), flush=True)
for line in sys.stdin:
    op, pid, words, pairs = json.loads(line)
    call = cuda["cuCheckpointProcess" + names[op]]
    number = ctypes.c_int(-1)
    arguments = (ctypes.c_uint32 * 16)(*words)
    if pairs:
        raw = b"".join(bytes.fromhex(one) for one in pairs)
        kept = ctypes.create_string_buffer(raw, len(raw))
        ctypes.c_uint64.from_buffer(arguments).value = ctypes.addressof(kept)
        arguments[2] = len(pairs) // 2
    code = call(pid, ctypes.byref(number if op in ("state", "thread") else arguments))
    print(json.dumps([code, number.value]), flush=True)
"""


class Caller:
    """A process that calls the API, one call after the other, as it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = int(self._line())

    def begin(
        self, op: str, pid: int, *words: int, pairs: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Start a call; `words` are the first 32-bit words of its arguments."""
        flat = [uuid.removeprefix("GPU-").replace("-", "") for pair in pairs for uuid in pair]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([op, pid, words, flat]) + "\n")
        self.process.stdin.flush()

    def comes(self, timeout_s: float) -> bool:
        """Whether there is an answer (or the end) within so many seconds."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], timeout_s)[0])

    def end(self) -> tuple[int, int]:
        """Return the result of the call and what it wrote."""
        code, number = json.loads(self._line())
        return code, number

    def __call__(self, op: str, pid: int, *words: int, **more: Any) -> int:
        """Make a call and return its result."""
        self.begin(op, pid, *words, **more)
        return self.end()[0]

    def state(self, pid: int) -> int:
        """Return a state that must be known."""
        self.begin("state", pid)
        code, state = self.end()
        assert code == OK, code
        return state

    def _line(self) -> str:
        assert self.comes(PATIENCE_S), "no answer"
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@contextmanager
def caller(gpu: Driven, *how: str) -> Iterator[Caller]:
    """Start a caller: `no-init` without cuInit, `drop` without any capability."""
    if NOT_ROOT:
        pytest.skip(NOT_ROOT)
    argv = [sys.executable, "-c", PROGRAM, *how]
    with _running(gpu, argv, stdin=subprocess.PIPE) as process:
        yield Caller(process)


def bring_to(state: int, call: Caller, pid: int) -> None:
    """Bring a running process to a state."""
    for op in FORWARD[: {RUNNING: 0, LOCKED: 1, CHECKPOINTED: 2}[state]]:
        assert call(op, pid) == OK
    assert call.state(pid) == state


class EngineOnGpu:
    """A running `swapserve.testing.cuda_engine`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("listening"), f"the engine did not start: {said}"
        self.port = int(said.split()[-1])
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S)

    @property
    def ranks(self) -> list[int]:
        """The pids of its ranks."""
        found: list[int] = self.get("/stats")["ranks"]
        return found

    @cached_property
    def rank(self) -> int:
        """The pid of its first rank."""
        return self.ranks[0]

    def get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(path).raise_for_status().json()
        return found

    def is_whole(self) -> bool:
        """Whether its weights are as they were; waits while the driver is locked."""
        return bool(self.get("/weights")["whole"])

    def text(self, tokens: int, **body: Any) -> str:
        full = {"model": "fake", "prompt": "p", "temperature": 0, "max_tokens": tokens, **body}
        answer = self.http.post("/v1/completions", json=full).raise_for_status().json()
        return str(answer["choices"][0]["text"])


@contextmanager
def cuda_engine(gpu: Driven, *args: str, **env: str) -> Iterator[EngineOnGpu]:
    """Run an engine until the block ends."""
    argv = [sys.executable, "-m", "swapserve.testing.cuda_engine", "--port=0", *args]
    with _running(gpu, argv, env=env) as process:
        engine = EngineOnGpu(process)
        with engine.http:
            yield engine


def ended(gpu: Driven, *argv: str | Path) -> Ended:
    """Run a program to its end, whatever its status is."""
    return subprocess.run(
        argv,
        env={**os.environ, **gpu.env},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@contextmanager
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that has nothing to do with CUDA."""
    with subprocess.Popen(["sleep", "100"]) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def rank_in_pid_namespace(gpu: Driven, *args: str) -> Iterator[int]:
    """Run a rank without a front as the first process of a namespace; yields its pid out here."""
    argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
    argv += ['exec "$@" 3<&0', "sh", sys.executable, "-m", "swapserve.testing.cuda_rank", *args]
    ours, theirs = socket.socketpair()
    with ours, theirs, _running(gpu, argv, stdin=theirs.fileno()) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for("it was forked", children.read_text)
        yield int(children.read_text().split()[0])


@contextmanager
def _running(
    gpu: Driven,
    argv: list[str],
    *,
    stdin: int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **gpu.env, **(env or {})}
    with subprocess.Popen(
        argv, env=known, text=True, stdin=stdin, stdout=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
