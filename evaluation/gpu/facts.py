"""What GPU, driver and machine this is: everything that a figure depends on."""

import asyncio
import ctypes
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation import machine
from evaluation.gpu.sheet import Budget, Impossible, Page
from swapserve.config.schema import KeeperConfig
from swapserve.keeper.cuda.pool import Workers
from swapserve.system.gpu import Nvml, NvmlUnavailable
from swapserve.system.tools import find_criu, find_tool

CUSTOM_STORAGE = "cuCheckpointOperationComplete"
"""A driver that has it can hand a process's GPU memory to another one (CUDA 13.4)."""
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_MEMORY = ("MemTotal", "MemFree", "MemAvailable", "SwapTotal", "HugePages_Total")


def part(page: Page, _budget: Budget, *, uuid: str | None) -> None:
    """Note everything that can be read; what cannot is null."""
    page.note(machine={**machine.facts(), **host()})
    page.note(library=library_directory())
    with page.attempt("checkpoint API"):
        page.note(checkpoint=asyncio.run(checkpoint_features()))
    with page.attempt("NVML"):
        page.note(gpu=gpu(uuid))


def host() -> dict[str, Any]:
    """Return what of the machine matters for memory that is pinned, frozen and dumped."""
    return {
        "memory": memory(),
        "huge_pages": {name: _said(_THP / name) for name in ("enabled", "defrag", "shmem_enabled")},
        "driver_file": (_said(_DRIVER_FILE) or "").partition("\n")[0] or None,
        "cgroup2": _said(Path("/sys/fs/cgroup/cgroup.controllers")),
        "root": os.geteuid() == 0,
        "criu": str(find_criu() or "") or None,
        "cuda_checkpoint": str(find_tool("cuda-checkpoint") or "") or None,
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None,
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def memory() -> dict[str, int]:
    """Return bytes (or counts) of /proc/meminfo."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in _MEMORY:
            value, *unit = rest.split()
            found[name] = int(value) << (10 if unit else 0)
    return found


async def checkpoint_features() -> dict[str, Any]:
    """Return what the keeper finds of the checkpoint API, and whether newer functions are there."""
    workers = Workers(KeeperConfig())
    try:
        found = asdict(await workers.features())
    finally:
        await workers.close()
    with suppress(OSError):
        found["custom_storage"] = hasattr(ctypes.CDLL("libcuda.so.1"), CUSTOM_STORAGE)
    return found


def library_directory() -> str | None:
    """Return where the driver's library was loaded from: engines must find the same one."""
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if Path(path).name.startswith("libcuda.so"):
                return str(Path(path).parent)
    return None


def first_gpu() -> str:
    """Return the UUID of the first GPU.

    Raises:
        Impossible: NVML knows of none.
    """
    try:
        gpus = Nvml().gpus()
    except NvmlUnavailable as error:
        raise Impossible(str(error)) from error
    if not gpus:
        raise Impossible("NVML lists no GPU")
    return gpus[0].uuid


def gpu(uuid: str | None) -> dict[str, Any]:
    """Return what NVML says of a GPU (None: the first).

    Raises:
        Impossible: it says nothing.
    """
    uuid = uuid or first_gpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the redirecting package of the same name warns
        import pynvml  # noqa: PLC0415
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Impossible(f"NVML: {error}") from error
    found: dict[str, Any] = {"uuid": uuid}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        for name, read in _readings(pynvml, handle).items():
            try:
                found[name] = _plain(read())
            except (pynvml.NVMLError, AttributeError):  # of an older library, or a lesser one
                found[name] = None
    except pynvml.NVMLError as error:
        raise Impossible(f"NVML and {uuid}: {error}") from error
    finally:
        pynvml.nvmlShutdown()
    return found


def _readings(nvml: Any, handle: Any) -> dict[str, Callable[[], Any]]:  # noqa: ANN401
    clock_memory = 2
    return {
        "name": lambda: nvml.nvmlDeviceGetName(handle),
        "driver": nvml.nvmlSystemGetDriverVersion,
        "cuda": nvml.nvmlSystemGetCudaDriverVersion_v2,
        "nvml": nvml.nvmlSystemGetNVMLVersion,
        "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
        "used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        "processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        "pcie_generation": lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
        "pcie_generation_most": lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
        "pcie_width": lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
        "pcie_width_most": lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
        "bus_id": lambda: nvml.nvmlDeviceGetPciInfo(handle).busId,
        "persistence_mode": lambda: nvml.nvmlDeviceGetPersistenceMode(handle),
        "compute_mode": lambda: nvml.nvmlDeviceGetComputeMode(handle),
        "mig": lambda: nvml.nvmlDeviceGetMigMode(handle)[0],
        "mps": Nvml().mps,
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, clock_memory),
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, 0),
    }


def _plain(value: Any) -> Any:  # noqa: ANN401
    return value.decode() if isinstance(value, bytes) else value


def _said(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
