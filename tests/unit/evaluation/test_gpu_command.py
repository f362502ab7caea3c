import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from evaluation.__main__ import cli
from evaluation.gpu import engines, weights
from evaluation.gpu.calls import Room
from evaluation.gpu.engines import ENGINES, Means, write_recipes
from evaluation.gpu.product import Product
from evaluation.gpu.sheet import Impossible
from evaluation.gpu.trial import Times
from swapserve.config.load import load
from swapserve.config.recipe_files import load_recipe
from swapserve.ids import EngineName
from swapserve.testing.weights import layout

GIB = 1 << 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "facts,weather"], "'weather' is none of facts, bandwidth"),
        (["--engines", "ollama"], "'ollama' is none of torch, transformers"),
        (["--sizes", "8GB,many"], "'many' is no size"),
        (["--ram", "much"], "'much' is no size"),
        (["--minutes", "0"], "not in the range"),
        (["--shape", "huge"], "'huge' is not one of"),
        (["--python", "/nowhere/python"], "does not exist"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["gpu", *arguments])
    assert done.exit_code == 2
    assert said in done.output


def test_a_result_needs_a_directory() -> None:
    done = CliRunner().invoke(cli, ["gpu", "--json", "/nowhere/at/all/out.json"])
    assert done.exit_code == 1
    assert "no directory to write out.json in" in done.output


def test_what_does_not_fit_is_told_by_the_memory_that_is_short() -> None:
    room = Room(uuid="GPU-x", vram=80 * GIB, ram=64 * GIB, margin=GIB)
    assert room.why_not(40 * GIB) is None
    assert "RAM" in str(room.why_not(30 * GIB, processes=2))
    assert "GPU memory" in str(room.why_not(100 * GIB))


def test_shapes_are_those_of_the_real_models() -> None:
    parameters = {name: weights.size_of(name) / weights.BYTES_PER_WEIGHT for name in weights.SHAPES}
    assert parameters["8b"] == pytest.approx(8.03e9, rel=0.01)
    # 3.21e9, and the output layer that the real one shares with its embeddings.
    assert parameters["3b"] == pytest.approx(3.21e9 + 128_256 * 3072, rel=0.01)


def test_the_header_gives_every_tensor_its_place_without_gaps() -> None:
    tensors = list(layout(*weights.SHAPES["tiny"]))
    head = weights.header(tensors)
    length = int.from_bytes(head[:8], "little")
    assert len(head) == 8 + length
    entries = json.loads(head[8:])
    entries.pop("__metadata__")
    end = 0
    for (name, dimensions), (found, entry) in zip(tensors, entries.items(), strict=True):
        assert name == found
        assert entry["data_offsets"] == [end, end + 2 * math.prod(dimensions)]
        end = entry["data_offsets"][1]
    assert end == weights.size_of("tiny")


def _means(directory: Path, packages: dict[str, str | None]) -> Means:
    return Means(
        directory=directory,
        python=Path("/opt/python"),
        packages=packages,
        shape="tiny",
        gpu_bytes=80 * GIB,
        env={"LD_LIBRARY_PATH": "/drivers"},
        vram_mb=64,
    )


@pytest.mark.parametrize(
    ("name", "packages", "said"),
    [
        ("torch", {}, "has no torch, transformers"),
        ("transformers", {"torch": "2", "transformers": "5"}, "no accelerate, fastapi, uvicorn"),
        ("vllm", {"torch": "2", "vllm": None}, "has no vllm"),
    ],
)
def test_an_engine_that_is_not_at_hand_says_what_is_missing(
    tmp_path: Path, name: str, packages: dict[str, str | None], said: str
) -> None:
    with pytest.raises(Impossible, match=said):
        ENGINES[name].prepare(_means(tmp_path, packages))


def test_llama_server_without_cuda_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "llama-server"
    binary.write_text("#!/bin/sh\necho 'Available devices:'\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(Impossible, match="built without CUDA"):
        ENGINES["llamacpp"].prepare(_means(tmp_path, {}))


def test_a_model_that_is_there_is_used_and_the_engine_finds_the_driver(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    entry, size = ENGINES["torch"].prepare(_means(tmp_path, {"torch": "2", "transformers": "5"}))
    assert entry["model"] == str(tmp_path / "models" / "tiny")
    assert entry["env"] == {"LD_LIBRARY_PATH": "/drivers"}
    assert weights.size_of("tiny") < size < 2 * GIB


@pytest.mark.parametrize("profile", ["root", "unprivileged"])
@pytest.mark.parametrize("name", list(ENGINES))
def test_the_configuration_of_every_engine_is_valid(
    tmp_path: Path, name: str, profile: str
) -> None:
    model = tmp_path / "model"
    if name == "llamacpp":
        model.write_text("GGUF")
    else:
        model.mkdir()
    entry: dict[str, Any] = {
        "recipe": {"torch": "gpu-server", "transformers": "transformers-serve"}.get(name, name),
        "params": {"binary" if name == "llamacpp" else "python": sys.executable},
        "model": str(model),
        "device": "gpu0",
        "memory": 4 * GIB,
    }
    if name == "cuda":
        entry = {**entry, "recipe": "cuda-engine", "args": ["--vram-mb", "64"]}
        del entry["model"]
    room = Room(uuid="GPU-5747a11d", vram=80 * GIB, ram=64 * GIB, margin=GIB)
    product = Product(_means(tmp_path, {}), room, times=Times(), quantum="3s", gpu_paths=[tmp_path])
    names, models = product._models(ENGINES[name], entry, sandbox=profile == "root")
    config = load(product._write(tmp_path, models, 6 * GIB, profile))
    assert {"a", "b", "cold"} <= set(names)
    for what, model_name in names.items():
        found = config.models[EngineName(model_name)]
        assert found.gpus == ("GPU-5747a11d",)
        expected = {"a": "checkpoint", "b": "checkpoint", "disk": "checkpoint", "cold": "restart"}
        assert found.mechanism == expected.get(what, what)
    assert (name == "vllm") == ("deep_sleep" in names)


def test_every_recipe_of_its_own_is_valid(tmp_path: Path) -> None:
    names = {
        load_recipe(path).name for path in sorted(write_recipes(tmp_path / "r").glob("*.yaml"))
    }
    assert names == {"gpu-server", "transformers-serve", "cuda-engine"}


def test_engines_look_in_this_checkout_and_where_the_caller_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"/wheels:{engines.ROOT}:")
    assert engines.python_path() == (str(engines.ROOT), "/wheels")


def test_a_pythons_packages_are_found_without_importing_them() -> None:
    found = engines.packages_of(Path(sys.executable))
    assert found["vllm"] is None
    assert set(found) == set(engines.PACKAGES)


def test_a_python_that_does_not_run_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such thing >&2; exit 1\n")
    broken.chmod(0o755)
    with pytest.raises(Impossible, match="no such thing"):
        engines.packages_of(broken)
