"""What machine this is, and what else went on there while something was measured."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swapserve.system.process import total_memory

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PRESSURE = Path("/proc/pressure/cpu")
_STEAL_FIELD = 8


def facts() -> dict[str, Any]:
    """Return what the figures depend on and a reader cannot know."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "kernel": platform.release(),
        "transparent_huge_pages": huge_page_setting(),
        "frequency_control": Path("/sys/devices/system/cpu/cpu0/cpufreq").is_dir(),
        "os": _os_name(),
    }


def huge_page_setting() -> str:
    """Return the host's setting now, `unknown` where there is none."""
    try:
        return _THP.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Fill the yielded dict, at the end of the block, with what the machine did meanwhile.

    `pressure_s`: time in which some task waited for a CPU. `steal_s`: CPU time that the hypervisor
    gave to others. `load`: load average of the last minute.
    """
    found: dict[str, float] = {}
    begun, pressure, steal = time.monotonic(), _pressure_s(), _steal_s()
    try:
        yield found
    finally:
        found["seconds"] = time.monotonic() - begun
        found["pressure_s"] = _pressure_s() - pressure
        found["steal_s"] = _steal_s() - steal
        found["load"] = os.getloadavg()[0]


def _pressure_s() -> float:
    try:
        some = _PRESSURE.read_text().splitlines()[0]
    except (OSError, IndexError):
        return 0.0
    return int(some.rsplit("total=", 1)[1]) / 1e6


def _steal_s() -> float:
    cpu = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(cpu[_STEAL_FIELD]) / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
