"""A process that uses CUDA, for tests of the driver path: told what to do line by line.

`init` starts the driver and fills memory of each visible GPU, `check` reads it back and compares.
Each answers one line. Until `init` it is a process that does not use CUDA.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from swapserve.system.process import ProcessRef

MIB = 1 << 20


class Target:
    """A running one."""

    def __init__(self, env: Mapping[str, str], mib: int, gpus: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(mib), str(gpus)],
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.ref = ProcessRef.of(self.pid)

    def told(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def target(
    env: Mapping[str, str], *, mib: int = 8, gpus: int = 1, init: bool = True
) -> Iterator[Target]:
    """Run one; it is killed at the end."""
    one = Target(env, mib, gpus)
    try:
        if init:
            assert one.told("init") == "ok"
        yield one
    finally:
        one.end()


@contextmanager
def program(code: str, env: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """Run Python code as a process; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


class _Cuda:
    """Memory on each GPU, with a content that is known."""

    def __init__(self, mib: int, gpus: int) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._bytes = mib * MIB
        self._blocks: list[tuple[ctypes.c_void_p, ctypes.c_uint64, bytes]] = []
        self._call("cuInit", 0)
        for number in range(gpus):
            self._fill(number)

    def _fill(self, number: int) -> None:
        device, context, address = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
        self._call("cuDeviceGet", ctypes.byref(device), number)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(self._bytes))
        content = hashlib.shake_128(bytes([number, os.getpid() % 256])).digest(self._bytes)
        self._call("cuMemcpyHtoD_v2", address, content, ctypes.c_size_t(self._bytes))
        self._blocks.append((context, address, content))

    def same(self) -> bool:
        return all(
            self._read(context, address) == content for context, address, content in self._blocks
        )

    def _read(self, context: ctypes.c_void_p, address: ctypes.c_uint64) -> bytes:
        buffer = ctypes.create_string_buffer(self._bytes)
        self._call("cuCtxSetCurrent", context)
        self._call("cuMemcpyDtoH_v2", buffer, address, ctypes.c_size_t(self._bytes))
        return buffer.raw

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise SystemExit(f"{name}: {code}")


def _main() -> None:
    cuda: _Cuda | None = None
    for line in sys.stdin:
        if line.strip() == "init":
            cuda = _Cuda(int(sys.argv[1]), int(sys.argv[2]))
            sys.stdout.write("ok\n")
        else:
            sys.stdout.write("same\n" if cuda is not None and cuda.same() else "different\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    _main()
