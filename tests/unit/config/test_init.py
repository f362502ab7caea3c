import re
from pathlib import Path

import pytest

from swapserve.config.init import Gpu, Machine, look, starter
from swapserve.config.load import default_paths, load
from swapserve.config.schema import Config
from swapserve.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "path"))


def make_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def make_venv(path: Path) -> Path:
    make_program(path / "bin" / "python")
    package = path / "lib" / "python3.11" / "site-packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    return path


def make_models(top: Path) -> Path:
    folder = top / "org--Big Model"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    (folder / "model.safetensors").touch()
    for name in ("tiny.gguf", "split-00001-of-00002.gguf", "split-00002-of-00002.gguf"):
        (top / name).touch()
    (top / "other").mkdir()
    (top / "other" / "tiny.gguf").touch()
    return top


def load_starter(tmp_path: Path, machine: Machine) -> Config:
    path = tmp_path / "swapserve.yaml"
    path.write_text(starter(machine))
    return load(path)


def test_what_is_found_is_served(tmp_path: Path) -> None:
    server = make_program(tmp_path / "path" / "llama-server")
    venv = make_venv(tmp_path / "venv")
    models = make_models(tmp_path / "models")
    config = load_starter(tmp_path, look(venvs=[venv], models=[models]))
    assert {name: model.recipe.name for name, model in config.models.items()} == {
        "split-00001-of-00002": "llamacpp",
        "tiny": "llamacpp",
        "tiny-2": "llamacpp",
        "big-model": "vllm",
    }
    assert config.models["tiny"].executable == server  # type: ignore[index]
    assert config.models["big-model"].params == {  # type: ignore[index]
        "python": str(venv / "bin" / "python")
    }


def test_environments_that_setup_made_are_found(tmp_path: Path) -> None:
    venv = make_venv(tmp_path / "cache" / "engines" / "vllm-cpu-1")
    assert look().vllm_pythons == (venv / "bin" / "python",)


def test_a_machine_without_models_gets_examples_behind_marks(tmp_path: Path) -> None:
    machine = look()
    assert not load_starter(tmp_path, machine).models
    text = starter(machine)
    assert "\n#   - name:" in text
    assert "swapserve pull" in text


