"""A real server with the admin routes over a scripted daemon, in a thread of its own."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web

from swapserve.api.admin import Verb, routes
from swapserve.api.errors import as_response
from swapserve.errors import ModelNotFound, SwapServeError
from swapserve.events import Bus, BusEvent
from swapserve.ids import EngineName
from swapserve.states import EngineState, Tier
from swapserve.status import DeviceStatus, EngineStatus, Status, SwapSummary

GIB = 1 << 30


def engine(name: str, **changes: Any) -> EngineStatus:
    """Return an engine that rests on disk, with the given differences."""
    asleep = EngineStatus(
        name=name,
        aliases=(),
        recipe="llamacpp",
        devices=("ram",),
        mechanism=None,
        host_bytes=0,
        state=EngineState.SWAPPED_OUT,
        tier=Tier.DISK,
        since=1000.0,
        footprint_bytes=3 * GIB,
        footprint_source="measured",
        active=0,
        waiting=0,
        suspended=0,
        pinned=False,
        golden_image=True,
        image_bytes=2 * GIB,
        restored_from=None,
        address=None,
        pid=None,
        last_swap=None,
        error=None,
    )
    return replace(asleep, **changes)


LAST_SWAP = SwapSummary(
    kind="swap_in",
    mechanism="golden",
    from_tier=Tier.DISK,
    to_tier=Tier.DEVICE,
    cause="request",
    seconds=0.82,
    phases={"restore": 0.7, "probe": 0.1},
    unaccounted_s=0.02,
    bytes=2 * GIB,
    finished_at=2000.0,
)


def two_engines() -> Status:
    """Return a daemon with one engine resident and one away."""
    return Status(
        version="0.1.0",
        pid=11,
        uptime_s=61.0,
        profile="root",
        keeper_pid=12,
        devices=(
            DeviceStatus(
                name="ram",
                kind="host",
                capacity_bytes=4 * GIB,
                reserved_bytes=0,
                committed_bytes=3 * GIB,
            ),
        ),
        engines=(
            engine(
                "org/model-a",
                aliases=("a",),
                state=EngineState.READY,
                tier=Tier.DEVICE,
                active=2,
                waiting=1,
                last_swap=LAST_SWAP,
                address="10.231.0.2:8000",
                pid=99,
            ),
            engine("model-b", suspended=1),
        ),
    )


@dataclass
class ScriptedControl:
    """A daemon that does what the test says and notes what it was asked."""

    state: Status = field(default_factory=two_engines)
    failure: SwapServeError | None = None
    """What the next commands raise."""
    finish: asyncio.Event = field(default_factory=asyncio.Event)
    """Commands that wait are over when this is set (it is, unless a test clears it)."""
    bus: Bus = field(default_factory=Bus)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.finish.set()

    def status(self, *, outlook: bool = True) -> Status:
        return self.state

    def resolve(self, name: str) -> EngineName:
        for known in self.state.engines:
            if name in {known.name, *known.aliases}:
                return EngineName(known.name)
        raise ModelNotFound(name, ["model-b"])

    async def command(self, verb: Verb, engine: EngineName, *, wait: bool = True) -> None:
        self.asked.append((verb, engine, "wait" if wait else "no wait"))
        if wait:
            await self.finish.wait()
        if self.failure is not None:
            raise self.failure

    async def log_tail(self, engine: EngineName, lines: int) -> str:
        return "".join(f"{engine} line {number}\n" for number in range(lines))

    async def shutdown(self) -> None:
        self.asked.append(("shutdown",))


@web.middleware
async def render_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer with the error object that every endpoint uses."""
    try:
        return await handler(request)
    except SwapServeError as error:
        return as_response(error)


@dataclass
class Running:
    """A server that runs: its address, and a way to do things on its loop."""

    url: str
    control: ScriptedControl
    loop: asyncio.AbstractEventLoop

    def publish(self, event: BusEvent) -> None:
        """Publish an event and wait until it is out."""

        async def do() -> None:
            self.control.bus.publish(event)

        asyncio.run_coroutine_threadsafe(do(), self.loop).result(timeout=20)

    def set(self, event: asyncio.Event) -> None:
        """Set an event of the server's loop."""
        self.loop.call_soon_threadsafe(event.set)


@contextmanager
def running(
    control: ScriptedControl, *, admin_keys: Sequence[str] = (), host: str = "127.0.0.1"
) -> Iterator[Running]:
    """Serve the admin routes on a free port until the block ends."""
    ready = threading.Event()
    started: list[Running] = []
    stop = asyncio.Event()

    async def serve() -> None:
        app = web.Application(middlewares=[render_errors])
        app.add_routes(routes(control, admin_keys))
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, 0).start()
            port = runner.addresses[0][1]
            started.append(Running(f"http://{host}:{port}", control, asyncio.get_running_loop()))
            ready.set()
            await stop.wait()
            control.closing.set()
        finally:
            await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(20)
    try:
        yield started[0]
    finally:
        started[0].loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
