"""The composition root: builds every object, owns the root task group, signals and shutdown.

Order up: keeper, client of the keeper, scheduler, actors (each says where its engine is), front
door. Order down: front door, waiting requests refused, actors, then the keeper as `server.on_exit`
says. The daemon holds no privilege: it gives them up before it opens the front door.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from swapserve import log as logs
from swapserve.api.admin import Verb
from swapserve.api.app import Deps, build_app, serve
from swapserve.api.errors import explain
from swapserve.blueprint import core_of
from swapserve.config.load import load
from swapserve.config.schema import Config, ModelConfig
from swapserve.engines.registry import adapter_for
from swapserve.errors import ConfigError, EngineUnavailable, KeeperError, SwapServeError
from swapserve.events import Bus, BusEvent, RequestEnded
from swapserve.ids import EngineName
from swapserve.keeper.client import KeeperClient, ensure
from swapserve.keeper.protocol import Exited
from swapserve.learnt import Learnt
from swapserve.lifecycle.actor import EngineActor
from swapserve.lifecycle.figures import Figures
from swapserve.lifecycle.journal import Journal
from swapserve.lifecycle.orders import Callbacks, Order, coming, leaving
from swapserve.lifecycle.standing import Standing
from swapserve.messages import BringIn, EngineExited, Event, ShutdownAsked, SwapOut
from swapserve.metrics import Metrics
from swapserve.router.admission import Admission, Place
from swapserve.router.proxy import Proxy
from swapserve.router.resolve import Directory
from swapserve.scheduler.plugins import load_policy
from swapserve.scheduler.policies.base import Policy
from swapserve.scheduler.runner import Runner
from swapserve.snapshot import Snapshots
from swapserve.states import EngineState
from swapserve.status import Status
from swapserve.swap.moves import Mover
from swapserve.system.lockfile import only_one
from swapserve.system.privileges import drop_privileges

log = logging.getLogger(__name__)

FAILED, WRONG_CONFIG = 1, 2
ENDPOINT_FILE = "endpoint.json"


class Daemon:
    """Everything but privileges. Also the `Control` that the admin API speaks to."""

    def __init__(self, config: Config, policy: Policy, *, started_keeper: bool) -> None:
        self.bus = Bus()
        self.closing = asyncio.Event()
        self._config = config
        self._policy = policy
        self._started_keeper = started_keeper
        self._directory = Directory(config.models.values())
        home = config.paths.state_dir / "daemon"
        self._journal = Journal(home / "journal.json")
        self._learnt = Learnt(home / "knowledge.json")
        self._keeper = KeeperClient(config, self._exited)
        self._admission = Admission(post=self._post, place=self._place, clock=time.monotonic)
        self._proxy = Proxy(
            admission=self._admission,
            explain=explain,
            publish=self.bus.publish,
            headers_after_s=config.server.headers_after_s,
            keepalive_s=config.server.keepalive_s,
        )
        self._actors: dict[EngineName, EngineActor] = {}
        self._runner: Runner | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._lost: KeeperError | None = None

    # ------------------------------------------------------------ its life

    async def run(self) -> None:
        """Serve until `closing` is set.

        Raises:
            KeeperUnavailable: the keeper went away; engines stay as they are.
            KeeperError: it was started with another version or configuration.
            OSError: the address of the front door cannot be had.
        """
        self._journal.open()
        self._learnt.open()
        await self._keeper.connect()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            background = [tasks.create_task(self._until_lost(self._keeper.run))]
            await self._keeper.hello()
            background += self._build(tasks)
            try:
                await self._serve()
            except OSError:
                if self._started_keeper:  # for nobody: the front door never opened
                    await self._keeper.shutdown()
                raise
            finally:
                self._learnt.save()
            if self._lost is not None:
                raise self._lost
            if self._config.server.on_exit == "stop":
                await self._keeper.shutdown()
            for task in background:
                task.cancel()
            self._keeper.close()

    async def _serve(self) -> None:
        server = self._config.server
        async with (
            self._proxy,
            serve(build_app(self._deps()), server.host, server.port) as urls,
        ):
            self._announce(urls)
            await self.closing.wait()
            self._post(ShutdownAsked())

    async def _until_lost(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do what needs the keeper. Without one the daemon ends: in good order, and at once."""
        try:
            await work()
        except KeeperError as error:
            if not self.closing.is_set():
                self._lost = error
                for name, actor in self._actors.items():
                    if actor.standing.state not in {EngineState.READY, EngineState.DRAINING}:
                        gone = EngineUnavailable(name, f"'{name}' cannot be brought back: {error}")
                        self._post(EngineExited(engine=name, error=gone))
                        self._proxy.engine_gone(name)
                self.closing.set()  # those on engines that serve may finish

    def _build(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        config = self._config
        metrics = self._metrics = Metrics()
        self.bus.listen(metrics.count)
        self.bus.listen(self._served)
        self.bus.listen(self._learnt.note)
        for model in config.models.values():
            self._actors[model.name] = self._actor(model)
        core = core_of(
            config,
            policy=self._policy,
            knowledge=self._learnt.knowledge,
            wall_offset_s=self._learnt.wall_offset_s,
            pinned=self._pinned,
        )
        self._snapshots = Snapshots(config, core, self._actors.values(), self._keeper)
        self._runner = Runner(core, self, self._admission)
        background = [tasks.create_task(self._runner.run())]
        runs = [actor.run for actor in self._actors.values()]
        background += [tasks.create_task(self._until_lost(run)) for run in runs]
        return background

    def _actor(self, model: ModelConfig) -> EngineActor:
        name = model.name
        adapter = adapter_for(model)
        standing = Standing(name, self.bus)
        mover = Mover(
            model,
            self._config.images,
            self._keeper,
            adapter,
            close_idle=partial(self._proxy.close_idle, name),
            notice=standing.notice,
        )
        figures = Figures(model, self._journal, adapter.mechanisms)
        callbacks = Callbacks(
            post=self._post,
            engine_back=partial(self._proxy.engine_back, name),
            engine_gone=partial(self._proxy.engine_gone, name),
        )
        return EngineActor(model, mover, figures, standing, callbacks)

    def _deps(self) -> Deps:
        return Deps(
            server=self._config.server,
            directory=self._directory,
            proxy=self._proxy,
            metrics=self._metrics,
            control=self,
        )

    def _announce(self, urls: Sequence[str]) -> None:
        endpoint = self._config.paths.state_dir / "daemon" / ENDPOINT_FILE
        temporary = endpoint.with_suffix(".tmp")
        temporary.write_text(json.dumps({"pid": os.getpid(), "urls": list(urls)}))
        temporary.rename(endpoint)
        log.info("event=serving pid=%d url=%s", os.getpid(), " ".join(urls))

    # --------------------------------------------------------------- wiring

    def _post(self, event: Event) -> None:
        if self._runner is not None:
            self._runner.post(event)

    def _exited(self, exited: Exited) -> None:
        if (actor := self._actors.get(EngineName(exited.engine))) is not None:
            actor.exited(exited)

    def _served(self, event: BusEvent) -> None:
        if isinstance(event, RequestEnded) and event.outcome == "ok":
            self._actors[EngineName(event.engine)].served()

    def _place(self, engine: EngineName) -> Place:
        actor = self._actors[engine]
        if actor.holding is None or actor.holding.address is None:
            raise EngineUnavailable(engine, f"'{engine}' has no address now.")
        host, _, port = actor.holding.address.rpartition(":")
        return Place(
            host=host.strip("[]"),
            port=int(port),
            # Also after a live image: what was restored may stem from a golden one.
            fresh_seed=actor.holding.restored_from is not None,
            takes_seed=actor.model.recipe.takes_seed,
        )

    def _pinned(self, model: ModelConfig) -> bool:
        if model.launch == "attached" and not model.tiers:
            return True  # it has nowhere to go, and is not ours to end
        asked = self._journal.pinned(model.name)
        return model.pin if asked is None else asked

    # The runner's port to the engines.

    def bring_in(self, order: BringIn) -> None:
        """Order the engine's actor to bring it in, or only to host memory."""
        self._actors[order.engine].order(coming(order))

    def swap_out(self, order: SwapOut) -> None:
        """Order the engine's actor to swap it out."""
        self._actors[order.engine].order(leaving(order))

    def stop(self, engine: EngineName) -> None:
        """Order the engine's actor to end it."""
        self._actors[engine].order(Order(what="stop", cause="operator"))

    def drain(self, engine: EngineName, on: bool) -> None:
        """Show the engine as draining, or as ready again."""
        self._actors[engine].drain(on)

    # -------------------------------------------------------------- Control

    def resolve(self, name: str) -> EngineName:
        """Return the engine of a name or alias."""
        return self._directory.resolve(name)

    async def command(self, verb: Verb, engine: EngineName, *, wait: bool = True) -> None:
        """Carry an operator's command out."""
        assert self._runner is not None
        assert self._tasks is not None
        if not wait:
            self._tasks.create_task(self._unwatched(verb, engine))
            return
        await self._runner.command(verb, engine)
        if verb in {"pin", "unpin"}:
            self._journal.pin(engine, verb == "pin")

    async def _unwatched(self, verb: Verb, engine: EngineName) -> None:
        try:
            await self.command(verb, engine)
        except SwapServeError as error:
            self._actors[engine].standing.notice(f"{verb} failed: {error}")

    async def log_tail(self, engine: EngineName, lines: int) -> str:
        """Return the end of an engine's own log."""
        return await self._keeper.log_tail(engine, lines)

    async def shutdown(self) -> None:
        """Begin to end."""
        self.closing.set()

    def status(self, *, outlook: bool = True) -> Status:
        """Return everything as it is now."""
        return self._snapshots.take(outlook=outlook)


async def _serve(config: Config, policy: Policy, *, started_keeper: bool) -> None:
    daemon = Daemon(config, policy, started_keeper=started_keeper)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, daemon.closing.set)
    await daemon.run()


def main(config_path: Path) -> int:
    """Run the daemon; return its exit status: 0 asked to end, 1 failed, 2 wrong configuration."""
    try:
        config = load(config_path)
        logs.setup(config.log_format, config.log_level)
        policy = load_policy(config.scheduling.policy, path=str(config.source))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return WRONG_CONFIG
    home = config.paths.state_dir / "daemon"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with only_one(home / "lock", "daemon"):
            started = asyncio.run(ensure(config))
            drop_privileges(config.server.user, home)
            asyncio.run(_serve(config, policy, started_keeper=started))
    except* (SwapServeError, OSError) as group:
        for leaf in _leaves(group):
            log.error("event=daemon_failed error=%s", leaf)  # noqa: TRY400 - the message says it
        status = FAILED
    else:
        status = 0
    return status


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
