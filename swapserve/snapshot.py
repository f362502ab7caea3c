"""The daemon's status: what each part knows of an engine or a device now, put together."""

import os
import time
from collections.abc import Callable, Iterable
from typing import Literal

import swapserve
from swapserve.config.schema import Config, ModelConfig
from swapserve.ids import DeviceName, EngineName
from swapserve.keeper.client import KeeperClient
from swapserve.lifecycle.actor import EngineActor
from swapserve.scheduler.core import Core
from swapserve.states import Tier
from swapserve.status import DeviceStatus, EngineStatus, Outlook, Status


class Snapshots:
    """Makes statuses.

    Args:
        config: all of it.
        core: the scheduler's.
        actors: of every engine.
        keeper: what holds them.
        clock: monotonic seconds, as the core is told.
    """

    def __init__(
        self,
        config: Config,
        core: Core,
        actors: Iterable[EngineActor],
        keeper: KeeperClient,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._core = core
        self._actors = tuple(actors)
        self._keeper = keeper
        self._clock = clock
        self._started = clock()

    def take(self, *, outlook: bool = True) -> Status:
        """Return everything as it is now.

        Args:
            outlook: whether to predict waits; with many engines and long queues that takes
                milliseconds, too long for what clients poll.
        """
        met, counted = self._core.knowledge.service.coverage()
        return Status(
            version=swapserve.__version__,
            pid=os.getpid(),
            uptime_s=self._clock() - self._started,
            profile=self._keeper.profile,
            keeper_pid=self._keeper.pid,
            policy=self._config.scheduling.policy,
            forecasts=counted,
            forecasts_met=met,
            devices=tuple(self._device(name) for name in self._config.devices),
            engines=tuple(self._engine(actor, outlook) for actor in self._actors),
        )

    def _device(self, name: DeviceName) -> DeviceStatus:
        account = self._core.devices()[name]
        return DeviceStatus(
            name=name,
            kind=self._config.devices[name].kind,
            capacity_bytes=account.capacity_bytes,
            reserved_bytes=account.reserved_bytes,
            committed_bytes=account.committed_bytes,
        )

    def _engine(self, actor: EngineActor, outlook: bool) -> EngineStatus:
        model, holding, standing = actor.model, actor.holding, actor.standing
        active, waiting, suspended = self._core.counts(model.name)
        source: Literal["configured", "measured", "unknown"] = "unknown"
        if model.memory_bytes is not None:
            source = "configured"
        elif actor.figures.footprint_bytes is not None:
            source = "measured"
        return EngineStatus(
            name=model.name,
            aliases=model.aliases,
            recipe=model.recipe.name,
            devices=model.devices,
            mechanism=model.mechanism if model.gpus else None,
            host_bytes=actor.host_bytes,
            state=standing.state,
            tier=standing.tier,
            since=standing.since,
            footprint_bytes=actor.figures.footprint_bytes,
            footprint_source=source,
            active=active,
            waiting=waiting,
            suspended=suspended,
            pinned=self._core.pinned(model.name),
            golden_image=holding.golden if holding else False,
            image_bytes=(holding.live_image_bytes + holding.golden_image_bytes if holding else 0),
            restored_from=holding.restored_from if holding else None,
            address=holding.address if holding else None,
            pid=holding.pid if holding else None,
            last_swap=standing.last_swap,
            error=standing.error,
            outlook=self._outlook(model.name, _tiers(model)) if outlook else Outlook(),
        )

    def _outlook(self, engine: EngineName, tiers: Iterable[Tier]) -> Outlook:
        core, knowledge = self._core, self._core.knowledge
        tiers, costs = tuple(tiers), knowledge.costs
        return Outlook(
            queued={one.name.lower(): count for one, count in core.queued(engine).items()},
            wait_s=core.predicted_wait(engine),
            arrivals_per_s=knowledge.arrivals.rate(engine, self._clock()),
            out_s={tier.value: costs.out_s(engine, tier, busy=False) for tier in tiers},
            in_s={tier.value: costs.in_s(engine, tier, busy=False) for tier in tiers},
        )


def _tiers(model: ModelConfig) -> Iterable[Tier]:
    """Return where it can be when it is off its devices; to have ended is always possible."""
    return dict.fromkeys((*model.tiers, Tier.NONE))
