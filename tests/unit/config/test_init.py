import re
from pathlib import Path

import pytest

from swapserve.config.init import Gpu, Machine, look, starter
from swapserve.config.load import default_paths, load
from swapserve.config.schema import Config


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


def test_a_gpu_is_named_but_no_engine_is_put_on_it(tmp_path: Path) -> None:
    make_program(tmp_path / "path" / "llama-server")
    gpus = [Gpu(uuid="GPU-1", name="H200", memory_bytes=140 << 30)]
    machine = look(
        gpus=gpus, venvs=[make_venv(tmp_path / "v")], models=[make_models(tmp_path / "m")]
    )
    assert "H200 (GPU-1)" in starter(machine)
    config = load_starter(tmp_path, machine)
    assert {model.device for model in config.models.values()} == {"host"}


def test_every_default_in_it_can_be_switched_on_as_it_stands(tmp_path: Path) -> None:
    text = starter(Machine(memory_bytes=8 << 30, paths=default_paths("auto")))
    path = tmp_path / "swapserve.yaml"
    path.write_text(re.sub(r"(?m)^#(\S|  \S)", r"\1", text))
    config = load(path)
    path.write_text(text)
    assert config == load(path)
    assert "\nserver:\n  host: 127.0.0.1 " in re.sub(r"(?m)^#(\S|  \S)", r"\1", text)
