"""What is configured is what the scheduler's core goes by."""

from dataclasses import fields
from pathlib import Path

from swapserve.blueprint import core_of, engine_of, rules_of
from swapserve.config.load import load
from swapserve.config.schema import Config, ModelConfig
from swapserve.messages import EngineSpec, Rules
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.policies.recency import Lru

TEXT = """
server: {queue_limit: 7, queue_limit_total: 70, queue_timeout: 8}
scheduling:
  quantum: 1.5
  overhead_share: 0.3
  max_wait: 11
  slo_ttft: 12
  slo_itl: 130ms
  look_ahead: false
  retry_backoff: 14
devices:
  ram: {memory: 8GiB}
  g0: {kind: gpu, uuid: GPU-0, memory: 10GiB}
models:
  - name: a
    recipe: vllm
    params: {python: python3}
    model: x/y
    device: g0
    memory: 1GiB
    ttl: 20
    slots: 21
    queue_limit: 22
    min_resident: 23
    slo_ttft: 24
    slo_itl: 25
    preload: true
  - name: b
    recipe: llamacpp
    model: x/y
    device: ram
"""


def config(tmp_path: Path) -> Config:
    path = tmp_path / "swapserve.yaml"
    path.write_text(TEXT)
    return load(path, check_binaries=False)


def test_every_figure_of_the_rules_is_the_configured_one(tmp_path: Path) -> None:
    rules = rules_of(config(tmp_path), 99.0)
    assert rules == Rules(
        max_wait_s=11.0,
        queue_limit=7,
        queue_limit_total=70,
        queue_timeout_s=8.0,
        retry_backoff_s=14.0,
        quantum_s=1.5,
        overhead_share=0.3,
        slo_ttft_s=12.0,
        slo_itl_s=0.13,
        look_ahead=False,
        wall_offset_s=99.0,
    )
    # None was forgotten here: each differs from the default, if there is one.
    assert all(getattr(rules, one.name) != one.default for one in fields(Rules))


def test_every_figure_of_an_engine_is_the_configured_one(tmp_path: Path) -> None:
    a, b = (engine_of(one, pin=True) for one in config(tmp_path).models.values())
    assert (a.memory_bytes, a.ttl_s, a.slots, a.queue_limit) == (1 << 30, 20.0, 21, 22)
    assert (a.min_resident_s, a.slo_ttft_s, a.slo_itl_s) == (23.0, 24.0, 25.0)
    assert (a.devices, a.ram, a.preload, a.pin) == (("g0",), "ram", True, True)
    assert all(getattr(a, one.name) != one.default for one in fields(EngineSpec))
    assert (b.slots, b.queue_limit, b.ram, b.preload) == (None, None, None, False)


def test_the_core_has_every_engine_and_device(tmp_path: Path) -> None:
    found = config(tmp_path)

    def pinned(model: ModelConfig) -> bool:
        return model.name == "b"

    core = core_of(found, policy=Lru(), knowledge=Knowledge(), wall_offset_s=0.0, pinned=pinned)
    assert set(core.devices()) == {"ram", "g0"}
    assert {name: core.pinned(name) for name in found.models} == {"a": False, "b": True}
