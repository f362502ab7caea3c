"""The expendable process in which CUDA calls are made: a driver call cannot be cancelled.

`python -m swapserve.keeper.cuda.worker [--binary PATH] FD` starts the driver once and answers
requests on the socket FD, a JSON object per line, several at a time:

    {"id": 1, "op": "hello"}                                         -> {"id": 1, "value": {...}}
    {"id": 2, "op": "lock", "pid": 7, "start": 99, "timeout_s": 10}  -> {"id": 2, "value": null}
                                                    or {"id": 2, "code": 600, "name": ..., ...}
                                                    or {"id": 2, "gone": true}

Before each call it makes sure that the pid still is the process that was meant. It ends, with all
that it has started, when the other end of the socket closes. What a driver prints goes elsewhere.
"""

import argparse
import json
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, assert_never, get_args

from swapserve.keeper.cuda.binary import Binary, BinaryUnusable
from swapserve.keeper.cuda.calls import Backend, CudaCallFailed, Features, Op
from swapserve.keeper.cuda.driver import Driver, DriverMissing
from swapserve.system import gpu
from swapserve.system.process import ProcessRef

CALLS_AT_ONCE = 8
OPS = frozenset(get_args(Op))
Request = dict[str, Any]


def probe(binary: Path | None) -> tuple[Backend | None, Features]:
    """Start the driver and find out what it can do."""
    driver = gpu.look().driver
    try:
        cuda = Driver()
    except DriverMissing as error:
        return None, Features(driver=driver, why_not=str(error))
    if cuda.can_checkpoint:
        return cuda, Features(api="driver", driver=driver, cuda=cuda.version, remaps=cuda.remaps)
    lacks = f"the CUDA driver ({driver or cuda.version}) has no checkpoint calls (570 is the first)"
    if binary is None:
        why_not = f"{lacks}, and there is no cuda-checkpoint (keeper.cuda_checkpoint, or PATH)"
        return None, Features(driver=driver, cuda=cuda.version, why_not=why_not)
    try:
        tool = Binary(binary, driver)
    except BinaryUnusable as error:
        return None, Features(driver=driver, cuda=cuda.version, why_not=f"{lacks}; {error}")
    return tool, Features(api="binary", driver=driver, cuda=cuda.version)


class Server:
    """Answers on one socket until it closes."""

    def __init__(self, channel: socket.socket, binary: Path | None) -> None:
        self._channel = channel
        self._binary = binary
        self._backend: Backend | None = None
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._under_way = 0

    def run(self) -> bool:
        """Serve; return whether calls are under way that nobody waits for any more."""
        for _ in range(CALLS_AT_ONCE):
            threading.Thread(target=self._work, daemon=True).start()
        with self._channel.makefile("rb") as lines:
            for line in lines:
                with self._sending:
                    self._under_way += 1
                self._requests.put(json.loads(line))
        with self._sending:
            return self._under_way > 0

    def _work(self) -> None:
        while True:
            request = self._requests.get()
            answer = self._answer(request) | {"id": request["id"]}
            with self._sending:
                self._under_way -= 1
                try:
                    self._channel.sendall(json.dumps(answer).encode() + b"\n")
                except OSError:
                    return  # the owner is gone; the main thread sees it too

    def _answer(self, request: Request) -> dict[str, Any]:
        if request["op"] == "hello":
            self._backend, features = probe(self._binary)
            return {"value": asdict(features)}
        ref = ProcessRef(request["pid"], request["start"])
        if not ref.alive():
            return {"gone": True}
        try:
            return {"value": self._perform(request)}
        except CudaCallFailed as error:
            if ref.ending():  # it died in the call, whatever the driver made of that
                return {"gone": True}
            return {"code": error.code, "name": error.name, "detail": error.detail}

    def _perform(self, request: Request) -> Any:  # noqa: ANN401
        op: Op = request["op"]
        if op not in OPS or self._backend is None:
            raise ValueError(f"not to be done here: {request}")
        pid = request["pid"]
        match op:
            case "state":
                return self._backend.state(pid)
            case "restore_thread":
                return self._backend.restore_thread(pid)
            case "lock":
                return self._backend.lock(pid, request["timeout_s"])
            case "checkpoint":
                return self._backend.checkpoint(pid)
            case "restore":
                return self._backend.restore(pid, request["pairs"])
            case "unlock":
                return self._backend.unlock(pid)
        assert_never(op)


def _end_all(failure: threading.ExceptHookArgs) -> None:
    """End at once after a mistake of ours: a call without an answer must not look like a hang."""
    traceback.print_exception(failure.exc_value)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve the socket that was given, or print for the doctor what the driver can do."""
    parser = argparse.ArgumentParser(description="CUDA calls of a SwapServe keeper")
    parser.add_argument("--binary", type=Path)
    parser.add_argument("--probe", action="store_true", help="print the features, and end")
    parser.add_argument("fd", type=int, nargs="?")
    arguments = parser.parse_args()
    if arguments.probe:
        sys.stdout.write(json.dumps(asdict(probe(arguments.binary)[1])) + "\n")
        return
    # Its owner needs it until the last engine has ended, also where TERM is sent to everybody.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.excepthook = _end_all
    with socket.socket(fileno=arguments.fd) as channel:
        busy = Server(channel, arguments.binary).run()
    if busy:
        # A driver call cannot be interrupted, and cuda-checkpoint may still run for us.
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
