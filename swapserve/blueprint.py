"""What the scheduler's core is built from: the configuration, in the core's own terms. Pure."""

from collections.abc import Callable

from swapserve.config.schema import Config, ModelConfig
from swapserve.messages import DeviceSpec, EngineSpec, Rules
from swapserve.scheduler.core import Core
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.policies.base import Policy
from swapserve.states import Tier


def core_of(
    config: Config,
    *,
    policy: Policy,
    knowledge: Knowledge,
    wall_offset_s: float,
    pinned: Callable[[ModelConfig], bool],
) -> Core:
    """Return the core for a configuration.

    Args:
        config: all of it.
        policy: a new one; no other core may have it.
        knowledge: what earlier daemons have learnt.
        wall_offset_s: Unix time when the monotonic clock was zero.
        pinned: whether an engine is pinned at first; an operator may have said otherwise.
    """
    devices = (
        DeviceSpec(
            name=device.name, capacity_bytes=device.memory_bytes, exclusive=device.kind == "gpu"
        )
        for device in config.devices.values()
    )
    engines = (engine_of(model, pin=pinned(model)) for model in config.models.values())
    return Core(devices, engines, rules_of(config, wall_offset_s), policy, knowledge)


def engine_of(model: ModelConfig, *, pin: bool) -> EngineSpec:
    """Return one engine as the core sees it."""
    return EngineSpec(
        name=model.name,
        devices=model.devices,
        memory_bytes=model.memory_bytes,
        ram=model.ram if Tier.HOST in model.tiers else None,
        pin=pin,
        # What others have started takes its memory already.
        preload=model.preload or model.launch == "attached",
        ttl_s=model.ttl_s,
        slots=model.slots,
        queue_limit=model.queue_limit,
        min_resident_s=model.min_resident_s,
        slo_ttft_s=model.slo_ttft_s,
        slo_itl_s=model.slo_itl_s,
    )


def rules_of(config: Config, wall_offset_s: float) -> Rules:
    """Return the figures that every policy works with."""
    scheduling, server = config.scheduling, config.server
    return Rules(
        max_wait_s=scheduling.max_wait_s,
        queue_limit=server.queue_limit,
        queue_limit_total=server.queue_limit_total,
        queue_timeout_s=server.queue_timeout_s,
        retry_backoff_s=scheduling.retry_backoff_s,
        quantum_s=scheduling.quantum_s,
        overhead_share=scheduling.overhead_share,
        slo_ttft_s=scheduling.slo_ttft_s,
        slo_itl_s=scheduling.slo_itl_s,
        look_ahead=scheduling.look_ahead,
        wall_offset_s=wall_offset_s,
    )
