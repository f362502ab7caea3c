"""One rank of the test engine: a process with a CUDA context and state in the device's memory.

`python -m swapserve.testing.cuda_rank`, with a Unix socket to the engine's front as descriptor 3.
One JSON line asks, one JSON line answers. A sequence's cache is its last states; the next state is
a hash of all of them, so a byte that is lost or changed shows in each token from then on. The
weights are a pattern; a piece of them is read and compared for each token.
"""

import argparse
import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swapserve.testing.cuda_driver import Cuda, DriverError

SOCKET = 3
STATE = 32
"""Bytes of one state of a sequence."""
CACHED = 64
"""States of a sequence that its cache holds."""
SLOT = STATE * CACHED
BLOCK = 1 << 20
WEIGHT_PARTS = 4
"""Allocations of the weights, so that a copy of them can end half way."""
KV_CACHE, WEIGHTS = "kv_cache", "weights"
TRIGGER_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1


def first_cache(prompt: str, seed: int | None) -> bytes:
    """Return a sequence's cache after its prompt."""
    return hashlib.shake_256(f"{prompt}\0{seed}".encode()).digest(SLOT)


def next_state(cache: bytes, index: int) -> bytes:
    """Return the state that follows, of the token `index`."""
    return hashlib.sha256(cache + index.to_bytes(8, "little")).digest()


def place_of(index: int) -> int:
    """Return where in the cache the state of the token `index` goes."""
    return index % CACHED * STATE


def weights_block(number: int) -> bytes:
    """Return what a block of the weights holds."""
    return hashlib.shake_128(number.to_bytes(8, "little")).digest(4096) * (BLOCK // 4096)


class Memory:
    """What a rank has on its device; parts of it can be given back and fetched again."""

    def __init__(self, cuda: Cuda, *, weights_mb: int, cache_mb: int) -> None:
        self._cuda = cuda
        parts = min(WEIGHT_PARTS, weights_mb)
        self._blocks = {WEIGHTS: _shares(weights_mb, parts), KV_CACHE: [cache_mb]}
        self._addresses: dict[str, list[int]] = {}
        self._kept: dict[str, list[bytes]] = {}
        for tag in (WEIGHTS, KV_CACHE):
            self._allocate(tag)
        self.load_weights()

    @property
    def slots(self) -> int:
        """Sequences that the cache has room for."""
        return sum(self._blocks[KV_CACHE]) * BLOCK // SLOT

    def release(self, tags: Sequence[str], *, keep: bool) -> None:
        """Give device memory back; with `keep`, its content stays in host memory."""
        for tag in tags:
            addresses = self._addresses.pop(tag)
            if keep:
                sizes = zip(addresses, self._blocks[tag], strict=True)
                self._kept[tag] = [self._cuda.read(at, blocks * BLOCK) for at, blocks in sizes]
            for address in addresses:
                self._cuda.free(address)

    def reacquire(self, tags: Sequence[str]) -> None:
        """Allocate again; what was not kept holds nonsense."""
        for tag in tags:
            self._allocate(tag)
            kept = self._kept.pop(tag, None)
            for number, address in enumerate(self._addresses[tag]):
                nonsense = b"\xa5" * (self._blocks[tag][number] * BLOCK)
                self._cuda.write(address, nonsense if kept is None else kept[number])

    def load_weights(self) -> None:
        """Read the weights anew, as from their file."""
        for number, address in enumerate(self._block_addresses()):
            self._cuda.write(address, weights_block(number))

    def weights_are_whole(self) -> bool:
        """Whether each byte of the weights is as it should be."""
        return all(
            self._cuda.read(address, BLOCK) == weights_block(number)
            for number, address in enumerate(self._block_addresses())
        )

    def begin(self, slot: int, prompt: str, seed: int | None) -> None:
        """Put a sequence's cache into a slot."""
        self._cuda.write(self._slot(slot), first_cache(prompt, seed))

    def step(self, slot: int, index: int) -> bytes:
        """Compute one token's state and add it to the cache."""
        cache = self._cuda.read(self._slot(slot), SLOT)
        state = next_state(cache, index)
        addresses = self._block_addresses()
        number = int.from_bytes(state[:4], "little") % len(addresses)
        at = int.from_bytes(state[4:8], "little") % (BLOCK - STATE)
        piece = self._cuda.read(addresses[number] + at, STATE)
        if piece != weights_block(number)[at : at + STATE]:
            state = hashlib.sha256(state + piece).digest()
        self._cuda.write(self._slot(slot) + place_of(index), state)
        return state

    def _slot(self, slot: int) -> int:
        return self._addresses[KV_CACHE][0] + slot * SLOT

    def _allocate(self, tag: str) -> None:
        self._addresses[tag] = [self._cuda.allocate(n * BLOCK) for n in self._blocks[tag]]

    def _block_addresses(self) -> list[int]:
        parts = zip(self._addresses[WEIGHTS], self._blocks[WEIGHTS], strict=True)
        return [start + block * BLOCK for start, blocks in parts for block in range(blocks)]


def _shares(whole: int, parts: int) -> list[int]:
    return [whole * (n + 1) // parts - whole * n // parts for n in range(parts)]


class Rank:
    """Answers what the front asks."""

    def __init__(self, cuda: Cuda, memory: Memory) -> None:
        self._cuda = cuda
        self._memory = memory
        self._answers: dict[str, Callable[..., Any]] = {
            "about": self._about,
            "begin": memory.begin,
            "step": lambda slot, index: memory.step(slot, index).hex(),
            "release": memory.release,
            "reacquire": memory.reacquire,
            "load_weights": memory.load_weights,
            "weights_are_whole": memory.weights_are_whole,
            "spin": cuda.spin,
        }

    def answer(self, line: bytes) -> dict[str, Any]:
        """Do one thing; a failure of the driver is an answer too."""
        asked: dict[str, Any] = json.loads(line)
        try:
            return {"answer": self._answers[asked.pop("do")](**asked)}
        except DriverError as error:
            return {"error": str(error)}

    def _about(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "uuid": self._cuda.uuid, "slots": self._memory.slots}


def _wait(delay_s: float, trigger: Path | None) -> None:
    """Come late: after so many seconds, or when a file appears."""
    time.sleep(delay_s)
    while trigger is not None and not trigger.exists():
        time.sleep(TRIGGER_POLL_S)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the front until it is gone."""
    parser = argparse.ArgumentParser(prog="swapserve.testing.cuda_rank", description=__doc__)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--weights-mb", type=int, required=True)
    parser.add_argument("--cache-mb", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--trigger", type=Path)
    options = parser.parse_args(argv)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=SOCKET) as link, link.makefile("rwb") as lines:
        _wait(options.delay, options.trigger)
        try:
            cuda = Cuda(options.rank)
            memory = Memory(cuda, weights_mb=options.weights_mb, cache_mb=options.cache_mb)
        except (OSError, DriverError) as error:
            sys.exit(f"rank {options.rank}: {error}")
        rank = Rank(cuda, memory)
        for line in lines:
            lines.write(json.dumps(rank.answer(line)).encode() + b"\n")
            lines.flush()


if __name__ == "__main__":
    main()
