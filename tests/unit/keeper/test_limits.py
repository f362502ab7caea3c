"""How long daemon and keeper wait for what moves GPU state: longer than it may take."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from swapserve.config.load import load
from swapserve.config.schema import Config
from swapserve.ids import EngineName
from swapserve.keeper.client import KeeperClient
from swapserve.keeper.context import Context

pytestmark = pytest.mark.anyio

CONFIG = """
paths: {state_dir: TMP/state, run_dir: TMP/run, image_dir: TMP/images}
keeper: {dump_timeout: 50s, restore_timeout: 100s, cuda_rate: 1GiB, cuda_lock_timeout: 10s}
devices:
  g0: {kind: gpu, uuid: GPU-0, memory: 80GiB}
  g1: {kind: gpu, uuid: GPU-1, memory: 80GiB}
  ram: {memory: 1GiB}
models:
  - {name: small, recipe: generic, device: ram, params: {binary: /bin/sh}, args: [-c, "true"]}
  - {name: gpu, recipe: generic, device: g0, params: {binary: /bin/sh}, args: [-c, "true"]}
"""
GPU_S = 80 / 1 + 10
"""One engine's GPU at the slowest rate, and its lock."""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.replace("TMP", str(tmp_path)))
    return load(path)


class Asked(Exception):
    """All that there is to know is known."""


class Timed(KeeperClient):
    """A client that notes how long it would wait."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, lambda _: None)
        self.limits: dict[str, float] = {}

    async def _call(self, verb: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        self.limits[verb + (" settled" if fields.get("settled") else "")] = timeout_s
        raise Asked


async def limits(config: Config, engine: str) -> dict[str, float]:
    client, name = Timed(config), EngineName(engine)
    asks: list[Callable[[], Awaitable[object]]] = [
        lambda: client.holding(name),
        lambda: client.holding(name, settled=True),
        lambda: client.suspend(name),
        lambda: client.resume(name),
        lambda: client.dump(name, "golden"),
        lambda: client.restore(name, "golden"),
        lambda: client.discard(name),
        lambda: client.stop(name, 5.0),
    ]
    for ask in asks:
        with pytest.raises(Asked):
            await ask()
    return client.limits


async def test_a_verb_is_waited_for_as_long_as_two_engines_may_take(config: Config) -> None:
    without, gpu = await limits(config, "small"), await limits(config, "gpu")
    more = {verb: gpu[verb] - without[verb] for verb in gpu}
    assert more == {
        "holding": 0.0,
        "holding settled": 4 * GPU_S,  # as for an image of a running engine: there and back
        "suspend": 2 * GPU_S,
        "resume": 2 * GPU_S,
        "dump": 4 * GPU_S,
        "restore": 2 * GPU_S,
        "discard": 2 * GPU_S,
        "stop": 2 * GPU_S,
    }


async def test_whoever_waits_for_the_verb_under_way_waits_for_the_longest(config: Config) -> None:
    """Else a daemon that starts while GPU state is recovered would give up, and end."""
    said = await limits(config, "gpu")
    verbs = {verb: limit for verb, limit in said.items() if verb != "holding settled"}
    assert said["holding settled"] >= max(verbs.values())


def test_engines_that_end_with_the_keeper_have_the_time_to_leave_their_gpus(
    config: Config,
) -> None:
    assert Context(config).leaving_s() == 2 * GPU_S
