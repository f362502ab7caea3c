from collections.abc import Callable
from pathlib import Path

import pytest

from swapserve.config.load import default_paths, load
from swapserve.config.machine import total_memory
from swapserve.config.schema import Config
from swapserve.errors import ConfigError, ConfigProblem
from swapserve.states import Tier

Write = Callable[[str], Path]
Load = Callable[[str], Config]
Fail = Callable[[str], list[ConfigProblem]]


def places(problems: list[ConfigProblem]) -> list[tuple[int | None, str]]:
    return [(problem.line, problem.key) for problem in problems]


def test_an_empty_file_gives_the_defaults(load_text: Load) -> None:
    config = load_text("")
    assert config.server.host == "127.0.0.1"
    assert config.paths == default_paths("auto")
    assert not config.models
    (device,) = config.devices.values()
    assert (device.name, device.kind) == ("host", "host")
    assert device.memory_bytes == int(total_memory() * 0.8) >> 20 << 20


def test_every_kind_of_value_is_read(
    load_text: Load, tmp_path: Path, program: Path, gguf: Path
) -> None:
    config = load_text(
        """
server: {port: 9000, max_body: 1MiB, queue_timeout: 5m, on_exit: leave}
paths: {state_dir: state, run_dir: /run/x}
keeper: {huge_pages: true}
images: {canary_rate: 1, budget: 1.5GiB}
scheduling: {policy: lru-drain, quantum: 2, overhead_share: 0.5, slo_itl: 50ms}
devices: {ram: {memory: 4GiB}}
log: {format: json, level: debug}
models:
  - name: org/a:latest
    aliases: [a, b]
    recipe: llamacpp
    model: tiny.gguf
    params: {binary: ./engine}
    args: [-np, 1, --flag, true]
    env: {THREADS: 2, RATIO: 0.50}
    memory: 2GiB
    tiers: [disk, none]
    ttl: 90s
    slots: 4
    queue_limit: 7
    min_resident: 5s
    deadline: 1m
    slo_ttft: 3s
    pin: true
    sandbox: false
"""
    )
    assert config.server.port == 9000
    assert config.server.max_body_bytes == 1 << 20
    assert config.server.queue_timeout_s == 300.0
    assert config.server.on_exit == "leave"
    assert config.paths.state_dir == tmp_path / "state"
    assert config.paths.image_dir == default_paths("auto").image_dir
    assert config.keeper.huge_pages is True
    assert config.images.canary_rate == 1.0
    assert config.images.budget_bytes == 3 << 29
    assert config.scheduling.policy == "lru-drain"
    assert config.scheduling.quantum_s == 2.0
    assert config.scheduling.overhead_share == 0.5
    assert config.scheduling.slo_itl_s == 0.05
    assert (config.log_format, config.log_level) == ("json", "debug")
    (model,) = config.models.values()
    assert model.name == "org/a:latest"
    assert model.aliases == ("a", "b")
    assert model.model == str(gguf)
    assert model.executable == program
    assert model.args == ("-np", "1", "--flag", "true")
    assert model.env == {"THREADS": "2", "RATIO": "0.50"}
    assert model.memory_bytes == 2 << 30
    assert model.tiers == (Tier.DISK, Tier.NONE)
    assert all(isinstance(tier, Tier) for tier in model.tiers)
    assert model.ttl_s == 90.0
    assert (model.slots, model.queue_limit, model.min_resident_s) == (4, 7, 5.0)
    assert (model.deadline_s, model.slo_ttft_s, model.slo_itl_s) == (60.0, 3.0, None)
    assert model.device == "ram"


