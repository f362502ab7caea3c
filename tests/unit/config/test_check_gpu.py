"""What is refused of GPUs when the configuration is read, and that what remains is not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from swapserve.config import check_gpu
from swapserve.config.check_gpu import ranks
from swapserve.config.load import load
from swapserve.config.probes import (
    Probe,
    add_probe,
    driver_version,
    launch_hash,
    probes_path,
    read_probes,
)
from swapserve.config.schema import Config, ModelConfig
from swapserve.errors import ConfigError, ConfigProblem
from swapserve.states import Tier

Load = Callable[[str], Config]
Fail = Callable[[str], list[ConfigProblem]]

DRIVER = "580.95.05"
RECIPES = {
    "plain": "adapter: generic\nneeds_model: false\nargv: [/bin/sh, --port, '{port}']",
    "vllm": (
        "adapter: vllm\nneeds_model: false\nargv: [/bin/sh]\n"
        "mechanisms: [checkpoint, lean, sleep, deep_sleep, restart]"
    ),
    "sglang": "adapter: sglang\nneeds_model: false\nargv: [/bin/sh]",
    "sleeper": (
        "adapter: generic\nneeds_model: false\nargv: [/bin/sh]\nmechanisms: [sleep, restart]"
    ),
    "mps": (
        "adapter: generic\nneeds_model: false\nargv: [/bin/sh]\n"
        "gpu_env: {CUDA_MPS_PIPE_DIRECTORY: /run/mps}"
    ),
}


@pytest.fixture(autouse=True)
def _recipes(tmp_path: Path) -> None:
    for name, text in RECIPES.items():
        path = tmp_path / "recipes" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"name: {name}\n{text}\n")


@pytest.fixture(autouse=True)
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel module's version file."""
    path = tmp_path / "version"
    path.write_text(f"{DRIVER}\n")
    monkeypatch.setattr(check_gpu, "driver_version", lambda: path.read_text().strip())
    return path


def with_model(text: str, *, recipe: str = "plain") -> str:
    return (
        "recipe_dirs: [recipes]\npaths: {state_dir: TMP/state}\n"
        "devices: {g0: {kind: gpu, uuid: GPU-0, memory: 8GiB}, g1: {kind: gpu, uuid: GPU-1, memory:"
        " 8GiB}, m: {kind: gpu, uuid: MIG-2, memory: 4GiB}, ram: {memory: 12GiB}}\n"
        f"models:\n  - {{name: a, recipe: {recipe}, {text}}}\n"
    )


def the_model(config: Config) -> ModelConfig:
    (model,) = config.models.values()
    return model


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("uuid", ["'0'", "gpu0", "GPU-", "GPU_0f", "GPU-XYZ", "GPU-0F"])
def test_a_gpu_is_named_as_nvidia_smi_names_it(fail: Fail, uuid: str) -> None:
    (problem,) = fail(f"devices:\n  g:\n    kind: gpu\n    memory: 1GiB\n    uuid: {uuid}\n")
    assert (problem.line, problem.key) == (5, "devices.g.uuid")
    assert "nvidia-smi -L" in problem.expected


def test_a_uuid_on_a_host_device_is_a_forgotten_kind(fail: Fail) -> None:
    (problem,) = fail("devices: {g: {memory: 1GiB, uuid: GPU-0}}")
    assert problem.key == "devices.g.uuid"
    assert "`kind: gpu`" in problem.expected


def test_two_devices_are_two_gpus(fail: Fail) -> None:
    (problem,) = fail(
        "devices:\n"
        "  a: {kind: gpu, memory: 1GiB, uuid: GPU-0}\n"
        "  b: {kind: gpu, memory: 1GiB, uuid: GPU-0}\n"
    )
    assert (problem.line, problem.key) == (3, "devices.b.uuid")
    assert "device 'a'" in problem.found


