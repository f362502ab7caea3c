"""What NVML says of the stand-in's GPUs; namespaces and images."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swapserve.system.tools import find_tool
from tests.support.cuda import (
    CHECKPOINTED,
    FORWARD,
    OK,
    Caller,
    bring_to,
    cuda_engine,
    ended,
    rank_in_pid_namespace,
)
from tests.support.gpu import MIB, StandIn, two_gpus
from tests.support.imaged import Imaged
from tests.support.leaks import wait_for

NVML = """
import json, pynvml as n
n.nvmlInit()
def one(handle):
    memory = n.nvmlDeviceGetMemoryInfo(handle, version=n.nvmlMemory_v2)
    both = [[[p.pid, p.usedGpuMemory] for p in processes(handle)]
            for processes in (n.nvmlDeviceGetComputeRunningProcesses,
                              n.nvmlDeviceGetMPSComputeRunningProcesses)]
    plain = n.nvmlDeviceGetMemoryInfo(handle)
    assert plain.used == memory.used + memory.reserved and plain.free == memory.free
    return {"uuid": n.nvmlDeviceGetUUID(handle), "name": n.nvmlDeviceGetName(handle),
            "index": n.nvmlDeviceGetIndex(handle), "mig": n.nvmlDeviceGetMigMode(handle),
            "persistence": n.nvmlDeviceGetPersistenceMode(handle),
            "memory": [memory.total, memory.reserved, memory.free, memory.used],
            "pcie": [n.nvmlDeviceGetMaxPcieLinkGeneration(handle),
                     n.nvmlDeviceGetMaxPcieLinkWidth(handle),
                     n.nvmlDeviceGetPcieThroughput(handle, n.NVML_PCIE_UTIL_TX_BYTES)],
            "processes": both[0], "mps": both[1]}
def gpu(index):
    try:
        found = one(n.nvmlDeviceGetHandleByIndex(index))
        assert found == one(n.nvmlDeviceGetHandleByUUID(found["uuid"]))
        return found
    except n.NVMLError as error:
        return str(error)
print(json.dumps({"driver": n.nvmlSystemGetDriverVersion(),
                  "cuda": n.nvmlSystemGetCudaDriverVersion_v2(),
                  "gpus": [gpu(i) for i in range(n.nvmlDeviceGetCount())]}))
n.nvmlShutdown()
"""


def nvml(gpu: StandIn) -> dict[str, Any]:
    done = ended(gpu, sys.executable, "-c", NVML)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nvml_tells_of_devices_memory_and_processes(tmp_path: Path) -> None:
    with two_gpus(tmp_path / "gpu") as gpu:
        first, second = gpu.uuids
        with cuda_engine(gpu, "--vram-mb=16", CUDA_VISIBLE_DEVICES=first) as engine:
            gpu.set_config(
                foreign=((first, 1, MIB),), mps=((second, 2, MIB),), mig=(second,), persistence=True
            )
            found = nvml(gpu)
            assert (found["driver"], found["cuda"]) == ("580.95.05", 13000)
            assert found["gpus"][0] == {
                "uuid": first,
                "name": "Stand-in GPU",
                "index": 0,
                "mig": [0, 0],
                "persistence": 1,
                "memory": [96 * MIB, 2 * MIB, 73 * MIB, 21 * MIB],
                "pcie": [5, 16, 0],
                "processes": [[1, MIB], [engine.rank, 20 * MIB]],
                "mps": [],
            }
            assert found["gpus"][1]["mig"] == [1, 1]
            assert (found["gpus"][1]["processes"], found["gpus"][1]["mps"]) == ([], [[2, MIB]])


def test_nvml_can_lose_a_gpu_be_broken_and_fail_once(tmp_path: Path) -> None:
    with two_gpus(tmp_path / "gpu") as gpu:
        gpu.set_config(lost=(gpu.uuids[1],))
        gpu.fault("memory_info", "error", code=999, nth=2)
        assert nvml(gpu)["gpus"] == ["Unknown Error", "GPU is lost"]
        assert isinstance(nvml(gpu)["gpus"][0], dict)
        gpu.set_config(nvml_init=18)
        with pytest.raises(AssertionError, match="NVML/RM version mismatch"):
            nvml(gpu)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_process_in_a_pid_namespace_is_known_by_its_pid_outside(
    gpu: StandIn, call: Caller
) -> None:
    with rank_in_pid_namespace(gpu, "--weights-mb=8", "--cache-mb=2") as pid:
        wait_for("it has memory", lambda: gpu.used(gpu.uuids[0]) == 14 * MIB)
        assert nvml(gpu)["gpus"][0]["processes"] == [[pid, 14 * MIB]]
        for op in FORWARD:
            assert call(op, pid) == OK
        assert nvml(gpu)["gpus"][0]["processes"] == [[pid, 14 * MIB]]
    assert [json.loads(line)["pid"] for line in gpu.hazards()] == [pid]


@pytest.fixture
def imaged(gpu: StandIn, tmp_path: Path) -> Iterator[Imaged]:
    one = Imaged(gpu, tmp_path)
    try:
        wait_for("it holds memory", one.said.exists)
        yield one
    finally:
        one.kill()


@pytest.mark.criu
@pytest.mark.skipif(
    os.geteuid() != 0 or find_tool("criu") is None,
    reason="needs root and CRIU; run scripts/host-setup",
)
def test_an_image_holds_a_checkpointed_process_and_serves_twice(
    gpu: StandIn, call: Caller, imaged: Imaged
) -> None:
    """With CUDA state in use CRIU refuses; of the image, both copies go on with their memory."""
    assert imaged.criu("dump", "-t", str(imaged.pid), "--leave-running") != 0
    bring_to(CHECKPOINTED, call, imaged.pid)
    held = [str(fd.readlink()) for fd in Path(f"/proc/{imaged.pid}/fd").iterdir()]
    assert not [name for name in held if str(gpu.directory) in name]
    assert imaged.criu("dump", "-t", str(imaged.pid)) == 0
    imaged.reap()
    for _ in range(2):
        assert imaged.criu("restore", "-d", "-S") == 0
        assert call.state(imaged.pid) == CHECKPOINTED
        for op in ("restore", "unlock"):
            assert call(op, imaged.pid) == OK
        assert imaged.goes_on()
        bring_to(CHECKPOINTED, call, imaged.pid)
        imaged.kill()
    assert gpu.hazards() == []
    assert gpu.illegal() == []