def test_a_model_without_its_engine_stays_an_example(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    machine = look(models=[models])
    assert machine.gguf_files
    assert not load_starter(tmp_path, machine).models
    assert str(machine.gguf_files[0]) in starter(machine)


# ---------------------------------------------------------------- GPUs

GIB = 1 << 30


def card(number: int = 0, *, memory: int = 140 * GIB, mig: bool = False) -> Gpu:
    return Gpu(uuid=f"GPU-{number}", name="H200", memory_bytes=memory, mig=mig)


@pytest.fixture
def cuda_server(tmp_path: Path) -> Path:
    """A llama-server with ggml's CUDA backend beside it."""
    server = make_program(tmp_path / "path" / "llama-server")
    (server.parent / "libggml-cuda.so").touch()
    return server


def cuda_venv(path: Path) -> Path:
    venv = make_venv(path)
    torch = venv / "lib" / "python3.11" / "site-packages" / "torch" / "lib"
    torch.mkdir(parents=True)
    (torch / "libtorch_cuda.so").touch()
    return venv


def grow(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)  # no block of it is written


@pytest.mark.usefixtures("cuda_server")
def test_models_are_placed_on_the_gpus_that_are_found(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    for name, size in [
        ("tiny.gguf", 30),
        ("other/tiny.gguf", 10),
        ("org--Big Model/model.safetensors", 60),
    ]:
        grow(models / name, size * GIB)
    venvs = [make_venv(tmp_path / "cpu"), cuda_venv(tmp_path / "gpu")]
    machine = look(gpus=[card(0), card(1)], venvs=venvs, models=[models])
    config = load_starter(tmp_path, machine)
    assert {str(name): device.kind for name, device in config.devices.items()} == {
        "host": "host",
        "gpu0": "gpu",
        "gpu1": "gpu",
    }
    assert [model.gpus for model in config.models.values()] == [
        ("GPU-0",),
        ("GPU-0",),
        ("GPU-1",),
        ("GPU-1",),
    ]
    big = config.models["big-model"]  # type: ignore[index]
    assert big.params == {"python": str(tmp_path / "gpu" / "bin" / "python")}
    assert big.ram == "host"
    assert "mechanism: auto #" in starter(machine)


@pytest.mark.parametrize(
    ("total", "rest"), [(140 * GIB, 140 * GIB * 3 // 100), (8 * GIB, 768 << 20)]
)
def test_a_gpus_budget_leaves_room_for_the_driver_and_the_margin(
    tmp_path: Path, total: int, rest: int
) -> None:
    config = load_starter(tmp_path, look(gpus=[card(memory=total)]))
    budget = config.devices["gpu0"].memory_bytes  # type: ignore[index]
    assert 0 <= total - rest - budget < 1 << 20
    assert total - budget >= config.keeper.gpu_margin_bytes
    assert f"H200 of {total >> 30} GiB" in starter(look(gpus=[card(memory=total)]))


def test_a_gpu_that_mig_splits_is_left_out_with_the_reason(tmp_path: Path) -> None:
    machine = look(gpus=[card(0, mig=True), card(1)])
    config = load_starter(tmp_path, machine)
    assert config.devices["gpu0"].uuid == "GPU-1"  # type: ignore[index]
    assert "# H200 (GPU-0) is split by MIG" in starter(machine)
    alone = look(gpus=[card(0, mig=True)])
    assert list(load_starter(tmp_path, alone).devices) == ["host"]


def test_an_engine_that_is_not_built_for_gpus_stays_on_the_host(tmp_path: Path) -> None:
    make_program(tmp_path / "path" / "llama-server")
    models = [make_models(tmp_path / "m")]
    machine = look(gpus=[card()], venvs=[make_venv(tmp_path / "v")], models=models)
    config = load_starter(tmp_path, machine)
    assert {model.device for model in config.models.values()} == {"host"}
    assert "its program is not built for NVIDIA's GPUs" in starter(machine)


@pytest.mark.parametrize(
    ("content", "device"),
    [("... libcuda.so.1 ...", "gpu0"), ("... libcurl.so.1 ...", "host"), ("", "host")],
)
def test_a_llama_server_that_needs_the_driver_itself_is_for_gpus(
    tmp_path: Path, content: str, device: str
) -> None:
    make_program(tmp_path / "path" / "llama-server").write_text(content)
    machine = look(gpus=[card()], models=[make_models(tmp_path / "m")])
    config = load_starter(tmp_path, machine)
    assert {model.device for model in config.models.values()} == {device}


@pytest.mark.usefixtures("cuda_server")
def test_a_model_too_large_for_one_gpu_is_left_to_the_user(tmp_path: Path) -> None:
    models = make_models(tmp_path / "m")
    grow(models / "org--Big Model/model.safetensors", 300 * GIB)
    grow(models / "split-00002-of-00002.gguf", 200 * GIB)
    machine = look(gpus=[card(0), card(1)], venvs=[cuda_venv(tmp_path / "v")], models=[models])
    assert list(load_starter(tmp_path, machine).models) == ["tiny", "tiny-2"]
    text = starter(machine)
    assert "# Too large for one GPU; on 4 equal ones:" in text
    assert "# Too large for one GPU; on 2 equal ones:" in text
    uncommented = re.sub(r"(?m)^# (  )", r"\1", text)
    (tmp_path / "swapserve.yaml").write_text(uncommented.replace("gpu2, gpu3", "gpu0, gpu1"))
    with pytest.raises(ConfigError) as raised:
        load(tmp_path / "swapserve.yaml")
    assert all(problem.key.endswith(("device", "args")) for problem in raised.value.problems)


@pytest.mark.usefixtures("cuda_server")
def test_nothing_but_large_models_is_still_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "huge.gguf").touch()
    grow(tmp_path / "m" / "huge.gguf", 300 * GIB)
    machine = look(gpus=[card()], models=[tmp_path / "m"])
    assert not load_starter(tmp_path, machine).models


def test_every_default_in_it_can_be_switched_on_as_it_stands(tmp_path: Path) -> None:
    text = starter(Machine(memory_bytes=8 << 30, paths=default_paths("auto")))
    path = tmp_path / "swapserve.yaml"
    path.write_text(re.sub(r"(?m)^#(\S|  \S)", r"\1", text))
    config = load(path)
    path.write_text(text)
    assert config == load(path)
    assert "\nserver:\n  host: 127.0.0.1 " in re.sub(r"(?m)^#(\S|  \S)", r"\1", text)
