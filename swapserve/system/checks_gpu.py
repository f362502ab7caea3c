"""The doctor's look at GPUs: their driver, and whether it can move what engines have on them."""

import json
import signal
import sys
from collections.abc import Collection, Iterator
from typing import Any

from swapserve.config.check_gpu import uses_driver
from swapserve.config.schema import DeviceConfig, ModelConfig
from swapserve.errors import CommandError
from swapserve.states import Tier
from swapserve.system import gpu
from swapserve.system.check import Check, Result, Scope, gib
from swapserve.system.command import run_sync
from swapserve.system.gpu import Gpu, Gpus
from swapserve.system.tools import find_tool

PROBE_TIMEOUT_S = 60.0
"""Longest start of the CUDA driver; with eight GPUs it takes seconds.

Source: NVIDIA/nvcf issue 437 (2.7 s on eight H100).
"""
_PROBE = ("-m", "swapserve.keeper.cuda.worker", "--probe")
"""The keeper's own program, run as one: what it finds is what the keeper will find."""
_REMAP_DRIVER = 580
_SWAPPINESS = 10
"""Above it the kernel swaps out what rests although RAM is free for it."""


def gpus(scope: Scope) -> Iterator[Check]:
    """Look at the GPUs, and at what stands in the way of moving state off and onto them."""
    seen = gpu.look()
    wanted = _wanted(scope)
    yield _driver(seen, bool(wanted))
    if not seen.gpus:
        return
    if wanted:
        yield _devices(seen, wanted, scope)
    yield _mig(seen, _by_driver(scope))
    yield _mps(seen, _by_driver(scope))
    yield _persistence(seen.gpus, bool(wanted))
    yield _links(seen.gpus, bool(wanted))


def _wanted(scope: Scope) -> list[DeviceConfig]:
    devices = scope.config.devices.values() if scope.config else ()
    return [device for device in devices if device.kind == "gpu"]


def _by_driver(scope: Scope) -> list[ModelConfig]:
    """Return the models whose state the driver may have to move."""
    models = scope.config.models.values() if scope.config else ()
    return [model for model in models if uses_driver(model)]


def _unless(asked: Collection[object] | bool, status: Result) -> Result:
    """Return a status for what does not work: `off` if nothing asks for it."""
    return status if asked else "off"


def _driver(seen: Gpus, wanted: bool) -> Check:
    why = "Devices of kind 'gpu' are found, and their memory is watched, through NVIDIA's driver."
    if seen.unavailable is not None or not (seen.gpus or seen.broken):
        return Check(
            name="gpu",
            status=_unless(wanted, "fail"),
            found=seen.unavailable or "the driver sees no GPU",
            why=why,
            mend="Install NVIDIA's driver, 570 or newer (in a container: --gpus all).",
        )
    listed = [f"{one.name} {gib(one.memory_bytes)} ({one.uuid})" for one in seen.gpus]
    found = f"driver {seen.driver}, CUDA {seen.cuda}: " + ", ".join([*listed, *seen.broken])
    if seen.broken:
        mend = (
            "Look for Xid in the kernel's log; 'nvidia-smi --gpu-reset', or a reboot, brings a lost"
            " GPU back."
        )
        status = _unless(wanted, "fail")
        return Check(name="gpu", status="warn" if status == "off" else status, found=found, why=why,
                     mend=mend)  # fmt: skip
    return Check(name="gpu", status="ok", found=found, why=why)


