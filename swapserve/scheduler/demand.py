"""What the core knows of one engine: who wants it since when, and its recent history. Pure."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from swapserve.errors import SwapServeError
from swapserve.ids import CommandId, DeviceName, EngineName, LeaseId
from swapserve.messages import EngineSpec, Footprint, Verb
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
    group: int = 0
    """Which devices it is planned with."""
    state: EngineState = EngineState.STOPPED
    tier: Tier = Tier.NONE
    """Where its state rests; during a transition, where it rested before."""
    bound_for: Tier = Tier.NONE
    """The tier that the swap out under way may go to."""
    moves_on: frozenset[DeviceName] = frozenset()
    """Exclusive devices that the transition under way touches."""
    seen: bool = False
    can_preempt: bool = False
    can_dump: bool = True
    pinned: bool = False
    preload: bool = False
    measured: dict[DeviceName, int] = field(default_factory=dict)
    """Most bytes ever measured, on each of its devices."""
    host_measured: int = 0
    """Most bytes that its state ever took in the host tier."""

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
    refusals: int = 0
    """Bring-ins in a row that ended before anything was done: a GPU had no room, or was mute."""
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
    def known(self) -> bool:
        """Whether its footprint is known on each of its devices."""
        return all(self.need(device) is not None for device in self.spec.devices)

    @property
    def idle(self) -> bool:
        """Whether no request runs on it."""
        return not self.active

    @property
    def parked(self) -> bool:
        """Whether it is off its devices, or on the way further down from there."""
        lowering = self.state is EngineState.SWAPPING_OUT and self.tier is not Tier.DEVICE
        return self.state is EngineState.SWAPPED_OUT or lowering

    def need(self, device: DeviceName) -> int | None:
        """Return the bytes to promise it there (None: unknown); a larger measurement wins."""
        configured, measured = self.spec.memory_bytes, self.measured.get(device)
        if configured is None or measured is None:
            return configured if measured is None else measured
        return max(configured, measured)

    def measure(self, reading: Footprint) -> None:
        """Remember a reading; readings only tighten, so the largest counts."""
        for device in self.spec.devices:
            if device in reading:
                self.measured[device] = max(reading[device], self.measured.get(device, 0))

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
