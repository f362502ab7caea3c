"""What the core knows of one engine: who wants it since when, and its recent history. Pure."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from swapserve.errors import SwapServeError
from swapserve.ids import CommandId, EngineName, LeaseId
from swapserve.messages import EngineSpec, Verb
from swapserve.states import EngineState, LeaseState, Tier

BRINGING_IN = frozenset({EngineState.STARTING, EngineState.SWAPPING_IN})
LEAVING = frozenset({EngineState.SWAPPING_OUT, EngineState.STOPPING})
MOVING = BRINGING_IN | LEAVING
"""States whose end the core is told by an event of its own."""
SERVING = frozenset({EngineState.READY, EngineState.DRAINING})
AWAY = frozenset({EngineState.STOPPED, EngineState.SWAPPED_OUT, EngineState.FAILED})

Since = tuple[float, int]
"""When a wish began, and a running number that orders wishes of the same moment."""


@dataclass(slots=True, eq=False)
class Lease:
    """One request, from queueing to its last byte."""

    id: LeaseId
    engine: EngineName
    since: Since
    """Start of its present wait: its arrival, or its suspension."""
    state: LeaseState = LeaseState.WAITING
    called: bool = False
    """It is one of those for whom the engine was last brought in."""


@dataclass(slots=True, eq=False)
class Engine:
    """One engine: configuration, state as the core sees it, leases, commands, failures."""

    spec: EngineSpec
    index: int
    state: EngineState = EngineState.STOPPED
    tier: Tier = Tier.NONE
    seen: bool = False
    can_preempt: bool = False
    pinned: bool = False
    preload: bool = False
    measured: int | None = None
    """Most bytes ever measured on its device."""

    waiting: OrderedDict[LeaseId, Lease] = field(default_factory=OrderedDict)
    active: dict[LeaseId, Lease] = field(default_factory=dict)
    suspended: OrderedDict[LeaseId, Lease] = field(default_factory=OrderedDict)
    callers: int = 0
    """Active leases for whom it was brought in."""

    ready_since: float = 0.0
    idle_since: float = 0.0
    guard_until: float = 0.0
    """Brought in on command with nobody waiting: kept at least this long."""

    failures: int = 0
    retry_at: float = 0.0
    refusing: bool = False
    """The last bring-in failed: new leases are refused until `retry_at`."""
    last_error: SwapServeError | None = None
    out_failures: int = 0
    out_retry_at: float = 0.0

    held: bool = False
    """Stopped by an operator: serves nobody until started."""
    hold_after: bool = False
    """An operator swaps it out while busy: it stays out for a quantum."""
    hold_until: float = 0.0

    ins: list[CommandId] = field(default_factory=list)
    ins_since: Since = (0.0, 0)
    outs: list[CommandId] = field(default_factory=list)
    stops: list[CommandId] = field(default_factory=list)
    queued: deque[tuple[CommandId, Verb]] = field(default_factory=deque)

    @property
    def name(self) -> EngineName:
        """Its configured name."""
        return self.spec.name

    @property
    def need(self) -> int | None:
        """Bytes to promise it (None: nobody knows yet); a larger measurement wins."""
        configured = self.spec.memory_bytes
        if configured is None:
            return self.measured
        return configured if self.measured is None else max(configured, self.measured)

    @property
    def idle(self) -> bool:
        """Whether no request runs on it."""
        return not self.active

    def measure(self, size: int) -> None:
        """Remember a reading; readings only tighten, so the largest counts."""
        self.measured = size if self.measured is None else max(self.measured, size)

    def calling(self) -> Since | None:
        """Return since when somebody wants it on its device (None: nobody does)."""
        oldest = self.ins_since if self.ins else None
        for queue in (self.waiting, self.suspended):
            if queue:
                head = next(iter(queue.values())).since
                if oldest is None or head < oldest:
                    oldest = head
        return oldest

    def leases(self) -> Iterator[Lease]:
        """Iterate over a copy of the leases that have been granted, running ones first."""
        yield from tuple(self.active.values())
        yield from tuple(self.suspended.values())