def _devices(seen: Gpus, wanted: list[DeviceConfig], scope: Scope) -> Check:
    name, why = "gpu devices", "Engines are placed on them by the memory that the file promises."
    known = {one.uuid: one for one in seen.gpus}
    instances = {uuid for one in seen.gpus for uuid in one.instances}
    absent = [one for one in wanted if one.uuid not in known and one.uuid not in instances]
    if absent:
        found = "not on this machine: " + ", ".join(f"{one.name} ({one.uuid})" for one in absent)
        mend = "Correct their uuid; 'nvidia-smi -L' lists what there is."
        return Check(name=name, status="fail", found=found, why=why, mend=mend)
    whole = [(one, known[one.uuid].memory_bytes) for one in wanted if one.uuid in known]
    over = [(one, total) for one, total in whole if one.memory_bytes > total]
    if over:
        found = ", ".join(
            f"{one.name} promises {gib(one.memory_bytes)} of {gib(total)}" for one, total in over
        )
        mend = "Lower 'memory' of these devices below what the GPU has."
        return Check(name=name, status="fail", found=found, why=why, mend=mend)
    margin = scope.config.keeper.gpu_margin_bytes if scope.config else 0
    tight = [(one, total) for one, total in whole if one.memory_bytes + margin > total]
    if tight:
        found = f"less than keeper.gpu_margin ({gib(margin)}) beside " + ", ".join(
            f"{one.name} ({gib(one.memory_bytes)} of {gib(total)})" for one, total in tight
        )
        mend = "Lower 'memory' of these devices: an engine that fills it could never come back."
        return Check(name=name, status="warn", found=found, why=why, mend=mend)
    found = ", ".join(f"{one.name}: {gib(one.memory_bytes)}" for one in wanted)
    return Check(name=name, status="ok", found=found, why=why)


def _mig(seen: Gpus, models: list[ModelConfig]) -> Check:
    why = "The CUDA driver cannot checkpoint state on a GPU that MIG splits."
    split = [one for one in seen.gpus if one.mig]
    if not split:
        return Check(name="MIG", status="ok", found="no GPU is split", why=why)
    hit = [model for model in models if {one.uuid for one in split} & set(model.gpus)]
    found = "splits " + ", ".join(one.uuid for one in split)
    if hit:
        found += f", where {_names(hit)} would have to be moved"
    mend = "'nvidia-smi -mig 0' on them, or 'mechanism: sleep' or 'restart' for such models."
    return Check(name="MIG", status=_unless(hit, "fail"), found=found, why=why, mend=mend)


def _mps(seen: Gpus, models: list[ModelConfig]) -> Check:
    why = "The CUDA driver cannot checkpoint state of MPS's clients."
    if seen.mps is False:
        return Check(name="MPS", status="ok", found="not in use", why=why)
    mend = "'echo quit | nvidia-cuda-mps-control' ends it; 'mechanism: sleep' or 'restart' for"
    mend += " such models goes without the driver."
    if seen.mps is None:
        found = "unknown: the driver does not say"
        return Check(name="MPS", status=_unless(models, "warn"), found=found, why=why, mend=mend)
    found = "in use" + (f", and {_names(models)} would have to be moved" if models else "")
    return Check(name="MPS", status=_unless(models, "fail"), found=found, why=why, mend=mend)


def _persistence(seen: tuple[Gpu, ...], wanted: bool) -> Check:
    # Source: cuda.h 12.8, cuCheckpointProcessRestore.
    why = (
        "A CUDA restore needs a driver that is kept initialised; without persistence mode each GPU"
        " is started anew after its last process has left."
    )
    name = "persistence mode"
    off = [one.uuid for one in seen if one.persistence is False]
    if off:
        mend = "Start nvidia-persistenced, or 'nvidia-smi -pm 1' as root."
        found = f"off on {', '.join(off)}"
        return Check(name=name, status=_unless(wanted, "warn"), found=found, why=why, mend=mend)
    unknown = any(one.persistence is None for one in seen)
    found = "not told by the driver" if unknown else "on"
    return Check(name=name, status="ok", found=found, why=why)


def _links(seen: tuple[Gpu, ...], wanted: bool) -> Check:
    why = "GPU state leaves and comes back over this link: it bounds every swap."
    found, narrow = [], False
    for one in seen:
        if one.pcie_generation is None or one.pcie_width is None:
            found.append(f"{one.uuid}: unknown")
            continue
        less = one.pcie_max_width is not None and one.pcie_width < one.pcie_max_width
        of = f" of x{one.pcie_max_width}" if less else ""
        found.append(f"{one.uuid}: PCIe {one.pcie_generation}.0 x{one.pcie_width}{of}")
        narrow |= less
    return Check(
        name="PCIe",
        status=_unless(wanted, "warn") if narrow else "ok",
        found=", ".join(found),
        why=why,
        mend="Move the card to a slot with all lanes; look at risers and BIOS." if narrow else "",
    )