def test_what_the_keeper_is_told_to_use_is_there(fail: Fail) -> None:
    problems = fail("keeper: {cuda_checkpoint: TMP/no-tool, gpu_paths: [TMP, TMP/no-path]}")
    assert [problem.key for problem in problems] == [
        "keeper.cuda_checkpoint",
        "keeper.gpu_paths[1]",
    ]


# ---------------------------------------------------------------- one model


@pytest.mark.parametrize(
    ("text", "recipe", "key", "found", "expected"),
    [
        ("device: [g0, ram]", "plain", "device", "g0, ram", "several GPUs"),
        ("device: [g0, g0], mechanism: restart", "plain", "device", "g0, g0", "each GPU once"),
        ("device: ram, mechanism: sleep", "vllm", "mechanism", "kind host", "auto"),
        ("device: g0, mechanism: lean", "plain", "mechanism", "lean, which", "auto, checkpoint"),
        (
            "device: m, attach: 'pid:7', tiers: [host]",
            "plain",
            "device",
            "instance of MIG",
            "or an engine that SwapServe starts",
        ),
        (
            "device: g0, image: org/engine, tiers: [disk]",
            "plain",
            "tiers",
            "disk, for a container",
            "what ran in a sandbox",
        ),
        ("device: g0, mechanism: sleep", "plain", "mechanism", "sleep, which", "recipe 'plain'"),
        ("device: m", "plain", "device", "instance of MIG", "nvidia-smi -mig 0"),
        ("device: m", "vllm", "device", "auto on m", "mechanism: sleep"),
        (
            "device: g0, env: {CUDA_VISIBLE_DEVICES: 0}",
            "plain",
            "env.CUDA_VISIBLE_DEVICES",
            "'0'",
            "`device`",
        ),
        (
            "device: g0, env: {GGML_CUDA_ENABLE_UNIFIED_MEMORY: 0}",
            "plain",
            "env.GGML_CUDA_ENABLE_UNIFIED_MEMORY",
            "managed memory",
            "not to be set, or `mechanism: restart`",
        ),
        (
            "device: g0, env: {CUDA_MPS_PIPE_DIRECTORY: /tmp/mps}",
            "vllm",
            "env.CUDA_MPS_PIPE_DIRECTORY",
            "a client of MPS",
            "`mechanism: sleep`",
        ),
        ("device: g0", "mps", "recipe", "a client of MPS", "not to be set"),
        ("device: g0, args: [--cpu-offload-gb, 4]", "vllm", "args", "UVA", "DISABLE_UVA: 1"),
        ("device: g0, args: [--cpu_offload_gb=0.5]", "vllm", "args", "gb 0.5", "mechanism: sleep"),
        ("device: g0, args: [-tp, 2]", "vllm", "args", "for 2 GPUs on 1 GPU", "-size 1"),
        (
            "device: [g0, g1], mechanism: sleep",
            "vllm",
            "args",
            "for 1 GPU on 2 GPUs",
            "--tensor-parallel-size 2",
        ),
        (
            "device: g0, tiers: [host, disk], sandbox: false",
            "plain",
            "tiers",
            "`sandbox: false`",
            "CRIU",
        ),
        ("device: [g0, g1], args: [-tp, 2], memory: 7GiB, mechanism: sleep", "vllm", "tiers",
         "15032385536 bytes", "mechanism: restart"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(  # noqa: PLR0917
    fail: Fail, text: str, recipe: str, key: str, found: str, expected: str
) -> None:
    (problem,) = fail(with_model(text, recipe=recipe))
    assert (problem.line, problem.key) == (5, f"models[0].{key}")
    assert found in problem.found
    assert expected in problem.expected


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("device: g0", "plain"),
        ("device: g0, mechanism: lean", "vllm"),
        ("device: g0, mechanism: restart", "sleeper"),
        ("device: m, mechanism: restart", "plain"),
        ("device: m", "sleeper"),
        ("device: [g0, g1], mechanism: restart", "plain"),
        ("device: [g0, g1], args: [--tensor-parallel-size=2], mechanism: sleep", "vllm"),
        ("device: [g0, g1]", "sleeper"),
        ("device: g0, mechanism: sleep, env: {CUDA_MPS_PIPE_DIRECTORY: /tmp/mps}", "sleeper"),
        ("device: g0, mechanism: sleep, args: [--cpu-offload-gb, 4]", "vllm"),
        ("device: g0, args: [--cpu-offload-gb, 0]", "vllm"),
        ("device: g0, args: [--cpu-offload-gb, 4, --offload-backend, prefetch]", "vllm"),
        (
            "device: g0, args: [--cpu-offload-gb, 4], env: {VLLM_WEIGHT_OFFLOADING_DISABLE_UVA: 1}",
            "vllm",
        ),
        ("device: g0, tiers: [host, none], sandbox: false", "plain"),
        ("device: ram, env: {CUDA_VISIBLE_DEVICES: ''}", "plain"),
        ("device: ram, tiers: [disk], sandbox: false", "plain"),
        ("device: [g0, g1], attach: 'pid:7', tiers: [host], mechanism: sleep", "vllm"),
        ("device: g0, attach: 'pid:7', tiers: [host]", "mps"),
    ],
)
def test_what_can_work_is_not_refused(load_text: Load, text: str, recipe: str) -> None:
    assert the_model(load_text(with_model(text, recipe=recipe))).name == "a"


def test_without_a_sandbox_a_gpu_engine_rests_in_ram_alone(load_text: Load) -> None:
    assert the_model(load_text(with_model("device: g0"))).tiers == (Tier.HOST, Tier.DISK)
    outside = the_model(load_text(with_model("device: g0, sandbox: false")))
    assert outside.tiers == (Tier.HOST,)


def test_a_host_tier_without_any_host_device_gets_one(load_text: Load) -> None:
    text = with_model("device: g0").replace(", ram: {memory: 12GiB}", "")
    config = load_text(text)
    assert the_model(config).ram == "host"
    assert config.devices[the_model(config).ram].kind == "host"  # type: ignore[index]


@pytest.mark.parametrize(
    ("recipe", "args", "expected"),
    [
        ("vllm", "", 1),
        ("plain", "", None),
        ("plain", "-tp, 2", 2),
        ("vllm", "--tensor-parallel-size, 2, --pipeline-parallel-size=3", 6),
        ("vllm", "--tensor_parallel_size, 2, -dp, 2", 4),
        ("vllm", "-tp, 2, -tp, 1", 1),
        ("vllm", "-tp, 2, -pcp, 2", 4),
        ("vllm", "-tp", 1),
        ("sglang", "--tp, 2, --dp, 2", 4),
        ("sglang", "--tp, 2, --dp, 2, --enable-dp-attention", 2),
    ],
)
def test_the_command_line_says_over_how_many_gpus(
    load_text: Load, recipe: str, args: str, expected: int | None
) -> None:
    config = load_text(with_model(f"device: ram, args: [{args}]", recipe=recipe))
    assert ranks(the_model(config)) == expected


# ---------------------------------------------------------------- several GPUs

SPREAD = "device: [g0, g1], args: [-tp, 2]"


@pytest.mark.parametrize("mechanism", ["auto", "checkpoint", "lean"])
def test_several_gpus_need_a_probe_for_the_driver(
    fail: Fail, tmp_path: Path, mechanism: str
) -> None:
    (problem,) = fail(with_model(f"{SPREAD}, mechanism: {mechanism}", recipe="vllm"))
    assert problem.key == "models[0].mechanism"
    assert f"{mechanism} on 2 GPUs: {tmp_path}/state/keeper/probes has no" in problem.found
    assert "`mechanism: sleep`" in problem.expected
    assert "swapserve probe a" in problem.expected
    assert "NCCL" in problem.expected


def test_who_cannot_know_of_probes_can_still_read_the_configuration(
    tmp_path: Path, write: Callable[[str], Path]
) -> None:
    path = write(with_model(SPREAD, recipe="vllm"))
    assert load(path, check_binaries=False).models


@pytest.fixture
def spread(write: Callable[[str], Path]) -> ModelConfig:
    """An engine on two GPUs, as the prober reads it."""
    return the_model(load(write(with_model(SPREAD, recipe="vllm")), check_binaries=False))


def probe(model: ModelConfig, *, works: bool = True, driver: str = DRIVER, gpus: int = 2) -> Probe:
    return Probe(
        driver=driver,
        recipe=model.recipe.name,
        gpus=gpus,
        argv=launch_hash(model),
        works=works,
        found="its second rank never came back",
    )


def test_a_probe_that_worked_allows_it(
    load_text: Load, tmp_path: Path, spread: ModelConfig
) -> None:
    path = probes_path(tmp_path / "state")
    add_probe(path, probe(spread, works=False))
    add_probe(path, probe(spread))
    assert len(read_probes(path)) == 1
    assert the_model(load_text(with_model(SPREAD, recipe="vllm"))).mechanism == "auto"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"works": False}, "does not work: its second rank never came back"),
        ({"driver": "570.1"}, f"probed with driver 570.1, and this one is {DRIVER}"),
        ({"gpus": 4}, "has no probe of it with this command line"),
    ],
)
def test_a_probe_of_something_else_does_not_count(
    fail: Fail, tmp_path: Path, spread: ModelConfig, changed: dict[str, object], words: str
) -> None:
    add_probe(probes_path(tmp_path / "state"), probe(spread, **changed))  # type: ignore[arg-type]
    (problem,) = fail(with_model(SPREAD, recipe="vllm"))
    assert words in problem.found


