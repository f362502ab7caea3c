"""What happened, as typed events on one bus (admin SSE, metrics and the log read it)."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from swapserve.states import EngineState, Tier
from swapserve.status import SwapSummary

HISTORY = 500
QUEUE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChanged:
    """An engine went from one state to another."""

    kind: ClassVar[str] = "engine_changed"
    at: float
    engine: str
    old: EngineState
    new: EngineState
    tier: Tier
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapEnded:
    """A transition ended, well or (with `summary.error`) badly."""

    kind: ClassVar[str] = "swap_ended"
    at: float
    engine: str
    summary: SwapSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnded:
    """A request through the front door is over.

    `ttft_s` runs from accepting the request to the first body byte sent to the client, swap wait
    included; None if none was sent. `outcome` is `ok`, `client_left` or an error code.
    """

    kind: ClassVar[str] = "request_ended"
    at: float
    engine: str
    endpoint: str
    status: int
    outcome: str
    stream: bool
    queue_s: float
    ttft_s: float | None
    seconds: float
    suspensions: int
    bytes_out: int
    bytes_in: int = 0
    prefix: int = 0
    """Hash of the beginning of its body; the next turn of a chat has the same."""
    priority: str = "interactive"
    key: str = ""
    """Name of the API key that it came with; empty without keys."""
    tokens_in: float = 0.0
    """Length of its prompt, estimated from its size."""
    tokens_out: float | None = None
    """Length of its answer: as the engine stated it, else counted or estimated; None if it was
    not answered to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something an operator should know that changes no state (canary failed, image dropped)."""

    kind: ClassVar[str] = "notice"
    at: float
    engine: str | None
    message: str


BusEvent = EngineChanged | SwapEnded | RequestEnded | Notice


def as_json(event: BusEvent) -> dict[str, Any]:
    """Return the event as plain data, its kind under `event`."""
    return {"event": event.kind, **asdict(event)}


class Bus:
    """Hand each event to every listener; a slow subscriber loses the oldest, nobody waits."""

    def __init__(self) -> None:
        self.history: deque[BusEvent] = deque(maxlen=HISTORY)
        self._listeners: list[Callable[[BusEvent], None]] = []

    def listen(self, listener: Callable[[BusEvent], None]) -> None:
        """Call `listener` synchronously for each event from now on; it must not block."""
        self._listeners.append(listener)

    def publish(self, event: BusEvent) -> None:
        """Record the event and hand it on."""
        self.history.append(event)
        for listener in tuple(self._listeners):
            listener(event)

    @contextmanager
    def subscribe(self) -> Iterator[AsyncIterator[BusEvent]]:
        """Yield an endless async iterator over the events from now on."""
        waiting: deque[BusEvent] = deque(maxlen=QUEUE)
        wake = asyncio.Event()

        def listener(event: BusEvent) -> None:
            waiting.append(event)
            wake.set()

        async def events() -> AsyncIterator[BusEvent]:
            while True:
                while waiting:
                    yield waiting.popleft()
                wake.clear()
                await wake.wait()

        self._listeners.append(listener)
        try:
            yield events()
        finally:
            self._listeners.remove(listener)
