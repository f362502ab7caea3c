"""Questions to NVIDIA's management library (NVML), each answered in our words.

`pynvml` is loaded by `package` and handed on, so that nothing here needs a GPU to be imported.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

CHECKPOINT_DRIVER = 570
"""First driver branch whose CUDA driver API can lock and checkpoint a process (CUDA 12.8).

Source: NVIDIA/cuda-checkpoint, README, "570 Features".
"""

_LIBRARY = "libnvidia-ml.so.1"
_MPS_COMM = "nvidia-cuda-mps"
"""What the kernel keeps (15 characters) of nvidia-cuda-mps-control and nvidia-cuda-mps-server."""
_T = TypeVar("_T")


class NvmlUnavailable(Exception):
    """NVML cannot answer; `reason` is one sentence without a full stop."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as NVML lists it; None where it does not say."""

    uuid: str
    name: str
    memory_bytes: int
    used_bytes: int
    """What processes use; what the driver reserves for itself is not in it."""
    mig: bool = False
    """Whether MIG splits it into instances, which the driver cannot checkpoint."""
    instances: tuple[str, ...] = ()
    """UUIDs of its MIG instances."""
    persistence: bool | None = None
    """Whether the driver keeps it initialised while nobody uses it."""
    pcie_generation: int | None = None
    """Of the fastest link that GPU and slot can have; at rest the link is slower."""
    pcie_width: int | None = None
    """Lanes in use."""
    pcie_max_width: int | None = None
    """Lanes that GPU and slot can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """The GPUs of this machine; `unavailable` says why nothing can be known of them."""

    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = field(default_factory=tuple)
    broken: tuple[str, ...] = ()
    """A sentence for each GPU that does not answer."""
    mps: bool | None = None
    """Whether MPS serves them; None if that cannot be told."""
    unavailable: str | None = None

    @property
    def can_checkpoint(self) -> bool:
        """Whether the driver can move a process's GPU state to host memory."""
        branch = (self.driver or "").partition(".")[0]
        return branch.isdigit() and int(branch) >= CHECKPOINT_DRIVER


def package() -> Any:  # noqa: ANN401
    """Return the library's Python package.

    Raises:
        NvmlUnavailable: it is not installed.
    """
    # Here, so that a machine without a GPU pays nothing.
    try:
        import pynvml  # noqa: PLC0415
    except ImportError as error:
        missing = f"the Python package nvidia-ml-py is missing ({error})"
        raise NvmlUnavailable(missing) from error
    return pynvml


def lost_codes(nvml: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return the answers after which what was opened must be opened anew."""
    return (
        nvml.NVML_ERROR_UNINITIALIZED,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED,
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        *_lost_gpu(nvml),
    )


def _lost_gpu(nvml: Any) -> tuple[int, ...]:  # noqa: ANN401
    return (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)


def reason(nvml: Any, error: Any) -> str:  # noqa: ANN401
    """Return one sentence for an answer of NVML's that is an error."""
    sentences = {
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "NVIDIA's kernel driver is not loaded",
        nvml.NVML_ERROR_NO_PERMISSION: (
            "this account may not ask NVIDIA's driver (look at the rights of /dev/nvidiactl)"
        ),
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
            "NVIDIA's library and kernel driver are of different versions, as after an update"
            " without a reboot"
        ),
        nvml.NVML_ERROR_GPU_IS_LOST: "a GPU is lost: it does not answer on the bus any more",
        nvml.NVML_ERROR_RESET_REQUIRED: "a GPU must be reset before it can be used again",
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND: (
            f"NVIDIA's driver is too old: its {_LIBRARY} lacks a function"
        ),
    }
    if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return f"NVIDIA's driver is not installed, or not usable: {_loading()}"
    return sentences.get(error.value) or f"NVML answers: {str(error).rstrip('.')}"


