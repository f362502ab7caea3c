"""What NVIDIA's management library says of the GPUs. It only reads."""

from dataclasses import dataclass, field
from typing import Any

CHECKPOINT_DRIVER = 570
"""First driver branch whose CUDA driver API can lock and checkpoint a process (CUDA 12.8).

Source: NVIDIA/cuda-checkpoint, README, "570 Features".
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as NVML lists it."""

    uuid: str
    name: str
    memory_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """The GPUs of this machine; `unavailable` says why nothing can be known of them."""

    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = field(default_factory=tuple)
    unavailable: str | None = None

    @property
    def can_checkpoint(self) -> bool:
        """Whether the driver can move a process's GPU state to host memory."""
        branch = (self.driver or "").partition(".")[0]
        return branch.isdigit() and int(branch) >= CHECKPOINT_DRIVER


def look() -> Gpus:
    """Ask NVML for driver and GPUs; never raises for a machine without them."""
    # Here, so that a machine without the library's driver pays nothing and shows no traceback.
    try:
        import pynvml  # noqa: PLC0415
    except ImportError as error:
        return Gpus(unavailable=f"the Python package nvidia-ml-py is missing ({error})")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Gpus(unavailable=str(error))
    try:
        return _read(pynvml)
    except pynvml.NVMLError as error:
        return Gpus(unavailable=str(error))
    finally:
        pynvml.nvmlShutdown()


def _read(nvml: Any) -> Gpus:  # noqa: ANN401
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    return Gpus(
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        gpus=tuple(_gpu(nvml, handle) for handle in handles),
    )


def _gpu(nvml: Any, handle: Any) -> Gpu:  # noqa: ANN401
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(memory.total),
        used_bytes=int(memory.used),
    )


def _text(value: str | bytes) -> str:
    """Return text; older versions of the library answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value
