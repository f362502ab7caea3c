"""Models that are containers, and models that others have started."""

from pathlib import Path

import pytest

from swapserve.config.load import load
from swapserve.config.recipes import launch_argv
from swapserve.states import Tier
from tests.unit.config.conftest import Fail, Load, Write

GPU = """
devices:
  gpu0: {kind: gpu, memory: 1GiB, uuid: GPU-11111111-1111-1111-1111-111111111111}
  ram: {memory: 4GiB}
"""
ATTACHED = (
    GPU
    + """
models:
  - {name: a, recipe: llamacpp, device: gpu0, attach: "port:8000"}
"""
)
CONTAINER = (
    GPU
    + """
models:
  - {name: a, recipe: llamacpp, model: TMP/tiny.gguf, device: gpu0, image: docker.io/org/engine:1,
     params: {binary: /app/engine}}
"""
)


def only(fail: Fail, text: str) -> str:
    (problem,) = fail(text)
    return str(problem)


@pytest.mark.parametrize("attach", ["pid:4711", "port:8000", "container:my_vllm-1.x"])
def test_an_attached_engine_needs_no_program_no_model_and_leaves_for_host_memory_alone(
    load_text: Load, attach: str
) -> None:
    model = load_text(ATTACHED.replace("port:8000", attach)).models["a"]  # type: ignore[index]
    assert model.launch == "attached"
    assert model.tiers == (Tier.HOST,)
    assert (model.sandbox, model.golden, model.executable) == (False, False, None)


def test_an_attached_engine_without_gpu_has_no_tier(load_text: Load) -> None:
    text = ATTACHED.replace("device: gpu0", "device: ram")
    assert load_text(text).models["a"].tiers == ()  # type: ignore[index]


@pytest.mark.parametrize(
    "attach",
    ["8000", "pid:0", "pid:-1", "port:x", "container:", "container:-f", "container:a b", "host:a"],
)
def test_an_attach_target_that_is_none_is_refused(fail: Fail, attach: str) -> None:
    assert "models[0].attach" in only(fail, ATTACHED.replace("port:8000", attach))


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ("args: [-x]", "args"),
        ("env: {A: b}", "env"),
        ("params: {binary: x}", "params"),
        ("model: x.gguf", "model"),
        ("image: x", "image"),
        ("sandbox: true", "sandbox"),
        ("golden: false", "golden"),
        ("stop_grace: 1s", "stop_grace"),
        ("mechanism: restart", "mechanism"),
        ("tiers: [disk]", "tiers"),
        ("tiers: [host, none]", "tiers"),
        ("port: 8001", "port"),
    ],
)
def test_what_would_not_be_done_to_an_attached_engine_is_refused(
    fail: Fail, extra: str, key: str
) -> None:
    text = ATTACHED.replace('"port:8000"', f'"port:8000", {extra}')
    problems = [str(problem) for problem in fail(text)]
    assert any(f"models[0].{key}: " in problem for problem in problems), problems


def test_a_port_beside_a_pid_says_where_it_listens(load_text: Load) -> None:
    text = ATTACHED.replace('"port:8000"', '"pid:12", port: 8001')
    assert load_text(text).models["a"].port == 8001  # type: ignore[index]


def test_the_front_door_is_no_engine(fail: Fail) -> None:
    assert "server.port" in only(fail, "server: {port: 8000}\n" + ATTACHED)


def test_a_port_that_cannot_be_is_refused(fail: Fail) -> None:
    assert "65535" in only(fail, ATTACHED.replace("8000", "65536"))


def test_two_models_cannot_be_the_same_engine(fail: Fail) -> None:
    again = '  - {name: b, recipe: llamacpp, device: gpu0, attach: "port:8000"}\n'
    assert "models[0].attach" in only(fail, ATTACHED + again)


def test_a_model_with_an_image_runs_what_is_in_the_image(load_text: Load, gguf: Path) -> None:
    model = load_text(CONTAINER).models["a"]  # type: ignore[index]
    assert model.launch == "container"
    assert model.container_image == "docker.io/org/engine:1"
    assert model.tiers == (Tier.HOST,)
    assert (model.sandbox, model.golden, model.executable) == (False, False, None)
    argv = launch_argv(model, host="0.0.0.0", port=1)
    assert argv[:3] == ("/app/engine", "-m", str(gguf))


def test_a_recipe_may_name_the_image_and_a_model_another(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nadapter: generic\nargv: [serve]\nimage: org/a\nneeds_model: false\n"
    )
    text = f"recipe_dirs: [{tmp_path}]\nmodels:\n  - {{name: a, recipe: mine}}\n"
    assert load_text(text).models["a"].container_image == "org/a"  # type: ignore[index]
    other = load_text(text.replace("recipe: mine", "recipe: mine, image: org/b"))
    assert other.models["a"].container_image == "org/b"  # type: ignore[index]


@pytest.mark.parametrize("image", ["--privileged", "", "a b"])
def test_an_image_that_could_be_an_option_is_refused(fail: Fail, gguf: Path, image: str) -> None:
    text = CONTAINER.replace("docker.io/org/engine:1", f"{image!r}")
    assert "models[0].image" in only(fail, text)


@pytest.mark.parametrize("extra", ["sandbox: false", "golden: true", "tiers: [disk]"])
def test_what_is_not_possible_with_a_container_is_refused(
    fail: Fail, gguf: Path, extra: str
) -> None:
    found = only(fail, CONTAINER.replace("device: gpu0", f"device: gpu0, {extra}"))
    assert f"models[0].{extra.partition(':')[0]}" in found


def test_the_disk_tier_of_a_container_in_ram_is_refused(fail: Fail, gguf: Path) -> None:
    found = only(fail, CONTAINER.replace("device: gpu0", "device: ram, tiers: [disk]"))
    assert "CRIU" in found


@pytest.mark.parametrize("word", ["--name=x", "--name", "--rm", "-d", "--restart=always"])
def test_options_by_which_containers_are_known_again_are_ours(
    fail: Fail, tmp_path: Path, word: str
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nadapter: generic\nargv: [serve]\nimage: a\nneeds_model: false\n"
        f"container_args: [{word!r}]\n"
    )
    text = f"recipe_dirs: [{tmp_path}]\nmodels:\n  - {{name: a, recipe: mine}}\n"
    assert "container_args" in only(fail, text)


def test_a_path_that_no_mount_can_name_is_refused(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "a,b.gguf").write_bytes(b"GGUF")
    found = only(fail, CONTAINER.replace("TMP/tiny.gguf", '"TMP/a,b.gguf"'))
    assert "a,b.gguf" in found


def test_an_image_for_apptainer_is_a_file(fail: Fail, load_text: Load, gguf: Path) -> None:
    text = "keeper: {container_runtime: apptainer}\n" + CONTAINER
    assert "nothing is pulled" in only(fail, text)
    assert "not there" in only(fail, text.replace("docker.io/org/engine:1", "TMP/none.sif"))
    assert load_text(text.replace("docker.io/org/engine:1", "TMP")).models


def test_a_program_without_its_kind_is_refused(fail: Fail, write: Write, program: Path) -> None:
    text = f"keeper: {{container_program: {program}}}\n" + ATTACHED
    assert "container_runtime" in only(fail, text)
    text = text.replace("{container_program", "{container_runtime: podman, container_program")
    assert load(write(text)).keeper.container_program == program
    assert "not there" in only(fail, text.replace(str(program), f"{program}x"))
