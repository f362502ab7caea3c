"""Front door and scheduler together: two engines, room for one, moved by stopping processes."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import pytest

from swapserve.api.app import Deps, build_app, serve
from swapserve.api.errors import explain
from swapserve.config.recipes import Recipe
from swapserve.config.schema import ModelConfig, ServerConfig
from swapserve.events import Bus, RequestEnded
from swapserve.ids import DeviceName, EngineName
from swapserve.messages import (
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
from swapserve.testing.engine import expected_tokens
from tests.support.admin_server import ScriptedControl
from tests.support.front_door import EngineProcess, events, fake_engine, until

pytestmark = pytest.mark.anyio
A, B = EngineName("a"), EngineName("b")
DEVICE = DeviceName("ram")
SIZE = 100
SWAP_S = 0.05


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Freezer:
    """Moves engines by stopping and continuing their processes."""

    def __init__(self, processes: dict[EngineName, EngineProcess]) -> None:
        self.moves: list[str] = []
        self.runner: Runner
        self.proxy: Proxy
        self._processes = processes

    def post(self, event: Event) -> None:
        self.runner.post(event)

    def bring_in(self, engine: EngineName, to: Tier) -> None:
        assert to is Tier.DEVICE
        asyncio.get_running_loop().call_later(SWAP_S, self._back, engine)

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

    async def ask(self, model: str, **body: object) -> aiohttp.ClientResponse:
        full = {"model": model, "prompt": model, "temperature": 0, **body}
        return await self.client.post(f"{self.url}/v1/completions", json=full)


@asynccontextmanager
async def pair(**policy: float) -> AsyncIterator[Pair]:
    """Serve both; at first A is there."""
    chosen = {
        "quantum_s": 0.1,
        "max_wait_s": 30.0,
        "queue_limit": 8,
        "queue_timeout_s": 20.0,
        "retry_backoff_s": 1.0,
        **policy,
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


def whole(body: bytes, prompt: str, count: int) -> bool:
    """Say whether a stream holds every token once, in order, and its end."""
    data = events(body)
    texts = [json.loads(one)["choices"][0]["text"] for one in data[:-1]]
    return texts == expected_tokens(prompt, None, count) and data[-1] == "[DONE]"


async def test_a_long_stream_is_preempted_for_another_model_and_goes_on() -> None:
    async with pair() as both:
        long = await both.ask(A, stream=True, max_tokens=150)
        first = await long.content.readany()
        short = await both.ask(B, stream=True, max_tokens=20)
        assert whole(await short.read(), B, 20)
        assert whole(first + await long.read(), A, 150)
        await until("both are over", lambda: len(both.ended) == 2)
        assert [one.outcome for one in both.ended] == ["ok", "ok"]
        suspended = {one.engine: one.suspensions for one in both.ended}
        # Fewer if the end of an answer and the last swap out crossed on their way.
        assert 0 < suspended[A] <= both.freezer.moves.count("a out with 1")
        assert suspended[B] <= both.freezer.moves.count("b out with 1")


async def test_many_waiters_for_one_engine_cause_one_swap() -> None:
    async with pair() as both, asyncio.TaskGroup() as group:
        asked = [group.create_task(both.ask(B, max_tokens=2)) for _ in range(5)]
        answers = [await one for one in asked]
        assert [answer.status for answer in answers] == [200] * 5
        assert both.freezer.moves == ["a out with 0", "b in"]


async def test_one_waiter_too_many_gets_a_429() -> None:
    async with pair(queue_limit=2, quantum_s=60.0) as both, asyncio.TaskGroup() as group:
        busy = await both.ask(A, stream=True, max_tokens=10_000)
        waiting = [group.create_task(both.ask(B)) for _ in range(2)]
        await until("two wait", lambda: both.core.counts(B)[1] == 2)
        refused = await both.ask(B)
        assert refused.status == 429
        assert (await refused.json())["error"]["code"] == "queue_full"
        for one in waiting:
            one.cancel()
        await until("nobody waits", lambda: both.core.counts(B)[1] == 0)
        busy.close()


async def test_a_client_that_leaves_while_suspended_does_not_bring_its_engine_back() -> None:
    async with pair() as both:
        left = await both.ask(A, stream=True, max_tokens=10_000)
        await left.content.readany()
        assert (await both.ask(B, max_tokens=2)).status == 200
        left.close()
        await until("its end is known", lambda: both.core.counts(A) == (0, 0, 0))
        assert both.freezer.moves[:2] == ["a out with 1", "b in"]
        if "a in" not in both.freezer.moves:
            assert both.freezer.proxy.orphans(A) == 1
        assert (await both.ask(A, max_tokens=2)).status == 200
        await both.processes[A].until(running=0, aborted=1)
