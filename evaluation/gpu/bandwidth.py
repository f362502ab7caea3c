"""How fast bytes move between host and device: the limit for whatever moves GPU state.

`python -m evaluation.gpu.bandwidth --bytes N` writes one JSON object per line, one per kind
of copy, with the seconds of each repetition. Besides copies it times what else a driver has to do
to put GPU state into the host's memory: touching fresh pages, and page-locking them.
"""

import argparse
import ctypes
import json
import mmap
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from evaluation.gpu.driver import Driver, DriverFailed
from evaluation.gpu.sheet import Budget, Impossible, Page
from swapserve.errors import CommandError
from swapserve.system.command import run_sync

REPEATS = 7
SMALL = 64 << 20
HUGE_PAGES = {"on": mmap.MADV_HUGEPAGE, "off": mmap.MADV_NOHUGEPAGE}


@contextmanager
def pages(size: int, *, huge: str) -> Iterator[int]:
    """Yield the address of fresh anonymous memory, untouched, with huge pages asked for or not."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        try:
            area.madvise(HUGE_PAGES[huge])
        except OSError as error:
            raise DriverFailed("madvise", error.errno or -1, "no choice of huge pages") from error
        held = ctypes.c_char.from_buffer(area)
        try:
            yield ctypes.addressof(held)
        finally:
            del held
    finally:
        area.close()


def timed(work: Callable[[], None], repeats: int = REPEATS) -> list[float]:
    """Return the seconds of each repetition; one more before them is not counted."""
    work()
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return found


def measure(driver: Driver, size: int) -> Iterator[dict[str, Any]]:
    """Yield one result after the other; one that fails says why."""
    for what, work in _kinds(driver, size):
        try:
            bytes_, seconds = work()
        except DriverFailed as error:
            yield {"what": what, "why": str(error)}
        else:
            rate = bytes_ / median(seconds) / 1e9
            yield {"what": what, "bytes": bytes_, "seconds": seconds, "gb_per_s": rate}


Work = Callable[[], tuple[int, list[float]]]


def _kinds(driver: Driver, size: int) -> Iterator[tuple[str, Work]]:
    down, up = driver.to_device, _swapped(driver)
    small = min(size, SMALL)
    yield "pinned to device", partial(_pinned, driver, size, down)
    yield "pinned to host", partial(_pinned, driver, size, up)
    yield "pinned to device, small", partial(_pinned, driver, small, down)
    yield "pinned to host, small", partial(_pinned, driver, small, up)
    for huge in HUGE_PAGES:
        with_or_without = f"huge pages {huge}"
        yield f"pageable to device, {with_or_without}", partial(_pageable, driver, size, huge, down)
        yield f"pageable to host, {with_or_without}", partial(_pageable, driver, size, huge, up)
        yield f"first touch, {with_or_without}", partial(_touch, size, huge)
        yield f"page lock, {with_or_without}", partial(_lock, driver, size, huge)


Copy = Callable[[int, int, int], None]


def _swapped(driver: Driver) -> Copy:
    return lambda device, host, size: driver.to_host(host, device, size)


def _pinned(driver: Driver, size: int, copy: Copy) -> tuple[int, list[float]]:
    with driver.pinned(size) as host:
        ctypes.memset(host, 0xA5, size)
        return _copy(driver, size, host, copy)


def _pageable(driver: Driver, size: int, huge: str, copy: Copy) -> tuple[int, list[float]]:
    with pages(size, huge=huge) as host:
        ctypes.memset(host, 0x5A, size)
        return _copy(driver, size, host, copy)


def _copy(driver: Driver, size: int, host: int, copy: Copy) -> tuple[int, list[float]]:
    device = driver.alloc(size)
    try:

        def once() -> None:
            copy(device, host, size)
            driver.wait()

        return size, timed(once)
    finally:
        driver.free(device)


def _touch(size: int, huge: str) -> tuple[int, list[float]]:
    found = []
    for _ in range(3):
        with pages(size, huge=huge) as host:
            begun = time.perf_counter()
            ctypes.memset(host, 1, size)
            found.append(time.perf_counter() - begun)
    return size, found


def _lock(driver: Driver, size: int, huge: str) -> tuple[int, list[float]]:
    with pages(size, huge=huge) as host:
        ctypes.memset(host, 1, size)
        found = []
        for _ in range(3):
            begun = time.perf_counter()
            with driver.registered(host, size):
                found.append(time.perf_counter() - begun)
        return size, found


# ------------------------------------------------------------------ the part


def part(page: Page, budget: Budget, *, size: int) -> None:
    """Measure in a process of its own, which may hang or die without harm.

    Raises:
        Impossible: there is no driver, or it gives no context.
    """
    with tempfile.TemporaryDirectory(prefix="swapserve-bandwidth-") as folder:
        out = Path(folder, "lines")
        out.touch()
        argv = [sys.executable, "-m", "evaluation.gpu.bandwidth"]
        argv += ["--bytes", str(size), "--out", str(out)]
        why = ""
        try:
            run_sync(argv, timeout_s=max(1.0, budget.left_s))
        except CommandError as error:
            why = str(error)
        _take(page, out.read_text().splitlines())
    if why and not page.content.get("rates"):
        raise Impossible(why)
    if why:
        page.failed("the program", why)


def _take(page: Page, lines: Sequence[str]) -> None:
    for line in lines:
        found = json.loads(line)
        page.add("rates", **found)
        if "why" in found:
            page.failed(found["what"], found["why"])


def main() -> int:
    """Measure, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.gpu.bandwidth")
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--out", type=Path, default=Path("/dev/stdout"))
    options = parser.parse_args()
    try:
        driver = Driver()
    except (OSError, DriverFailed) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    with options.out.open("a") as out:
        for found in measure(driver, options.bytes):
            out.write(json.dumps(found) + "\n")
            out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