def test_several_errors_come_together_in_the_order_of_their_lines(fail: Fail) -> None:
    problems = fail(
        """\
server:
  prot: 1
  port: high
  queue_timeout: 5 minutes
keeper:
  huge_pages: yes
scheduling: [1]
devices:
  ram:
    memory: lots
models:
  - name: -bad
    recipe: vlm
    ttl: 10m
    ttl: 5m
  - recipe: generic
    params: {binary: no-such-engine}
    device: gpu
modles: []
"""
    )
    assert places(problems) == [
        (2, "server.prot"),
        (3, "server.port"),
        (4, "server.queue_timeout"),
        (6, "keeper.huge_pages"),
        (7, "scheduling"),
        (10, "devices.ram.memory"),
        (12, "models[0].name"),
        (13, "models[0].recipe"),
        (15, "models[0].ttl"),
        (16, "models[1].name"),
        (18, "models[1].device"),
        (19, "modles"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("server: {prot: 1}", "did you mean 'port'"),
        ("modles: []", "did you mean 'models'"),
        ("models: [{name: a, recipe: vlm}]", "did you mean 'vllm'"),
        ("server: {on_exit: stap}", "did you mean 'stop'"),
        ("models: [{name: a, recipe: llamacpp, params: {bynary: x}}]", "did you mean 'binary'"),
        ("devices: {ram: {memory: 1GiB}}\nmodels: [{name: a, recipe: vllm, device: rem}]", "'ram'"),
    ],
)
def test_near_misses_are_named(fail: Fail, text: str, words: str) -> None:
    assert any(words in problem.expected for problem in fail(text))


@pytest.mark.parametrize(
    ("text", "key", "found", "expected"),
    [
        ("server: 3", "server", "the number 3", "a mapping"),
        ("server: {host: 3}", "server.host", "the number 3", "quotes"),
        ("server: {host: [a]}", "server.host", "a list", "a text"),
        ("server: {port: 8080.5}", "server.port", "the number 8080.5", "a whole number"),
        ("server: {port: true}", "server.port", "the boolean true", "a whole number"),
        ("server: {port: 70000}", "server.port", "the number 70000", "from 0 to 65535"),
        ("server: {port: }", "server.port", "nothing", "a whole number"),
        ("server: {queue_limit: 0}", "server.queue_limit", "the number 0", "at least 1"),
        ("server: {queue_timeout: -5}", "server.queue_timeout", "the number -5", "30s"),
        ("server: {max_body: 1.5}", "server.max_body", "the number 1.5", "8GiB"),
        ("keeper: {huge_pages: yes}", "keeper.huge_pages", "the text 'yes'", "true or false"),
        ("images: {canary_rate: 1.5}", "images.canary_rate", "the number 1.5", "from 0 to 1"),
        ("scheduling: {busy: drain}", "scheduling.busy", "an earlier version", "lru-drain"),
        ("scheduling: {policy: lru-drian}", "scheduling.policy", "lru-drian", "'lru-drain'"),
        ("scheduling: {policy: Adaptive}", "scheduling.policy", "'Adaptive'", "matches"),
        ("scheduling: {overhead_share: 0.95}", "scheduling.overhead_share", "0.95", "0 to 0.9"),
        ("scheduling: {quantum: 0}", "scheduling.quantum", "the number 0", "at least 0.1"),
        ("scheduling: {slo_itl: -1}", "scheduling.slo_itl", "the number -1", "at least"),
        ("server: {queue_limit_total: 0}", "server.queue_limit_total", "0", "at least 1"),
        ("recipe_dirs: here", "recipe_dirs", "the text 'here'", "a list of paths"),
        ("models: {a: 1}", "models", "a mapping", "a list of models"),
        ("models: [a]", "models[0]", "the text 'a'", "a mapping"),
        ("devices: {ram: 8GiB}", "devices.ram", "the text '8GiB'", "a mapping"),
        ("devices: {'a b': {memory: 1}}", "devices.a b", "'a b'", "matches"),
        ("devices: {g: {kind: gpu, uuid: GPU-1}}", "devices.g.memory", "nothing", "for a GPU"),
        ("devices: {g: {kind: gpu, memory: 1GiB}}", "devices.g.uuid", "nothing", "for a GPU"),
        ("keeper: {subnet: 8.8.0.0/16}", "keeper.subnet", "8.8.0.0/16", "private"),
        ("keeper: {subnet: 10.0.0.1/16}", "keeper.subnet", "10.0.0.1/16", "private"),
        ("keeper: {subnet: 10.0.0.0/31}", "keeper.subnet", "10.0.0.0/31", "private"),
        ("keeper: {criu: /no/criu}", "keeper.criu", "/no/criu", "executable"),
        ("server: {user: no-such-user-x}", "server.user", "no-such-user-x", "account"),
        ("recipe_dirs: [TMP/none]", "recipe_dirs", "none", "existing directory"),
    ],
)
def test_a_wrong_value_says_what_was_found_and_expected(
    fail: Fail, text: str, key: str, found: str, expected: str
) -> None:
    (problem,) = fail(text)
    assert problem.key == key
    assert found in problem.found
    assert expected in problem.expected
    assert problem.line == 1


