"""A process with GPU memory of known content, for others to lock, checkpoint and restore.

`python -m evaluation.gpu.target SOCKET [--no-huge-pages]` connects to a Unix socket, takes one JSON
object per line and answers each with one. Nothing of CUDA runs between two orders.
"""

import argparse
import ctypes
import json
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from evaluation.gpu.driver import Driver, DriverFailed

CHUNK = 256 << 20
PR_SET_THP_DISABLE = 41
_MARK = 8
_ORPHAN_LOCK_MS = 10_000


class WrongContent(Exception):
    """Device memory does not hold what was put there."""


class Content:
    """Device memory filled with a random block, each chunk with its number at both ends."""

    def __init__(self, driver: Driver, size: int) -> None:
        self._driver = driver
        self._sizes = [min(CHUNK, size - start) for start in range(0, size, CHUNK)]
        self._block = ctypes.create_string_buffer(os.urandom(max(self._sizes)), max(self._sizes))
        self._chunks: list[int] = []

    def fill(self) -> None:
        """Allocate and write everything.

        Raises:
            DriverFailed: out of memory, say.
        """
        with self._driver.pinned(len(self._block)) as host:
            ctypes.memmove(host, self._block, len(self._block))
            for number, size in enumerate(self._sizes):
                chunk = self._driver.alloc(size)
                self._chunks.append(chunk)
                _mark(host, size, number)
                self._driver.to_device(chunk, host, size)
        self._driver.wait()

    def verify(self) -> None:
        """Read everything back and compare every byte.

        Raises:
            WrongContent: it differs.
        """
        compare = ctypes.CDLL(None).memcmp
        wanted = ctypes.addressof(self._block)
        with self._driver.pinned(len(self._block)) as host:
            # Each chunk has its number at both ends, so one that was not copied is noticed.
            for number, (chunk, size) in enumerate(zip(self._chunks, self._sizes, strict=True)):
                self._driver.to_host(host, chunk, size)
                _mark(wanted, size, number)
                found = ctypes.c_void_p(host), ctypes.c_void_p(wanted), ctypes.c_size_t(size)
                if compare(*found):
                    raise WrongContent(f"chunk {number} of {len(self._chunks)} differs")

    def drop(self) -> None:
        """Free everything."""
        while self._chunks:
            self._driver.free(self._chunks.pop())


def _mark(address: int, size: int, number: int) -> None:
    mark = number.to_bytes(_MARK, "little")
    for where in (address, address + max(0, size - _MARK)):
        ctypes.memmove(where, mark, min(_MARK, size))


def serve(stream: Any, driver: Driver) -> None:  # noqa: ANN401 - a socket's file
    """Carry out orders until told to end, or until whoever gives them is gone."""
    content: Content | None = None
    for line in stream:
        order = json.loads(line)
        begun = time.perf_counter()
        answer: dict[str, Any] = {}
        try:
            if order["op"] == "fill":
                content = Content(driver, order["bytes"])
                content.fill()
            elif content is not None:
                {"verify": content.verify, "drop": content.drop}[order["op"]]()
        except (DriverFailed, WrongContent) as error:
            answer["why"] = f"{type(error).__name__}: {error}"
        answer["seconds"] = time.perf_counter() - begun
        stream.write(json.dumps(answer).encode() + b"\n")
        stream.flush()


def no_huge_pages() -> None:
    """Keep the kernel from giving this process transparent huge pages.

    Raises:
        OSError: this kernel cannot.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl(PR_SET_THP_DISABLE)")


def leave(driver: Driver) -> None:
    """End without a caller: what may have been restored is not ended with live GPU state.

    Ending such a process has hung a machine (NVIDIA/cuda-checkpoint, issue 53).
    """
    lock = (ctypes.c_uint32 * 16)(_ORPHAN_LOCK_MS)
    with suppress(DriverFailed):
        driver.call("cuCheckpointProcessLock", os.getpid(), ctypes.byref(lock))
        driver.call("cuCheckpointProcessCheckpoint", os.getpid(), None)
    os._exit(0)


def main() -> int:
    """Connect, and serve until the other end is gone."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.gpu.target")
    parser.add_argument("socket")
    parser.add_argument("--no-huge-pages", action="store_true")
    options = parser.parse_args()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(options.socket)
        stream = connection.makefile("rwb")
        begun = time.perf_counter()
        try:
            if options.no_huge_pages:
                no_huge_pages()
            driver = Driver()
        except (OSError, DriverFailed) as error:
            stream.write(json.dumps({"why": f"{type(error).__name__}: {error}"}).encode() + b"\n")
            stream.flush()
            return 1
        ready = {"pid": os.getpid(), "seconds": time.perf_counter() - begun}
        stream.write(json.dumps(ready).encode() + b"\n")
        stream.flush()
        with suppress(OSError):
            serve(stream, driver)
    leave(driver)
    return 0


if __name__ == "__main__":
    sys.exit(main())