def test_another_command_line_must_be_probed_anew(
    fail: Fail, tmp_path: Path, spread: ModelConfig
) -> None:
    add_probe(probes_path(tmp_path / "state"), probe(spread))
    (problem,) = fail(with_model(f"{SPREAD}, env: {{NCCL_NVLS_ENABLE: 1}}", recipe="vllm"))
    assert "has no probe of it" in problem.found


@pytest.mark.parametrize(
    "text", ["nonsense", "[]", '{"version": 9}', '{"version": 1, "probes": 3}']
)
def test_an_unreadable_file_of_probes_allows_nothing(fail: Fail, tmp_path: Path, text: str) -> None:
    path = probes_path(tmp_path / "state")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (problem,) = fail(with_model(SPREAD, recipe="vllm"))
    assert "keeper/probes cannot be read" in problem.found


def test_a_file_of_probes_is_replaced_whole_and_is_ours_alone(
    tmp_path: Path, spread: ModelConfig
) -> None:
    path = probes_path(tmp_path / "state")
    add_probe(path, probe(spread))
    add_probe(path, probe(spread, driver="590.1"))
    assert [one.driver for one in read_probes(path)] == [DRIVER, "590.1"]
    assert [file.name for file in path.parent.iterdir()] == ["probes"]
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert json.loads(path.read_text())["version"] == 1


def test_several_refusals_of_one_model_come_together(fail: Fail) -> None:
    problems = fail(
        with_model("device: m, env: {CUDA_MPS_PIPE_DIRECTORY: x}, tiers: [disk], sandbox: false")
    )
    assert [problem.key for problem in problems] == [
        "models[0].device",
        "models[0].env.CUDA_MPS_PIPE_DIRECTORY",
        "models[0].tiers",
    ]


def test_a_refusal_is_a_configuration_error(write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"swapserve\.yaml:5: models\[0\]\.device: found"):
        load(write(with_model("device: m")))


def test_the_drivers_version_is_that_of_the_kernel_module(tmp_path: Path, driver: Path) -> None:
    assert driver_version(driver) == DRIVER
    assert driver_version(tmp_path / "no-module") is None


def test_without_a_kernel_module_a_probe_of_any_driver_counts(
    load_text: Load, tmp_path: Path, spread: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_gpu, "driver_version", lambda: None)
    add_probe(probes_path(tmp_path / "state"), probe(spread, driver="570.1"))
    assert the_model(load_text(with_model(SPREAD, recipe="vllm"))).gpus == ("GPU-0", "GPU-1")
