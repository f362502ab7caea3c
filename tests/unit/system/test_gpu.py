"""NVML through real pynvml, on the stand-in's library, in a process for each machine."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swapserve.system import nvml as nvmls
from swapserve.system.nvml import NvmlUnavailable
from swapserve.system.process import ProcessRef
from tests.support.gpu import MIB, StandIn, standin
from tests.support.nvml import Asker, asker, library, program_named

SIZE = 1024 * MIB
RESERVED = 2 * MIB


@pytest.fixture
def gpus(tmp_path: Path) -> Iterator[StandIn]:
    """A machine with two GPUs of 1 GiB."""
    with standin(tmp_path / "gpus", gpus=[SIZE, SIZE], persistence=True) as machine:
        yield machine


@pytest.fixture
def nvml(gpus: StandIn) -> Iterator[Asker]:
    with asker(gpus.env) as process:
        yield process


# ---------------------------------------------------------------- what is there


def test_gpus_are_listed_by_uuid_with_what_bounds_a_swap(gpus: StandIn, nvml: Asker) -> None:
    first, second = nvml.ask("nvml.gpus()")
    assert (first["uuid"], second["uuid"]) == gpus.uuids
    assert first["memory_bytes"] == SIZE
    assert (first["mig"], first["persistence"]) == (False, True)
    assert (first["pcie_generation"], first["pcie_width"], first["pcie_max_width"]) == (5, 16, 16)
    seen = nvml.ask("gpu.look()")
    assert (seen["driver"], seen["cuda"], seen["mps"]) == ("580.95.05", "13.0", False)
    assert len(seen["gpus"]) == 2
    assert nvml.ask("gpu.look().can_checkpoint") is True


def test_free_memory_is_what_an_allocation_could_get(gpus: StandIn, nvml: Asker) -> None:
    uuid, other = gpus.uuids
    gpus.set_config(foreign=((uuid, 77, 100 * MIB),))
    assert nvml.ask(f"nvml.free({uuid!r})") == SIZE - RESERVED - 100 * MIB
    assert nvml.ask(f"nvml.free({other!r})") == SIZE - RESERVED
    assert nvml.ask("nvml.gpus()")[0]["used_bytes"] == 100 * MIB


def test_bytes_of_processes_are_summed_for_each_gpu(gpus: StandIn, nvml: Asker) -> None:
    uuid, other = gpus.uuids
    gpus.set_config(
        foreign=((uuid, 7, 100 * MIB), (uuid, 8, 10 * MIB), (other, 8, MIB), (other, 9, 5 * MIB))
    )
    assert nvml.ask("nvml.used_by([7, 8])") == {uuid: 110 * MIB, other: MIB}
    assert nvml.ask("nvml.used_by([7])") == {uuid: 100 * MIB}
    assert nvml.ask("nvml.used_by([6])") == {}
    assert nvml.ask("nvml.used_by([])") == {}


def test_a_process_with_contexts_of_two_kinds_counts_once(gpus: StandIn, nvml: Asker) -> None:
    uuid = gpus.uuids[0]
    gpus.set_config(foreign=((uuid, 7, 100 * MIB),), mps=((uuid, 7, 100 * MIB), (uuid, 8, MIB)))
    assert nvml.ask("nvml.used_by([7, 8])") == {uuid: 101 * MIB}


def test_a_gpu_that_nvml_does_not_know_is_named(nvml: Asker) -> None:
    assert nvml.why("nvml.free('GPU-9')").startswith("NVML knows no GPU GPU-9 (`nvidia-smi -L`")


def test_mig_is_seen_for_each_gpu(gpus: StandIn, nvml: Asker) -> None:
    gpus.set_config(mig=(gpus.uuids[1],))
    assert [one["mig"] for one in nvml.ask("nvml.gpus()")] == [False, True]


def test_mps_is_seen_by_its_clients(gpus: StandIn, nvml: Asker) -> None:
    assert nvml.ask("nvml.mps()") is False
    gpus.set_config(mps=((gpus.uuids[1], 7, MIB),))
    assert nvml.ask("nvml.mps()") is True
    assert nvml.ask("nvml.look()")["mps"] is True


@pytest.mark.parametrize("name", ["nvidia-cuda-mps-control", "nvidia-cuda-mps-server"])
def test_mps_is_seen_by_its_daemon_also_without_nvml(tmp_path: Path, name: str) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    with asker({"LD_LIBRARY_PATH": str(tmp_path)}) as process:
        assert "not installed" in process.why("nvml.mps()")
        with program_named(tmp_path / name) as pid:
            assert ProcessRef.of(pid).alive()
            assert process.ask("nvml.mps()") is True
        assert "not installed" in process.why("nvml.mps()")


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (4, "this account may not ask NVIDIA's driver"),
        (9, "NVIDIA's kernel driver is not loaded"),
        (13, "too old: its libnvidia-ml.so.1 lacks a function"),
        (18, "of different versions, as after an update"),
        (999, "NVML answers: "),
    ],
)
def test_a_driver_that_does_not_start_is_one_sentence(
    gpus: StandIn, nvml: Asker, code: int, words: str
) -> None:
    gpus.set_config(nvml_init=code)
    why = nvml.why("nvml.gpus()")
    assert words in why
    assert "\n" not in why
    assert not why.endswith(".")
    assert nvml.ask("gpu.look()")["unavailable"] == why
    gpus.set_config(nvml_init=0)
    assert len(nvml.ask("nvml.gpus()")) == 2


@pytest.mark.parametrize("content", [b"", b"not a library at all", b"\x7fELF but cut off"])
def test_a_library_that_cannot_be_loaded_is_described_by_the_loader(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(content)
    with asker({"LD_LIBRARY_PATH": str(tmp_path)}) as process:
        why = process.why("nvml.used_by([1])")
    assert why.startswith("NVIDIA's driver is not installed, or not usable: ")
    assert str(tmp_path) in why


def test_a_library_of_another_age_is_too_old(tmp_path: Path) -> None:
    env = library(tmp_path, "int nvmlShutdown(void) { return 0; }\n")
    with asker(env) as process:
        assert "too old" in process.why("nvml.gpus()")


def test_a_lost_gpu_does_not_hide_the_other(gpus: StandIn, nvml: Asker) -> None:
    lost, other = gpus.uuids
    gpus.set_config(lost=(lost,), foreign=((other, 7, MIB),))
    assert [one["uuid"] for one in nvml.ask("nvml.gpus()")] == [other]
    (sentence,) = nvml.ask("gpu.look()")["broken"]
    assert sentence.startswith("GPU 0 does not answer: a GPU is lost")
    assert nvml.ask("nvml.used_by([7])") == {other: MIB}
    assert nvml.ask("nvml.mps()") is False
    assert nvml.ask(f"nvml.free({other!r})") > 0
    assert "a GPU is lost" in nvml.why(f"nvml.free({lost!r})")


def test_what_was_lost_is_opened_anew(gpus: StandIn, nvml: Asker) -> None:
    uuid = gpus.uuids[0]
    room = nvml.ask(f"nvml.free({uuid!r})")
    gpus.set_config(lost=(uuid,))
    assert "lost" in nvml.why(f"nvml.free({uuid!r})")
    gpus.set_config(lost=())
    assert nvml.ask(f"nvml.free({uuid!r})") == room


def test_a_driver_that_was_loaded_anew_is_found_again(gpus: StandIn, nvml: Asker) -> None:
    assert len(nvml.ask("nvml.gpus()")) == 2
    # The library's own handle is gone, as after a reload: the reading is tried once more.
    nvml.ask("__import__('pynvml').nvmlShutdown()")
    assert len(nvml.ask("nvml.gpus()")) == 2
    config = gpus.directory / "config"
    config.rename(gpus.directory / "away")
    assert "kernel driver is not loaded" in nvml.why("nvml.gpus()")
    (gpus.directory / "away").rename(config)
    assert len(nvml.ask("nvml.gpus()")) == 2


def test_a_reading_that_fails_is_no_reading(gpus: StandIn, nvml: Asker) -> None:
    gpus.fault("memory_info", "error", code=999)
    assert nvml.why(f"nvml.free({gpus.uuids[0]!r})").startswith("NVML answers: ")
    assert nvml.ask(f"nvml.free({gpus.uuids[0]!r})") == SIZE - RESERVED


def test_it_may_be_closed_and_asked_again(nvml: Asker) -> None:
    assert len(nvml.ask("nvml.gpus()")) == 2
    assert nvml.ask("nvml.close()") is None
    assert nvml.ask("nvml.close()") is None
    assert len(nvml.ask("nvml.gpus()")) == 2


def test_many_threads_may_ask_at_once(gpus: StandIn, nvml: Asker) -> None:
    gpus.set_config(foreign=((gpus.uuids[0], 7, MIB),))
    pool = "__import__('concurrent.futures').futures.ThreadPoolExecutor(8)"
    answers = nvml.ask(
        f"[*{pool}.map(lambda n: (nvml.close() if n % 10 == 0 else nvml.used_by([7])), range(80))]"
    )
    assert [one for one in answers if one is not None] == [{gpus.uuids[0]: MIB}] * 72


HANGS = "#include <unistd.h>\nint nvmlInitWithFlags(unsigned f) { (void)f; for (;;) pause(); }\n"


def test_a_driver_that_never_answers_is_waited_for_a_while(tmp_path: Path) -> None:
    with asker(library(tmp_path, HANGS)) as process:
        process.ask("setattr(gpu, 'LOOK_TIMEOUT_S', 0.3)")
        seen = process.ask("gpu.look()")
        assert seen["unavailable"] == "NVIDIA's driver has not answered for 0.3 s"


def test_who_asks_after_one_that_hangs_is_told_so(tmp_path: Path) -> None:
    with asker(library(tmp_path, HANGS)) as process:
        process.ask("setattr(gpu, 'BUSY_TIMEOUT_S', 0.3)")
        first = "__import__('threading').Thread(target=nvml.gpus, daemon=True).start()"
        process.ask(first)
        why = process.why("nvml.gpus()")
        assert why == "NVIDIA's driver has not answered an earlier question for 0.3 s"


def test_a_driver_that_hangs_is_waited_for_once(tmp_path: Path) -> None:
    with asker(library(tmp_path, HANGS)) as process:
        process.ask("setattr(gpu, 'ANSWER_TIMEOUT_S', 0.3)")
        assert process.why("nvml.gpus()") == "NVIDIA's driver has not answered for 0.3 s"
        process.ask("setattr(gpu, 'ANSWER_TIMEOUT_S', 600)")
        hangs = "NVIDIA's driver hangs: an earlier question has no answer yet"
        assert process.why("nvml.free('GPU-0')") == hangs
        assert process.why("nvml.used_by([1])") == hangs


# ---------------------------------------------------------------- what the stand-in has not


class NvmlError(Exception):
    """What the package raises; its subclasses are picked by number."""


class NotSupported(NvmlError):
    """This GPU has no such thing."""


class FunctionNotFound(NvmlError):
    """This driver has no such function."""


class NotFound(NvmlError):
    """There is none with that index."""


class Package:
    """A GPU split by MIG, under a driver before 510, as far as readings go."""

    NVMLError_NotSupported = NotSupported
    NVMLError_FunctionNotFound = FunctionNotFound
    NVMLError_NoPermission = PermissionError
    NVMLError_NotFound = NotFound
    NVMLError_GpuIsLost = ConnectionError
    NVML_DEVICE_MIG_ENABLE = 1
    nvmlMemory_v2 = 2  # noqa: N815

    def __init__(self, *, mig: int, used: int | None) -> None:
        self._mig = mig
        self._used = used

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, _index: int) -> str:  # noqa: N802
        return "GPU-1"

    def nvmlDeviceGetMigMode(self, _handle: str) -> list[int]:  # noqa: N802
        return [self._mig, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, _handle: str) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, _handle: str, index: int) -> str:  # noqa: N802
        if index > 1:
            raise NotFound
        return f"MIG-{index}"

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:  # noqa: N802
        return handle.encode()

    def nvmlDeviceGetComputeRunningProcesses_v3(self, _handle: str) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=7, usedGpuMemory=self._used)]

    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, _handle: str) -> list[Any]:  # noqa: N802
        raise NotSupported

    def nvmlDeviceGetMPSComputeRunningProcesses_v3(self, _handle: str) -> list[Any]:  # noqa: N802
        raise FunctionNotFound

    def nvmlDeviceGetMemoryInfo(self, _handle: str, version: int = 1) -> Any:  # noqa: N802
        if version == 2:
            raise FunctionNotFound
        return SimpleNamespace(total=10, free=6, used=4)


def test_a_reading_that_is_not_available_is_not_zero() -> None:
    package = Package(mig=0, used=None)
    with pytest.raises(NvmlUnavailable, match="does not say how much GPU memory process 7 uses"):
        nvmls.used_by(package, frozenset({7}))
    assert nvmls.used_by(package, frozenset({8})) == {}


def test_where_mig_splits_a_gpu_its_instances_are_counted() -> None:
    assert nvmls.used_by(Package(mig=1, used=5), frozenset({7})) == {"MIG-0": 5, "MIG-1": 5}
    assert nvmls.used_by(Package(mig=0, used=5), frozenset({7})) == {"GPU-1": 5}


def test_a_driver_without_the_second_reading_of_memory_has_the_first() -> None:
    assert nvmls.memory(Package(mig=0, used=0), "GPU-1").free == 6


def test_kinds_of_context_that_a_gpu_does_not_have_are_no_failure() -> None:
    assert nvmls.mps_clients(Package(mig=0, used=0)) is False
