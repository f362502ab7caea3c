"""Shipped recipes are whole: they load, keep admin endpoints shut, and raise timers."""

import re
from pathlib import Path

import pytest

from swapserve.config.recipe_files import load_recipe, recipe_paths

ENGINES = Path(__file__).parents[2] / "engines"
PATHS = sorted(ENGINES.glob("*.yaml"))
ADMIN = re.compile(r"sleep|wake|rpc|lora|adapter|reset|cache|slots|props|metrics|pause|profile")


def test_there_is_one_for_each_engine_that_is_promised() -> None:
    assert {path.stem for path in PATHS} >= {"vllm", "sglang", "ollama", "llamacpp", "generic"}
    assert recipe_paths().keys() == {path.stem for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_loads_and_is_described(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.description
    assert f"[`{recipe.name}`]({path.name})" in (ENGINES / "README.md").read_text()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_only_the_api_can_be_reached_through_the_front_door(path: Path) -> None:
    for endpoint in load_recipe(path).endpoints:
        assert endpoint.startswith("/v1/")
        assert ADMIN.search(endpoint) is None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_timers_that_kill_outlast_the_longest_suspension(path: Path) -> None:
    recipe = load_recipe(path)
    fatal = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"}
    raised = fatal | {"LLAMA_ARG_TIMEOUT"}
    if recipe.adapter == "vllm":
        assert fatal <= recipe.env.keys()
    for name in raised & recipe.env.keys():
        assert float(recipe.env[name]) > recipe.max_suspend_s


def test_vllm_has_no_reason_to_look_outside() -> None:
    env = load_recipe(ENGINES / "vllm.yaml").env
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")
    assert all(env[name] == "1" for name in offline)


def test_sglang_s_watchdog_outlasts_the_longest_suspension() -> None:
    recipe = load_recipe(ENGINES / "sglang.yaml")
    watchdog = recipe.argv[recipe.argv.index("--watchdog-timeout") + 1]
    assert float(watchdog) > recipe.max_suspend_s


def test_ollama_never_unloads_by_itself() -> None:
    assert load_recipe(ENGINES / "ollama.yaml").env["OLLAMA_KEEP_ALIVE"] == "-1"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_each_setting_for_gpus_has_its_reason_above_it(path: Path) -> None:
    recipe = load_recipe(path)
    lines = [line.strip() for line in path.read_text().splitlines()]
    entries = [f"- {word}" for word in recipe.gpu_args]
    entries += [f"{name}:" for name in recipe.gpu_env]
    for entry in entries:
        at = next(number for number, line in enumerate(lines) if line.startswith(entry))
        # Settings that belong together share a comment.
        above = [line for line in lines[:at] if not line.startswith(tuple(entries))]
        assert above[-1].startswith("#"), entry


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_was_not_proven_on_a_gpu_says_so(path: Path) -> None:
    recipe = load_recipe(path)
    text = path.read_text()
    if recipe.gpu_args or recipe.gpu_env:
        untried = "have not been tried on a GPU" in text or "Never run" in text
        assert untried or any("GPU" in version for version in recipe.tested)
    if not recipe.tested and recipe.adapter != "generic":
        assert "Never run" in text
