"""The other end of `evaluation.gpu.target`: start one, give it orders, end it safely."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from swapserve.system.detached import spawn_detached
from swapserve.system.process import ProcessRef

START_TIMEOUT_S = 60.0
ORDER_TIMEOUT_S = 10.0
"""Longest order on no memory at all; a process that is still locked answers none."""
SLOWEST_BYTES_PER_S = 800e6
END_TIMEOUT_S = 20.0
POLL_S = 0.02


class TargetFailed(Exception):
    """The process could not do it; has its own words."""


class Target:
    """A process of ours that holds GPU memory."""

    def __init__(
        self,
        ref: ProcessRef,
        connection: socket.socket,
        stream: Any,  # noqa: ANN401 - of the connection
        started_s: float,
    ) -> None:
        self.ref = ref
        self.started_s = started_s
        """Seconds that the driver took to give it a context."""
        self.size = 0
        """Bytes of its GPU memory that it has written."""
        self.suspended = False
        """Whether its GPU state is away: it may be killed then, and only then or when `fresh`."""
        self.fresh = True
        """Whether it was never restored."""
        self._connection = connection
        self._stream = stream

    def fill(self, size: int) -> float:
        """Let it allocate and write that many bytes; return its seconds.

        Raises:
            TargetFailed: it could not.
        """
        self.size = size
        return self._order({"op": "fill", "bytes": size})

    def verify(self) -> float:
        """Let it compare its memory with what it wrote; return its seconds.

        Raises:
            TargetFailed: it differs.
        """
        return self._order({"op": "verify"})

    def drop(self) -> None:
        """Let it free its memory, so that it is quickly suspended.

        Raises:
            TargetFailed: it could not.
        """
        self._order({"op": "drop"})

    def _order(self, order: dict[str, Any]) -> float:
        moved = 0 if order["op"] == "drop" else self.size
        self._connection.settimeout(ORDER_TIMEOUT_S + moved / SLOWEST_BYTES_PER_S)
        self._stream.write(json.dumps(order).encode() + b"\n")
        self._stream.flush()
        return float(heard(self._stream)["seconds"])

    def memory(self) -> dict[str, int]:
        """Return bytes of host memory by kind, as the kernel accounts for them."""
        files = ("status", "smaps_rollup")
        wanted = ("VmRSS", "VmLck", "VmPin", "VmSwap", "Rss", "AnonHugePages", "Locked")
        found: dict[str, int] = {}
        for name in files:
            with suppress(OSError):  # smaps_rollup is not everywhere
                lines = Path(f"/proc/{self.ref.pid}/{name}").read_text().splitlines()
                pairs = (line.partition(":") for line in lines)
                found |= {k: int(v.split()[0]) << 10 for k, _, v in pairs if k in wanted}
        return found


def heard(stream: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the next answer.

    Raises:
        TargetFailed: the process said why not, or is gone.
    """
    try:
        line = stream.readline()
    except OSError as error:
        raise TargetFailed(f"the process does not answer: {error}") from error
    if not line:
        raise TargetFailed("the process is gone")
    answer: dict[str, Any] = json.loads(line)
    if "why" in answer:
        raise TargetFailed(answer["why"])
    return answer


@contextmanager
def started(directory: Path, *, huge_pages: bool = True) -> Iterator[Target]:
    """Start a process with a context on the first GPU.

    At the end of the block it is killed if that is safe: its GPU state away, or never restored.
    Otherwise it is left to end by itself, which it does once nobody talks to it.

    Raises:
        TargetFailed: it has no context; says why.
    """
    log = directory / "target.log"
    where = directory / f"target-{os.urandom(4).hex()}"
    argv = [sys.executable, "-m", "evaluation.gpu.target", str(where)]
    argv += [] if huge_pages else ["--no-huge-pages"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where))
        listener.listen(1)
        listener.settimeout(POLL_S)
        process = spawn_detached(argv, log=log)
        target: Target | None = None
        connection: socket.socket | None = None
        try:
            connection = _connected(listener, process, log)
            stream = connection.makefile("rwb")
            said = heard(stream)
            target = Target(ProcessRef.of(process.pid), connection, stream, said["seconds"])
            yield target
        finally:
            where.unlink(missing_ok=True)
            if target is None or target.suspended or target.fresh:
                process.kill()
            if connection is not None:
                with suppress(OSError):  # it is gone already
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            # A restored one that could not be suspended does that itself, or stays.
            _until(lambda: process.poll() is not None, END_TIMEOUT_S)


def _connected(listener: socket.socket, process: Any, log: Path) -> socket.socket:  # noqa: ANN401
    """Return the connection of the process (a Popen) that was started.

    Raises:
        TargetFailed: it ended, or took too long.
    """
    connections: list[socket.socket] = []

    def connected() -> bool:
        with suppress(TimeoutError):
            connections.append(listener.accept()[0])
        return bool(connections) or process.poll() is not None

    _until(connected, START_TIMEOUT_S)
    if not connections:
        raise TargetFailed(f"it did not start: {log.read_text(errors='replace')}")
    connections[0].settimeout(START_TIMEOUT_S)
    return connections[0]


def _until(probe: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not probe() and time.monotonic() < deadline:
        time.sleep(POLL_S)
