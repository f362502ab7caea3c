from collections.abc import Callable
from pathlib import Path

import pytest

from swapserve.config.load import load
from swapserve.config.recipes import launch_argv, launch_env
from swapserve.config.schema import Config
from swapserve.errors import ConfigProblem

Write = Callable[[str], Path]
Load = Callable[[str], Config]
Fail = Callable[[str], list[ConfigProblem]]

GENERIC = "recipe: generic, params: {binary: TMP/engine}"


def generic(*models: str, **sections: str) -> str:
    lines = [f"{name}: {text}" for name, text in sections.items()]
    return "\n".join([*lines, "models:", *(f"  - {{{GENERIC}, {model}}}" for model in models)])


@pytest.mark.usefixtures("program")
def test_names_and_aliases_are_used_once(fail: Fail) -> None:
    problems = fail(generic("name: a, aliases: [b]", "name: b", "name: c, aliases: [d, a, d]"))
    assert [(p.line, p.key) for p in problems] == [
        (3, "models[1].name"),
        (4, "models[2].aliases[1]"),
        (4, "models[2].aliases[2]"),
    ]
    assert "models[0].aliases[0] (line 2)" in problems[0].found


def test_names_are_compared_even_if_a_model_is_wrong_otherwise(fail: Fail) -> None:
    problems = fail("models:\n  - {name: a, recipe: no-x}\n  - {name: a, recipe: no-y}\n")
    assert [(p.line, p.key) for p in problems] == [
        (2, "models[0].recipe"),
        (3, "models[1].recipe"),
        (3, "models[1].name"),
    ]


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("name", ["''", "-a", "'a b'", "a*", "'../x'"])
def test_a_name_that_could_mislead_is_refused(fail: Fail, name: str) -> None:
    (problem,) = fail(generic(f"name: {name}"))
    assert problem.key == "models[0].name"


@pytest.mark.usefixtures("program")
def test_a_model_larger_than_its_device_is_refused(fail: Fail) -> None:
    problems = fail(
        generic(
            "name: a, memory: 9GiB",
            "name: b, memory: 5GiB, pin: true",
            "name: c, memory: 4GiB, pin: true",
            devices="{ram: {memory: 8GiB}}",
        )
    )
    assert [(p.line, p.key) for p in problems] == [(3, "models[0].memory"), (5, "models[2].pin")]


@pytest.mark.usefixtures("program")
def test_engines_on_the_hosts_network_have_ports_of_their_own(fail: Fail) -> None:
    problems = fail(
        generic(
            "name: a, port: 8080, sandbox: false",
            "name: b, port: 9000, sandbox: false",
            "name: c, port: 9000, sandbox: false",
            server="{port: 8080}",
        )
    )
    assert [p.key for p in problems] == ["models[0].port", "models[2].port"]
    assert "server.port" in problems[0].found
    assert "models[1].port" in problems[1].found


@pytest.mark.usefixtures("program")
def test_sandboxed_engines_may_share_a_port_where_there_are_sandboxes(
    fail: Fail, load_text: Load
) -> None:
    models = ("name: a, port: 8080", "name: b, port: 8080")
    assert len(load_text(generic(*models, keeper="{profile: root}")).models) == 2
    assert len(fail(generic(*models, keeper="{profile: unprivileged}"))) == 2


@pytest.mark.usefixtures("program")
def test_the_subnet_has_room_for_every_model(fail: Fail) -> None:
    text = generic("name: a", "name: b", keeper="{subnet: 10.9.9.0/30}")
    (problem,) = fail(text)
    assert problem.key == "keeper.subnet"
    assert "2 models" in problem.found


@pytest.mark.usefixtures("program")
def test_a_model_names_its_device_when_there_are_two(fail: Fail, load_text: Load) -> None:
    devices = "{x: {memory: 1GiB}, y: {memory: 1GiB}}"
    (problem,) = fail(generic("name: a", devices=devices))
    assert (problem.line, problem.key, problem.expected) == (3, "models[0].device", "one of x, y")
    config = load_text(generic("name: a, device: y", devices=devices))
    assert [model.device for model in config.models.values()] == ["y"]


def test_a_program_that_is_missing_is_named_where_it_was_given(fail: Fail, gguf: Path) -> None:
    gguf.chmod(0o644)
    problems = fail(
        """\
models:
  - name: a
    recipe: generic
    params:
      binary: no-such-engine-x
  - name: b
    recipe: generic
    params: {binary: TMP/tiny.gguf}
  - name: c
    recipe: vllm
    model: TMP
"""
    )
    assert [(p.line, p.key) for p in problems] == [
        (4, "models[0].params.binary"),
        (8, "models[1].params.binary"),
        (9, "models[2].params.python"),
    ]
    assert "no-such-engine-x" in problems[0].found
    assert "PATH" in problems[0].expected
    assert "executable file" in problems[1].expected
    assert "'vllm' needs one" in problems[2].expected


