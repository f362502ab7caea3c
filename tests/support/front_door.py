"""The real front door over a scripted scheduler and fake engines that are real processes."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from swapserve.api.app import Deps, build_app, serve
from swapserve.api.errors import explain
from swapserve.config.recipes import Recipe
from swapserve.config.schema import ModelConfig, ServerConfig
from swapserve.errors import SwapServeError
from swapserve.events import Bus, BusEvent, RequestEnded
from swapserve.ids import DeviceName, EngineName, LeaseId
from swapserve.messages import Ask, Event, LeaseBegan, LeaseEnded, LeaseRequested, Used
from swapserve.metrics import Metrics
from swapserve.router.admission import Admission, Place
from swapserve.router.proxy import Proxy
from swapserve.router.resolve import Directory
from swapserve.states import EngineState, Tier
from swapserve.status import Status
from tests.support.admin_server import ScriptedControl, engine

NAME = EngineName("org/tiny")
ALIAS = "tiny"
PATIENCE_S = 20.0


async def until(what: str, true: Callable[[], bool]) -> None:
    """Wait until something that other tasks bring about is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.005)


@dataclass
class ScriptedScheduler:
    """Grants every lease at once, or leaves that to the test."""

    by_hand: bool = False
    refusal: SwapServeError | None = None
    admission: Admission = field(init=False)
    waiting: list[LeaseId] = field(default_factory=list)
    granted: list[LeaseId] = field(default_factory=list)
    began: list[LeaseId] = field(default_factory=list)
    ended: list[LeaseId] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    used: list[Used | None] = field(default_factory=list)

    def post(self, event: Event) -> None:
        match event:
            case LeaseRequested(lease=lease, ask=ask):
                self.waiting.append(lease)
                self.asks.append(ask)
                asyncio.get_running_loop().call_soon(self._decide, lease)
            case LeaseBegan(lease=lease):
                self.began.append(lease)
            case LeaseEnded(lease=lease, used=used):
                self.ended.append(lease)
                self.used.append(used)
            case _:
                raise AssertionError(event)

    def _decide(self, lease: LeaseId) -> None:
        if self.refusal is not None:
            self.admission.refused(lease, self.refusal)
        elif not self.by_hand:
            self.grant(lease)

    def grant(self, lease: LeaseId) -> None:
        self.granted.append(lease)
        self.admission.granted(lease)

    async def next_waiting(self) -> LeaseId:
        await until("a lease was asked for", lambda: bool(self.waiting))
        return self.waiting[-1]


@dataclass
class EngineProcess:
    """A fake engine."""

    process: asyncio.subprocess.Process
    port: int

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def stats(self) -> dict[str, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.port}/stats") as answer,
        ):
            found: dict[str, Any] = await answer.json()
            return found

    async def until(self, **expected: object) -> dict[str, Any]:
        """Wait until the engine's statistics hold these values."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            stats = await self.stats()
            if expected.items() <= stats.items():
                return stats
            assert time.monotonic() < deadline, f"{expected} never came; at the end {stats}"
            await asyncio.sleep(0.01)


@asynccontextmanager
async def fake_engine(*args: str, name: str = NAME) -> AsyncIterator[EngineProcess]:
    """Run a fake engine until the block ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "swapserve.testing.engine",
        "--port=0",
        f"--name={name}",
        *args,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            line = await process.stdout.readline()
        yield EngineProcess(process, int(line.split()[-1]))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@dataclass
class FrontDoor:
    """A running front door and what a test may do to it."""

    url: str
    client: aiohttp.ClientSession
    scheduler: ScriptedScheduler
    proxy: Proxy
    metrics: Metrics
    control: ScriptedControl
    ended: list[RequestEnded]
    places: dict[EngineName, Place]

    async def post(
        self, path: str = "/v1/completions", *, headers: dict[str, str] | None = None, **body: Any
    ) -> aiohttp.ClientResponse:
        """Send a request for the alias, greedy unless the test says otherwise."""
        full = {"model": ALIAS, "prompt": "p", "temperature": 0, **body}
        return await self.client.post(self.url + path, json=full, headers=headers)

    async def until_ended(self, count: int = 1) -> RequestEnded:
        await until("the request's end was published", lambda: len(self.ended) >= count)
        return self.ended[-1]


def status() -> Status:
    """Return what the daemon would say of the one engine."""
    here = engine(NAME, aliases=(ALIAS,), state=EngineState.READY, tier=Tier.DEVICE)
    return Status(
        version="0", pid=1, uptime_s=1.0, profile="unprivileged", keeper_pid=2, engines=(here,)
    )


@asynccontextmanager
async def front_door(
    port: int,
    *,
    by_hand: bool = False,
    refusal: SwapServeError | None = None,
    server: ServerConfig | None = None,
    endpoints: Sequence[str] = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"),
    fresh_seed: bool = False,
    takes_seed: bool = False,
    deadline_s: float | None = None,
) -> AsyncIterator[FrontDoor]:
    """Serve one engine on `port`."""
    server = server or ServerConfig(headers_after_s=0.05, keepalive_s=0.05)
    recipe = Recipe(name="fake", adapter="generic", argv=("x",), endpoints=tuple(endpoints))
    model = ModelConfig(
        name=NAME,
        recipe=recipe,
        aliases=(ALIAS,),
        devices=(DeviceName("ram"),),
        deadline_s=deadline_s,
    )
    places = {
        NAME: Place(host="127.0.0.1", port=port, fresh_seed=fresh_seed, takes_seed=takes_seed)
    }
    scheduler = ScriptedScheduler(by_hand=by_hand, refusal=refusal)
    admission = Admission(post=scheduler.post, place=places.__getitem__, clock=time.monotonic)
    scheduler.admission = admission
    bus, metrics, ended = Bus(), Metrics(), list[RequestEnded]()

    def note(event: BusEvent) -> None:
        if isinstance(event, RequestEnded):
            ended.append(event)

    bus.listen(metrics.count)
    bus.listen(note)
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(
            Proxy(
                admission=admission,
                explain=explain,
                publish=bus.publish,
                headers_after_s=server.headers_after_s,
                keepalive_s=server.keepalive_s,
            )
        )
        control = ScriptedControl(state=status(), bus=bus)
        deps = Deps(
            server=server,
            directory=Directory([model]),
            proxy=proxy,
            metrics=metrics,
            control=control,
        )
        urls = await stack.enter_async_context(serve(build_app(deps), "127.0.0.1", 0))
        client = await stack.enter_async_context(aiohttp.ClientSession())
        yield FrontDoor(urls[0], client, scheduler, proxy, metrics, control, ended, places)


def events(body: bytes) -> list[str]:
    """Return the data of each server-sent event."""
    found = []
    for block in body.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines), block
        if lines:
            found.append("\n".join(line.removeprefix("data: ") for line in lines))
    return found


def comments(body: bytes) -> int:
    """Return how many comments a stream holds."""
    return sum(line.startswith(b":") for line in body.split(b"\n"))