def _loading() -> str:
    """Return why the library cannot be loaded, in the loader's words."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as error:
        return str(error)
    return f"{_LIBRARY} could not be loaded"


def read(nvml: Any) -> Gpus:  # noqa: ANN401
    """Return driver and GPUs."""
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
    gpus, broken = inventory(nvml)
    return Gpus(
        driver=text(nvml.nvmlSystemGetDriverVersion()),
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        gpus=gpus,
        broken=broken,
    )


def inventory(nvml: Any) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:  # noqa: ANN401
    """Return the GPUs that answer, and a sentence for each that does not."""
    gpus, broken = [], []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus.append(_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError as error:
            if error.value in lost_codes(nvml) and error.value not in _lost_gpu(nvml):
                raise
            broken.append(f"GPU {index} does not answer: {reason(nvml, error)}")
    return tuple(gpus), tuple(broken)


def _gpu(nvml: Any, handle: Any) -> Gpu:  # noqa: ANN401
    room = memory(nvml, handle)
    mig = _mig(nvml, handle)
    instances = _instances(nvml, handle) if mig else ()
    persistence = _maybe(nvml, nvml.nvmlDeviceGetPersistenceMode, handle)
    return Gpu(
        uuid=text(nvml.nvmlDeviceGetUUID(handle)),
        name=text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(room.total),
        used_bytes=int(room.used),
        mig=mig,
        instances=tuple(text(nvml.nvmlDeviceGetUUID(one)) for one in instances),
        persistence=None if persistence is None else bool(persistence),
        pcie_generation=_maybe(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_width=_maybe(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        pcie_max_width=_maybe(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
    )


def memory(nvml: Any, handle: Any) -> Any:  # noqa: ANN401
    """Return total, used and free; the second version does not count what is reserved as used."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError_FunctionNotFound:  # before driver 510
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _mig(nvml: Any, handle: Any) -> bool:  # noqa: ANN401
    """Return whether MIG is on; a GPU or driver that knows no such mode has it off."""
    modes = _maybe(nvml, nvml.nvmlDeviceGetMigMode, handle)
    return modes is not None and modes[0] == nvml.NVML_DEVICE_MIG_ENABLE


def _instances(nvml: Any, handle: Any) -> tuple[Any, ...]:  # noqa: ANN401
    found = []
    for index in range(_maybe(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        with contextlib.suppress(nvml.NVMLError_NotFound):  # fewer than there could be
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
    return tuple(found)


def _maybe(nvml: Any, question: Callable[[Any], _T], handle: Any) -> _T | None:  # noqa: ANN401
    """Return an answer, or None if this GPU, driver or account has none."""
    try:
        return question(handle)
    except (
        nvml.NVMLError_NotSupported,
        nvml.NVMLError_FunctionNotFound,
        nvml.NVMLError_NoPermission,
    ):
        return None


def _processes(nvml: Any, handle: Any) -> Iterator[list[Any]]:  # noqa: ANN401
    """Yield the processes on a GPU, in a list for each kind of context."""
    yield nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    for question in (
        nvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
        nvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
    ):
        yield _maybe(nvml, question, handle) or []


def _used_on(nvml: Any, handle: Any, pids: frozenset[int]) -> dict[int, int]:  # noqa: ANN401
    """Return the bytes on one GPU of each of `pids` that is listed there."""
    used: dict[int, int] = {}
    for processes in _processes(nvml, handle):
        here: dict[int, int] = {}
        for process in processes:
            if process.pid not in pids:
                continue
            if process.usedGpuMemory is None:
                raise NvmlUnavailable(
                    f"NVIDIA's driver does not say how much GPU memory process {process.pid} uses"
                )
            # Once for each MIG instance that it uses.
            here[process.pid] = here.get(process.pid, 0) + int(process.usedGpuMemory)
        used |= {pid: max(bytes_, used.get(pid, 0)) for pid, bytes_ in here.items()}
    return used


def used_by(nvml: Any, pids: frozenset[int]) -> dict[str, int]:  # noqa: ANN401
    """Return the bytes of processes by GPU, or by MIG instance where there are some.

    A GPU that is lost is passed over: whatever was on it is gone.
    """
    found: dict[str, int] = {}
    for gpu in _handles(nvml):
        for handle in (_instances(nvml, gpu) if _mig(nvml, gpu) else ()) or (gpu,):
            used = _used_on(nvml, handle, pids)
            if used:
                found[text(nvml.nvmlDeviceGetUUID(handle))] = sum(used.values())
    return found


def _handles(nvml: Any) -> Iterator[Any]:  # noqa: ANN401
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            yield nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError_GpuIsLost:
            continue


def mps_clients(nvml: Any) -> bool:  # noqa: ANN401
    """Return whether a process uses a GPU through MPS."""
    question = nvml.nvmlDeviceGetMPSComputeRunningProcesses_v3
    return any(_maybe(nvml, question, handle) for handle in _handles(nvml))


def mps_daemon() -> bool:
    """Return whether the control daemon or a server of MPS runs here."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (Path(entry.path) / "comm").read_text().strip() == _MPS_COMM:
                    return True
    return False


def text(value: str | bytes) -> str:
    """Return text; older versions of the library answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value
