"""What the doctor says of GPUs: the real command on the stand-in's driver in many shapes."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from swapserve.config.load import load
from swapserve.system import checks_gpu
from swapserve.system.check import Scope
from swapserve.system.command import run_sync
from tests.support.gpu import MIB, StandIn, standin
from tests.support.nvml import library

GPU_LINES = ("gpu", "gpu devices", "MIG", "MPS", "persistence mode", "PCIe", "checkpoint API")
SIZE = 1024 * MIB
DOCTOR_TIMEOUT_S = 60.0


@pytest.fixture
def gpus(tmp_path: Path) -> Iterator[StandIn]:
    """A machine with two GPUs of 1 GiB."""
    with standin(tmp_path / "gpus", gpus=[SIZE, SIZE], persistence=True) as machine:
        yield machine


def config(directory: Path, gpus: StandIn, *, memory: str = "512MiB", model: str = "") -> Path:
    """Write a configuration with an engine on the first GPU."""
    path = directory / "swapserve.yaml"
    path.write_text(f"""
paths: {{state_dir: state, image_dir: images, run_dir: run}}
images: {{budget: 1MiB, min_free: 1MiB}}
keeper: {{profile: unprivileged}}
devices:
  g0: {{kind: gpu, uuid: {gpus.uuids[0]}, memory: {memory}}}
  ram: {{memory: 1GiB}}
models:
  - {{name: a, recipe: generic, params: {{binary: /bin/true}}, device: g0, {model}}}
""")
    return path


def run(
    env: Mapping[str, str], path: Path | None = None, *, options: tuple[str, ...] = ("--json",)
) -> tuple[int, str]:
    """Return exit status and output of the doctor, of which nothing is a traceback."""
    done = run_sync(
        [sys.executable, "-m", "swapserve", *(["--config", str(path)] if path else []), "doctor",
         *options],
        timeout_s=DOCTOR_TIMEOUT_S,
        cwd=path.parent if path else Path("/"),
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **env},
        check=False,
    )  # fmt: skip
    assert not done.stderr
    assert "Traceback" not in done.stdout
    assert "unknown: " not in done.stdout
    return done.status, done.stdout


def doctor(env: Mapping[str, str], path: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return its lines by name."""
    _, said = run(env, path)
    lines = {line["name"]: line for line in json.loads(said)["checks"]}
    for line in lines.values():
        assert line["status"] == "ok" or line["mend"], line
    return lines


def statuses(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: line["status"] for name, line in lines.items() if name in GPU_LINES}


# ---------------------------------------------------------------- good machines


def test_a_machine_as_it_should_be(gpus: StandIn, tmp_path: Path) -> None:
    lines = doctor(gpus.env, config(tmp_path, gpus, memory="256MiB"))
    assert statuses(lines) == dict.fromkeys(GPU_LINES, "ok")
    assert lines["gpu"]["found"].startswith("driver 580.95.05, CUDA 13.0: Stand-in GPU 1.0 GiB (")
    assert lines["checkpoint API"]["found"] == "driver 580.95.05, CUDA 13.0"
    assert lines["GPU remapping"]["status"] == "ok"
    assert "PCIe 5.0 x16" in lines["PCIe"]["found"]
    assert lines["host tier"]["found"] == "1.0 GiB for the state of GPUs with 0.2 GiB in all"
    assert "swap" in lines


def test_without_a_configuration_nothing_is_asked_for(gpus: StandIn) -> None:
    lines = doctor(gpus.env)
    assert "gpu devices" not in lines
    assert "host tier" not in lines
    assert set(statuses(lines).values()) == {"ok"}


def test_people_get_the_same_in_words(gpus: StandIn, tmp_path: Path) -> None:
    gpus.set_config(mps=((gpus.uuids[0], 7, MIB),))
    status, said = run(gpus.env, config(tmp_path, gpus), options=())
    assert status == 1
    assert "[FAIL] MPS: in use, and 'a' would have to be moved" in said
    assert "nvidia-cuda-mps-control" in said


# ---------------------------------------------------------------- machines without


def test_a_machine_without_gpus_has_two_lines_about_them(tmp_path: Path) -> None:
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (tmp_path / name).write_text("no library")  # also where a real one is installed
    lines = doctor({"LD_LIBRARY_PATH": str(tmp_path)})
    assert statuses(lines) == {"gpu": "off", "checkpoint API": "off"}
    assert "GPU remapping" not in lines


