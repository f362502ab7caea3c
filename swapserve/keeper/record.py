"""What the keeper remembers of an engine across its own death: one small file each.

Written before and after every change, by atomic rename. A later keeper reads it to adopt a
running engine (by pid and start time) and to give an engine the same address again.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from swapserve.keeper.protocol import ImageKind
from swapserve.system.process import ProcessRef

GpuState = Literal["on_device", "moving", "in_host_memory"]


@dataclass(slots=True, kw_only=True)
class Record:
    """One engine.

    Attributes:
        engine: configured name.
        index: its place in the subnet, None without a network namespace.
        port: where it listens.
        address: `host:port` of an engine that others have started; None: that port, on its own
            address.
        process: its first process, None when it is away.
        restored_from: image kind of that process, None after a cold start.
        frozen: whether it was frozen by us.
        gpu: where its GPU state is; `moving` from before the first call of the driver until
            after the last one.
        cuda: the processes whose state was moved to host memory.
        device_bytes: what they held, by GPU, before.
        gpus: the GPUs that its state is of, in the order of its configuration then.
        revived: whether its GPU state was ever brought back: such a process must not be killed
            with its state on the device (NVIDIA/cuda-checkpoint issue 53).
    """

    engine: str
    index: int | None
    port: int
    address: str | None = None
    process: ProcessRef | None = None
    restored_from: ImageKind | None = None
    frozen: bool = False
    gpu: GpuState = "on_device"
    cuda: tuple[ProcessRef, ...] = ()
    device_bytes: dict[str, int] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    revived: bool = False


def load(path: Path) -> Record | None:
    """Read a record; None if there is none or it cannot be understood."""
    try:
        data = json.loads(path.read_text())
        process = data.pop("process")
        cuda = tuple(ProcessRef(**one) for one in data.pop("cuda", ()))
        gpus = tuple(data.pop("gpus", ()))
        return Record(
            **data, cuda=cuda, gpus=gpus, process=ProcessRef(**process) if process else None
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def save(path: Path, record: Record) -> None:
    """Write a record so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(asdict(record), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