def test_an_error_reads_as_one_line_with_the_place_first(fail: Fail, tmp_path: Path) -> None:
    (problem,) = fail("\nserver:\n  port: x\n")
    where = f"{tmp_path}/swapserve.yaml:3: server.port: "
    assert str(problem) == f"{where}found the text 'x'; expected a whole number from 0 to 65535"


def test_an_empty_section_and_null_are_the_default(load_text: Load) -> None:
    config = load_text("server:\nmodels:\ndevices:\npaths: {state_dir: ~}\nkeeper: {criu: ~}\n")
    assert config.server.port == 8080
    assert config.paths == default_paths("auto")
    assert config.keeper.criu is None


def test_an_open_door_is_refused(fail: Fail, load_text: Load) -> None:
    for host in ("0.0.0.0", "'::'", "example.org", "192.168.1.2"):
        (problem,) = fail(f"server:\n  port: 1\n  host: {host}\n")
        assert (problem.line, problem.key) == (3, "server.host")
        assert "api_keys" in problem.expected
    for host in ("127.0.0.2", "'::1'", "localhost"):
        assert load_text(f"server: {{host: {host}}}").server.host
    assert load_text("server: {host: 0.0.0.0, api_keys: [k]}").server.api_keys


def test_secrets_come_from_environment_and_files(
    load_text: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "from-env")
    (tmp_path / "key").write_text("from-file\n")
    config = load_text("server: {api_keys: ['${env:MY_KEY}', {file: key}, plain]}")
    secrets = [key.secret for key in config.server.api_keys]
    assert secrets == ["from-env", "from-file", "plain"]


def test_secrets_that_are_not_there_are_problems_that_show_no_secret(
    fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    (tmp_path / "two").write_text("hush\nhush\n")
    for entry, words in [
        ("'${env:NO_KEY}'", "NO_KEY"),
        ("'${NO_KEY}'", "${env:NAME}"),
        ("{file: none}", "readable"),
        ("{file: two}", "one line"),
        ("''", "a key"),
        ("3", "a key"),
        ("{fil: x}", "{file: path}"),
    ]:
        (problem,) = fail(f"server: {{api_keys: [{entry}]}}")
        assert problem.key == "server.api_keys[0]"
        assert words in problem.expected
        assert "hush" not in str(problem)


def test_the_keeper_can_read_a_file_whose_secrets_it_cannot_see(write: Write) -> None:
    path = write("server: {host: 0.0.0.0, api_keys: ['${env:NO_KEY}', {file: none}]}")
    assert len(load(path, secrets=False).server.api_keys) == 2


def test_nothing_but_secrets_is_taken_from_the_environment(
    load_text: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PATH", "/elsewhere")
    config = load_text("paths: {state_dir: '/x/${env:MY_PATH}'}")
    assert str(config.paths.state_dir) == "/x/${env:MY_PATH}"


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("device: [g, ram]", "models[0].device", "one device, or several GPUs"),
        ("device: ram\n    tiers: [host]", "models[0].tiers", "only GPU state"),
    ],
)
def test_a_way_out_that_does_not_exist_is_refused(
    fail: Fail, text: str, at: str, expected: str
) -> None:
    (problem,) = fail(
        "devices: {ram: {memory: 1GiB}, g: {kind: gpu, uuid: GPU-1, memory: 1GiB}}\n"
        f"models:\n  - name: a\n    recipe: generic\n    params: {{binary: /bin/sh}}\n    {text}\n"
    )
    assert problem.key == at
    assert expected in problem.expected


def test_a_place_too_deep_for_a_socket_is_refused(fail: Fail) -> None:
    (problem,) = fail(f"paths: {{run_dir: /{'x' * 100}}}")
    assert problem.key == "paths.run_dir"
    assert "101 bytes" in problem.found
    assert "at most 95" in problem.expected