def checkpoint(scope: Scope) -> Iterator[Check]:
    """Start the driver as the keeper would, and ask what it can move."""
    why = "The CUDA driver moves an engine's GPU state to host memory and back."
    name = "checkpoint API"
    asked = _by_driver(scope)
    configured = scope.config.keeper.cuda_checkpoint if scope.config else None
    tool = find_tool("cuda-checkpoint", configured)
    argv = [sys.executable, *_PROBE, *(["--binary", str(tool)] if tool else [])]
    mend = (
        "Install NVIDIA's driver 570 or newer (for 550 to 565: put cuda-checkpoint on PATH, or name"
        " it in keeper.cuda_checkpoint)."
    )
    try:
        said = run_sync(argv, timeout_s=PROBE_TIMEOUT_S).stdout
        features: dict[str, Any] = json.loads(said.splitlines()[-1])
    except CommandError as error:
        found = f"starting the driver ended the program that did it: {_end(error)}"
        yield Check(name=name, status=_unless(asked, "fail"), found=found, why=why, mend=mend)
        return
    api, driver, cuda = (features.get(key) for key in ("api", "driver", "cuda"))
    if api is None:
        found = str(features.get("why_not") or "there is none")
        yield Check(name=name, status=_unless(asked, "fail"), found=found, why=why, mend=mend)
        return
    version = f"driver {driver}, CUDA {cuda // 1000}.{cuda % 1000 // 10}" if cuda else f"{driver}"
    if api == "binary":
        found = f"{tool}, since {version} has no such calls: a process for each step, so slower"
        yield Check(name=name, status="warn", found=found, why=why, mend=mend)
    else:
        yield Check(name=name, status="ok", found=version, why=why)
    yield _remapping(remaps=bool(features.get("remaps")))


def _end(error: CommandError) -> str:
    how = f"exit {error.status}" if error.status >= 0 else signal.Signals(-error.status).name
    return f"{how}. {error.output_tail}".rstrip()


def _remapping(*, remaps: bool) -> Check:
    why = "State could come back to another GPU of the same kind than it was on."
    name = "GPU remapping"
    if remaps:
        return Check(name=name, status="ok", found="the driver can", why=why)
    mend = f"Install NVIDIA's driver {_REMAP_DRIVER} or newer."
    return Check(name=name, status="off", found="the driver cannot", why=why, mend=mend)


def host_tier(scope: Scope) -> Iterator[Check]:
    """Look at the RAM that takes GPU state, and at what the kernel may do with it."""
    config = scope.config
    if config is None:
        return
    models = [one for one in config.models.values() if one.gpus and Tier.HOST in one.tiers]
    pools = {name: config.devices[name] for one in models if (name := one.ram) is not None}
    if not pools:
        return
    on_gpus = sum(device.memory_bytes for device in _wanted(scope))
    room = sum(device.memory_bytes for device in pools.values())
    why = "What leaves a GPU for the tier 'host' is kept in RAM."
    found = f"{gib(room)} for the state of GPUs with {gib(on_gpus)} in all"
    if room < on_gpus:
        first = next(iter(pools))
        mend = f"Raise devices.{first}.memory if there is RAM; what finds no room goes to disk, or"
        mend += " is stopped and started."
        yield Check(name="host tier", status="warn", found=found, why=why, mend=mend)
    else:
        yield Check(name="host tier", status="ok", found=found, why=why)
    yield _swap(scope)


def _swap(scope: Scope) -> Check:
    why = "GPU state that rests in RAM is memory of a process: the kernel may swap it out."
    fields = dict(line.split(":", 1) for line in scope.read("proc/meminfo").splitlines())
    total = int(fields["SwapTotal"].split()[0]) * 1024
    if total == 0:
        return Check(name="swap", status="ok", found="none: it stays in RAM", why=why)
    swappiness = int(scope.read("proc/sys/vm/swappiness"))
    found = f"{gib(total)} of swap, vm.swappiness {swappiness}"
    if swappiness <= _SWAPPINESS:
        return Check(name="swap", status="ok", found=found, why=why)
    mend = (
        f"'sysctl vm.swappiness={_SWAPPINESS}' keeps it in RAM while there is some; leave it if the"
        " swap partition is on a fast disk and RAM is short: it is a cheap further tier."
    )
    return Check(name="swap", status="warn", found=found, why=why, mend=mend)


def _names(models: list[ModelConfig]) -> str:
    return ", ".join(f"'{model.name}'" for model in models)


CHECKS = (gpus, checkpoint, host_tier)
