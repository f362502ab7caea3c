"""A configuration for one engine of another one says the same of that engine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from swapserve.config.load import load
from swapserve.config.probes import launch_hash
from swapserve.config.schema import Config
from swapserve.config.scratch import scratch_config
from swapserve.states import Tier

Write = Callable[[str], Path]

TEXT = """
server: {host: 0.0.0.0, api_keys: ['${env:NO_KEY}']}
keeper: {subnet: 10.7.0.0/16, gpu_margin: 1MiB, gpu_paths: [.], cuda_rate: 3GiB}
devices:
  g0: {kind: gpu, uuid: GPU-0, memory: 8GiB}
  g1: {kind: gpu, uuid: GPU-1, memory: 8GiB}
  ram: {memory: 64GiB}
recipe_dirs: [recipes]
models:
  - name: org/a:b
    aliases: [c]
    recipe: mine
    model: tiny.gguf
    params: {binary: ./engine, mode: "1"}
    args: ["{mode}", --x, 1]
    env: {A: 2, B: "{binary}/x"}
    device: [g0, g1]
    memory: 4GiB
    mechanism: restart
    ttl: 10m
    pin: true
    sandbox: false
    start_timeout: 90s
    stop_grace: 500ms
  - {name: other, recipe: mine, model: tiny.gguf, params: {binary: ./engine}, device: ram}
"""
RECIPE = (
    "name: mine\nadapter: generic\nparams: {binary: '', mode: '0'}\nargv: ['{binary}', '{model}']\n"
)


@pytest.fixture
def config(tmp_path: Path, write: Write, program: Path, gguf: Path) -> Config:
    assert program.parent == gguf.parent == tmp_path
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    return load(write(TEXT), check_binaries=False, secrets=False)


def test_the_engine_is_the_same_but_for_what_is_tried(config: Config, tmp_path: Path) -> None:
    model = next(iter(config.models.values()))
    (tmp_path / "alone").mkdir()
    copy = load(scratch_config(config, model, tmp_path / "alone"), check_binaries=False)
    (found,) = copy.models.values()
    expected = replace(
        model,
        aliases=(),
        params={**model.params, "binary": str(tmp_path / "engine")},
        mechanism="checkpoint",
        tiers=(Tier.HOST,),
        ttl_s=None,
        pin=False,
    )
    assert found == expected
    assert (copy.keeper, copy.devices) == (config.keeper, config.devices)
    assert copy.paths.state_dir == tmp_path / "alone" / "state"


def test_the_mechanism_that_is_configured_does_not_matter_to_a_probe(config: Config) -> None:
    model = next(iter(config.models.values()))
    assert launch_hash(model) == launch_hash(replace(model, mechanism="auto", pin=False))
    assert launch_hash(model) != launch_hash(replace(model, args=()))
    assert launch_hash(model) != launch_hash(replace(model, env={}))