def test_gpus_that_are_asked_for_and_not_there_are_failures(gpus: StandIn, tmp_path: Path) -> None:
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (tmp_path / name).write_text("no library")
    env = {"LD_LIBRARY_PATH": str(tmp_path)}
    path = config(tmp_path, gpus)
    assert statuses(doctor(env, path)) == {"gpu": "fail", "checkpoint API": "fail"}
    assert run(env, path)[0] == 1


@pytest.mark.parametrize("code", [4, 9, 13, 18, 999])
def test_a_broken_driver_is_one_line(gpus: StandIn, code: int) -> None:
    gpus.set_config(nvml_init=code)
    line = doctor(gpus.env)["gpu"]
    assert line["status"] == "off"
    assert line["found"].count("\n") == 0


def test_a_machine_whose_driver_sees_no_gpu(tmp_path: Path) -> None:
    with standin(tmp_path / "gpus", gpus=[]) as machine:
        lines = doctor(machine.env)
    assert lines["gpu"]["found"] == "the driver sees no GPU"
    assert "MIG" not in lines


def test_a_driver_that_ends_whoever_starts_it_is_a_line(gpus: StandIn, tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").symlink_to(gpus.libs / "libnvidia-ml.so.1")
    source = "int cuDriverGetVersion(int *v) { return *v = 0; }\n"
    source += "int cuInit(unsigned f) { (void)f; __builtin_trap(); }\n"
    env = gpus.env | library(tmp_path, source, "libcuda.so.1")
    lines = doctor(env, config(tmp_path, gpus))
    assert lines["gpu"]["status"] == "ok"
    assert lines["checkpoint API"]["status"] == "fail"
    assert "SIGILL" in lines["checkpoint API"]["found"]


# ---------------------------------------------------------------- what stands in the way


def test_a_driver_without_checkpoint_calls(tmp_path: Path) -> None:
    with standin(tmp_path / "gpus", driver="550.54", cuda=12040, api=False) as machine:
        path = config(tmp_path, machine, memory="64MiB")
        lines = doctor(machine.env, path)
        assert lines["checkpoint API"]["status"] == "fail"
        assert "550.54" in lines["checkpoint API"]["found"]
        assert "GPU remapping" not in lines
        sleeping = path.read_text().replace("device: g0, ", "device: g0, mechanism: restart")
        path.write_text(sleeping)
        assert doctor(machine.env, path)["checkpoint API"]["status"] == "off"


def test_an_older_driver_with_cuda_checkpoint_is_slower(tmp_path: Path) -> None:
    with standin(tmp_path / "gpus", driver="565.57", cuda=12070, api=False) as machine:
        path = config(tmp_path, machine, memory="64MiB")
        text = path.read_text()
        path.write_text(
            text.replace("unprivileged}", f"unprivileged, cuda_checkpoint: {machine.program}}}")
        )
        lines = doctor(machine.env, path)
    assert lines["checkpoint API"]["status"] == "warn"
    assert str(machine.program) in lines["checkpoint API"]["found"]
    assert lines["GPU remapping"]["status"] == "off"


def test_a_driver_that_cannot_remap(tmp_path: Path) -> None:
    with standin(tmp_path / "gpus", driver="570.1", cuda=12080) as machine:
        lines = doctor(machine.env)
    assert lines["checkpoint API"]["status"] == "ok"
    assert lines["GPU remapping"]["status"] == "off"
    assert "580" in lines["GPU remapping"]["mend"]


@pytest.mark.parametrize(
    ("gpu", "model", "status"),
    [(0, "", "fail"), (0, "mechanism: restart", "off"), (1, "", "off"), (None, "", "ok")],
)
def test_mig_fails_where_an_engine_has_to_be_moved(
    gpus: StandIn, tmp_path: Path, gpu: int | None, model: str, status: str
) -> None:
    gpus.set_config(mig=() if gpu is None else (gpus.uuids[gpu],))
    line = doctor(gpus.env, config(tmp_path, gpus, model=model))["MIG"]
    assert line["status"] == status
    assert ("'a'" in line["found"]) == (status == "fail")


@pytest.mark.parametrize(("model", "status"), [("", "fail"), ("mechanism: restart", "off")])
def test_mps_fails_where_an_engine_has_to_be_moved(
    gpus: StandIn, tmp_path: Path, model: str, status: str
) -> None:
    gpus.set_config(mps=((gpus.uuids[1], 7, MIB),))
    assert doctor(gpus.env, config(tmp_path, gpus, model=model))["MPS"]["status"] == status


def test_persistence_mode_off_is_a_loss_for_who_swaps(gpus: StandIn, tmp_path: Path) -> None:
    gpus.set_config(persistence=False)
    line = doctor(gpus.env, config(tmp_path, gpus))["persistence mode"]
    assert line["status"] == "warn"
    assert "nvidia-smi -pm 1" in line["mend"]
    assert doctor(gpus.env)["persistence mode"]["status"] == "off"


def test_a_lost_gpu_fails_with_the_others_listed(gpus: StandIn, tmp_path: Path) -> None:
    gpus.set_config(lost=(gpus.uuids[1],))
    line = doctor(gpus.env, config(tmp_path, gpus))["gpu"]
    assert line["status"] == "fail"
    assert gpus.uuids[0] in line["found"]
    assert "GPU 1 does not answer: a GPU is lost" in line["found"]
    assert doctor(gpus.env)["gpu"]["status"] == "warn"


def test_a_configured_gpu_that_is_not_there_fails(gpus: StandIn, tmp_path: Path) -> None:
    path = config(tmp_path, gpus)
    path.write_text(path.read_text().replace(gpus.uuids[0], "GPU-9"))
    line = doctor(gpus.env, path)["gpu devices"]
    assert line["status"] == "fail"
    assert line["found"] == "not on this machine: g0 (GPU-9)"


@pytest.mark.parametrize(
    ("memory", "status", "words"),
    [
        ("2GiB", "fail", "g0 promises 2.0 GiB of 1.0 GiB"),
        ("768MiB", "warn", "less than keeper.gpu_margin (0.5 GiB) beside g0"),
        ("512MiB", "ok", "g0: 0.5 GiB"),
    ],
)
def test_a_budget_must_fit_the_gpu(
    gpus: StandIn, tmp_path: Path, memory: str, status: str, words: str
) -> None:
    line = doctor(gpus.env, config(tmp_path, gpus, memory=memory))["gpu devices"]
    assert line["status"] == status
    assert words in line["found"]


def test_ram_that_cannot_take_all_gpus_is_noticed(gpus: StandIn, tmp_path: Path) -> None:
    path = config(tmp_path, gpus)
    path.write_text(path.read_text().replace("ram: {memory: 1GiB}", "ram: {memory: 256MiB}"))
    line = doctor(gpus.env, path)["host tier"]
    assert line["status"] == "warn"
    assert "devices.ram.memory" in line["mend"]
    path.write_text(path.read_text().replace("device: g0, ", "device: g0, tiers: [disk]"))
    assert "host tier" not in doctor(gpus.env, path)


@pytest.mark.parametrize(
    ("total", "swappiness", "status", "words"),
    [(0, 60, "ok", "none"), (1 << 20, 60, "warn", "swappiness 60"), (1 << 20, 0, "ok", "1.0 GiB")],
)
def test_swap_that_takes_what_rests_in_ram_is_noticed(  # noqa: PLR0917
    gpus: StandIn, tmp_path: Path, total: int, swappiness: int, status: str, words: str
) -> None:
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nSwapTotal: {total} kB\n")
    (tmp_path / "proc/sys/vm/swappiness").write_text(f"{swappiness}\n")
    loaded = load(config(tmp_path, gpus))
    scope = Scope(profile="unprivileged", config=loaded, root=tmp_path)
    (line,) = (check for check in checks_gpu.host_tier(scope) if check.name == "swap")
    assert line.status == status
    assert words in line.found


def test_a_first_configuration_names_the_gpus_that_nvml_lists(
    gpus: StandIn, tmp_path: Path
) -> None:
    gpus.set_config(mig=(gpus.uuids[0],))
    path = tmp_path / "swapserve.yaml"
    done = run_sync(
        [sys.executable, "-m", "swapserve", "init", "-o", str(path)],
        timeout_s=DOCTOR_TIMEOUT_S,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **gpus.env},
    )
    assert not done.stderr
    devices = load(path, check_binaries=False).devices
    assert [one.uuid for one in devices.values()] == [None, gpus.uuids[1]]
    assert f"({gpus.uuids[0]}) is split by MIG" in path.read_text()


def test_a_driver_that_never_starts_is_given_up(
    gpus: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "#include <unistd.h>\nint cuDriverGetVersion(int *v) { return *v = 0; }\n"
    source += "int cuInit(unsigned f) { (void)f; for (;;) pause(); }\n"
    monkeypatch.setenv(*library(tmp_path, source, "libcuda.so.1").popitem())
    monkeypatch.setattr(checks_gpu, "PROBE_TIMEOUT_S", 2.0)
    loaded = load(config(tmp_path, gpus))
    (line,) = checks_gpu.checkpoint(Scope(profile="unprivileged", config=loaded))
    assert line.status == "fail"
    assert "no end after 2" in line.found
