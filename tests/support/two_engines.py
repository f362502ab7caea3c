"""Front door and scheduler together: two engines, room for one, moved by stopping processes."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from swapserve.api.app import Deps, build_app, serve
from swapserve.api.errors import explain
from swapserve.config.recipes import Recipe
from swapserve.config.schema import ModelConfig, ServerConfig
from swapserve.events import Bus, RequestEnded
from swapserve.ids import DeviceName, EngineName
from swapserve.messages import (
    BringIn,
    DeviceSpec,
    EngineLeft,
    EngineReady,
    EngineSeen,
    EngineSpec,
    Event,
    Rules,
    SwapOut,
)
from swapserve.metrics import Metrics
from swapserve.router.admission import Admission, Place
from swapserve.router.proxy import Proxy
from swapserve.router.resolve import Directory
from swapserve.scheduler.core import Core
from swapserve.scheduler.policies.recency import Lru
from swapserve.scheduler.runner import Runner
from swapserve.states import EngineState, Tier
from tests.support.admin_server import ScriptedControl
from tests.support.front_door import EngineProcess, fake_engine

A, B = EngineName("a"), EngineName("b")
DEVICE = DeviceName("ram")
SIZE = 100
SWAP_S = 0.05


class Freezer:
    """Moves engines by stopping and continuing their processes."""

    def __init__(self, processes: dict[EngineName, EngineProcess]) -> None:
        self.moves: list[str] = []
        self.runner: Runner
        self.proxy: Proxy
        self._processes = processes

    def post(self, event: Event) -> None:
        self.runner.post(event)

    def bring_in(self, order: BringIn) -> None:
        assert order.to is Tier.DEVICE
        asyncio.get_running_loop().call_later(SWAP_S, self._back, order.engine)

    def _back(self, engine: EngineName) -> None:
        self._processes[engine].thaw()
        self.moves.append(f"{engine} in")
        self.proxy.engine_back(engine)
        self.runner.post(EngineReady(engine=engine, footprint={DEVICE: SIZE}, seconds=SWAP_S))

    def swap_out(self, order: SwapOut) -> None:
        assert order.to is Tier.DISK
        self._processes[order.engine].freeze()
        self.moves.append(f"{order.engine} out with {order.in_flight}")
        asyncio.get_running_loop().call_later(SWAP_S, self._left, order.engine)

    def _left(self, engine: EngineName) -> None:
        self.runner.post(EngineLeft(engine=engine, tier=Tier.DISK, seconds=SWAP_S))

    def stop(self, engine: EngineName) -> None:
        raise AssertionError(engine)

    def drain(self, engine: EngineName, on: bool) -> None:
        pass


@dataclass
class Pair:
    """Two engines behind one door."""

    url: str
    client: aiohttp.ClientSession
    freezer: Freezer
    processes: dict[EngineName, EngineProcess]
    ended: list[RequestEnded]
    core: Core

    async def ask(
        self, model: str, *, headers: dict[str, str] | None = None, **body: object
    ) -> aiohttp.ClientResponse:
        full = {"model": model, "prompt": model, "temperature": 0, **body}
        return await self.client.post(f"{self.url}/v1/completions", json=full, headers=headers)


@asynccontextmanager
async def pair(*, slots: int | None = None, **rules: float) -> AsyncIterator[Pair]:
    """Serve both, each with so many slots; at first A is there."""
    chosen = {
        "quantum_s": 0.1,
        "max_wait_s": 30.0,
        "queue_limit": 8,
        "queue_timeout_s": 20.0,
        "retry_backoff_s": 1.0,
        **rules,
    }
    recipe = Recipe(name="fake", adapter="generic", argv=("x",))
    models = [ModelConfig(name=name, recipe=recipe, devices=(DEVICE,)) for name in (A, B)]
    core = Core(
        [DeviceSpec(name=DEVICE, capacity_bytes=SIZE)],
        [
            EngineSpec(
                name=name,
                devices=(DEVICE,),
                memory_bytes=SIZE,
                pin=False,
                preload=False,
                ttl_s=None,
                slots=slots,
            )
            for name in (A, B)
        ],
        Rules(**chosen),  # type: ignore[arg-type]
        Lru(),
    )
    slow = "--delay-per-token=0.01"
    async with fake_engine(slow, name=A) as a, fake_engine(slow, name=B) as b:
        processes = {A: a, B: b}
        freezer, bus, ended = Freezer(processes), Bus(), list[RequestEnded]()
        bus.listen(lambda event: ended.append(event) if isinstance(event, RequestEnded) else None)
        admission = Admission(
            post=freezer.post,
            place=lambda name: Place(host="127.0.0.1", port=processes[name].port),
            clock=time.monotonic,
        )
        runner = Runner(core, freezer, admission)
        server = ServerConfig(headers_after_s=0.05, keepalive_s=0.05)
        proxy = Proxy(
            admission=admission,
            explain=explain,
            publish=bus.publish,
            headers_after_s=server.headers_after_s,
            keepalive_s=server.keepalive_s,
        )
        freezer.runner, freezer.proxy = runner, proxy
        b.freeze()
        for name, state, tier in (
            (A, EngineState.READY, Tier.DEVICE),
            (B, EngineState.SWAPPED_OUT, Tier.DISK),
        ):
            runner.post(
                EngineSeen(
                    engine=name, state=state, tier=tier, footprint={DEVICE: SIZE}, can_preempt=True
                )
            )
        deps = Deps(
            server=server,
            directory=Directory(models),
            proxy=proxy,
            metrics=Metrics(),
            control=ScriptedControl(bus=bus),
        )
        async with asyncio.TaskGroup() as group:
            task = group.create_task(runner.run())
            async with (
                proxy,
                serve(build_app(deps), "127.0.0.1", 0) as urls,
                aiohttp.ClientSession() as client,
            ):
                yield Pair(urls[0], client, freezer, processes, ended, core)
            task.cancel()
        for process in processes.values():
            process.thaw()