def test_a_program_is_found_in_the_private_prefix(
    load_text: Load, tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gguf.exists()
    binary = tmp_path / "prefix" / "bin" / "llama-server"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = load_text("models: [{name: a, recipe: llamacpp, model: tiny.gguf}]")
    (model,) = config.models.values()
    assert model.executable == binary
    assert launch_argv(model, host="127.0.0.1", port=1)[0] == str(binary)


@pytest.mark.usefixtures("program")
def test_a_link_to_a_program_is_kept(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(tmp_path / "engine")
    config = load_text("models: [{name: a, recipe: generic, params: {binary: ./python}}]")
    (model,) = config.models.values()
    assert model.executable == tmp_path / "python"


@pytest.mark.usefixtures("program")
def test_a_model_must_be_there_and_be_what_the_recipe_takes(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    problems = fail(
        """\
paths: {state_dir: TMP/state}
models:
  - {name: a, recipe: llamacpp, params: {binary: TMP/engine}, model: /no/such.gguf}
  - {name: b, recipe: llamacpp, params: {binary: TMP/engine}, model: folder}
  - {name: c, recipe: vllm, params: {python: TMP/engine}, model: file}
  - {name: d, recipe: vllm, params: {python: TMP/engine}, model: org/name}
  - {name: e, recipe: vllm, params: {python: TMP/engine}}
"""
    )
    assert [(p.line, p.key) for p in problems] == [(n + 3, f"models[{n}].model") for n in range(5)]
    assert problems[0].expected == "an existing file"
    assert problems[1].expected == "a file"
    assert problems[2].expected == "a directory"
    assert "state/models/org--name" in problems[3].found
    assert "swapserve pull org/name" in problems[3].expected
    assert "needs a model" in problems[4].expected


@pytest.mark.usefixtures("program")
def test_a_hub_id_is_where_pull_puts_it_unless_there_is_such_a_path(
    load_text: Load, tmp_path: Path
) -> None:
    pulled = tmp_path / "state" / "models" / "org--name"
    pulled.mkdir(parents=True)
    (pulled / "q4.gguf").touch()
    text = """
paths: {state_dir: TMP/state}
models:
  - {name: a, recipe: vllm, params: {python: TMP/engine}, model: org/name}
  - {name: b, recipe: llamacpp, params: {binary: TMP/engine}, model: org/name/q4.gguf}
"""
    a, b = load_text(text).models.values()
    assert a.model == str(pulled)
    assert b.model == str(pulled / "q4.gguf")
    (tmp_path / "org" / "name").mkdir(parents=True)
    a, b = load(tmp_path / "swapserve.yaml").models.values()
    assert a.model == str(tmp_path / "org" / "name")
    assert b.model == str(pulled / "q4.gguf")


def test_without_checks_nothing_must_be_there(write: Write, tmp_path: Path) -> None:
    path = write(
        """
server: {user: no-such-user-x}
keeper: {criu: /no/criu}
models: [{name: a, recipe: llamacpp, params: {binary: ./none}, model: none.gguf}]
"""
    )
    (model,) = load(path, check_binaries=False).models.values()
    assert model.model == str(tmp_path / "none.gguf")
    assert launch_argv(model, host="h", port=1)[0] == str(tmp_path / "none")


@pytest.mark.usefixtures("program")
def test_the_command_line_is_the_recipes_then_the_models(load_text: Load) -> None:
    config = load_text(
        """
models:
  - name: a
    recipe: generic
    params: {binary: TMP/engine}
    args: [--port, "{port}", '--json={"host": "{host}"}', "{unknown}", "{{name}}", "x{name}y"]
    env: {WHO: "{name} at {host}"}
"""
    )
    (model,) = config.models.values()
    argv = launch_argv(model, host="0.0.0.0", port=7)
    assert argv[1:] == ("--port", "7", '--json={"host": "0.0.0.0"}', "{unknown}", "{{name}}", "xay")
    assert launch_env(model, host="0.0.0.0", port=7) == {"WHO": "a at 0.0.0.0"}


@pytest.mark.usefixtures("program")
def test_a_placeholder_for_a_model_that_is_not_given_is_a_problem(fail: Fail) -> None:
    (problem,) = fail(generic("name: a, args: [-m, '{model}']"))
    assert problem.key == "models[0].args[1]"


@pytest.mark.usefixtures("program")
def test_models_may_share_settings_by_an_anchor(load_text: Load) -> None:
    config = load_text(
        """
models:
  - &base {name: a, recipe: generic, params: {binary: TMP/engine}, ttl: 5m}
  - {<<: *base, name: b}
"""
    )
    assert [(model.name, model.ttl_s) for model in config.models.values()] == [
        ("a", 300),
        ("b", 300),
    ]
