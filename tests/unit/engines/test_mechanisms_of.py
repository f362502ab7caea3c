"""What an engine can do to give GPU memory back follows from how it is launched."""

import pytest

from swapserve.engines.launch import Launch
from swapserve.engines.registry import adapter_for
from swapserve.errors import QuiesceFailed
from tests.support.engines import model

ALL = {"checkpoint", "lean", "sleep", "deep_sleep", "restart"}
BY_DRIVER = {"checkpoint", "restart"}
MANAGED = {"GGML_CUDA_ENABLE_UNIFIED_MEMORY": "0"}


@pytest.mark.parametrize(
    ("recipe", "able"),
    [
        ("vllm", ALL),
        ("sglang", ALL - {"deep_sleep"}),
        ("ollama", {"checkpoint", "deep_sleep", "restart"}),
        ("llamacpp", BY_DRIVER),
        ("generic", BY_DRIVER),
    ],
)
def test_a_shipped_recipe_can_do_all_that_it_lists(recipe: str, able: set[str]) -> None:
    this = model(recipe)
    assert adapter_for(this).mechanisms == able == set(this.recipe.mechanisms)


@pytest.mark.parametrize(
    ("recipe", "args", "env", "able"),
    [
        ("vllm", ["--no-enable-sleep-mode"], {}, BY_DRIVER),
        ("vllm", ["--no_enable_sleep_mode"], {}, BY_DRIVER),
        ("vllm", ["--no-enable-sleep-mode", "--enable-sleep-mode"], {}, ALL),
        ("vllm", [], {"VLLM_SERVER_DEV_MODE": "0"}, BY_DRIVER),
        ("vllm", ["--sleep-mode-backend", "cuda"], {}, ALL - {"lean"}),
        ("vllm", ["--sleep-mode-backend=cumem"], {}, ALL),
        ("vllm", ["--load-format", "dummy"], {}, ALL - {"deep_sleep"}),
        ("vllm", ["--load-format=sharded_state"], {}, ALL - {"deep_sleep"}),
        ("vllm", ["--load_format", "safetensors"], {}, ALL),
        ("vllm", ["--load-format=dummy", "--load-format=auto"], {}, ALL),
        ("vllm", ["--speculative-config", '{"model": "d"}'], {}, ALL - {"deep_sleep"}),
        ("vllm", ["-sc", '{"model": "d"}'], {}, ALL - {"deep_sleep"}),
        ("vllm", ["--spec-model=d"], {}, ALL - {"deep_sleep"}),
        ("sglang", ["--speculative-algorithm", "EAGLE"], {}, {"checkpoint", "lean", "restart"}),
        (
            "sglang",
            ["--speculative-algorithm", "EAGLE", "--enable-draft-weights-cpu-backup"],
            {},
            ALL - {"deep_sleep"},
        ),
        ("llamacpp", [], MANAGED, {"restart"}),
        ("ollama", [], MANAGED, {"deep_sleep", "restart"}),
        ("generic", [], MANAGED, {"restart"}),
    ],
)
def test_arguments_and_variables_switch_some_of_it_off(
    recipe: str, args: list[str], env: dict[str, str], able: set[str]
) -> None:
    assert adapter_for(model(recipe, args=args, env=env)).mechanisms == able


def test_on_a_cpu_the_settings_for_gpus_are_not_there() -> None:
    assert adapter_for(model("vllm", gpus=())).mechanisms == BY_DRIVER
    assert adapter_for(model("sglang", gpus=())).mechanisms == BY_DRIVER


@pytest.mark.anyio
@pytest.mark.parametrize("recipe", ["llamacpp", "generic"])
async def test_an_engine_without_calls_of_its_own_is_always_awake(recipe: str) -> None:
    adapter = adapter_for(model(recipe))
    assert await adapter.resting("127.0.0.1:1") is False
    await adapter.wake("127.0.0.1:1")
    with pytest.raises(QuiesceFailed) as failed:
        await adapter.rest("127.0.0.1:1", "sleep")
    assert failed.value.unsupported
    assert failed.value.left_awake is True


@pytest.mark.anyio
async def test_a_rest_that_is_switched_off_is_not_asked_for() -> None:
    adapter = adapter_for(model("vllm", args=["--no-enable-sleep-mode"]))
    with pytest.raises(QuiesceFailed) as failed:  # nobody listens there
        await adapter.rest("127.0.0.1:1", "sleep")
    assert failed.value.unsupported
    assert failed.value.left_awake is True


def test_the_last_of_a_flag_s_values_counts() -> None:
    launch = Launch(model("vllm", args=["--a-b=1", "--a_b", "2", "--c"]))
    assert launch.value("--a-b") == "2"
    assert launch.value("--c") is None
    assert launch.value("--d") is None
    assert launch.has("--c")
    assert not launch.has("--d")
