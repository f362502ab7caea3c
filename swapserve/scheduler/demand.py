"""What the core knows of one engine: who wants it since when, and its recent history. Pure."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from swapserve.errors import SwapServeError
from swapserve.ids import CommandId, DeviceName, EngineName, LeaseId
from swapserve.messages import Ask, EngineSpec, Footprint, Verb
from swapserve.scheduler.knowledge.service import Forecast
from swapserve.states import EngineState, LeaseState, Priority, Tier

BRINGING_IN = frozenset({EngineState.STARTING, EngineState.SWAPPING_IN})
LEAVING = frozenset({EngineState.SWAPPING_OUT, EngineState.STOPPING})
MOVING = BRINGING_IN | LEAVING
"""States whose end the core is told by an event of its own."""
SERVING = frozenset({EngineState.READY, EngineState.DRAINING})
AWAY = frozenset({EngineState.STOPPED, EngineState.SWAPPED_OUT, EngineState.FAILED})

Since = tuple[float, int]
"""When a wish began, and a running number that orders wishes of the same moment."""


GROUP_MAX = 8
"""Requests of a resident engine that may overtake a wish of another. Source: Aegaeon (SOSP'25)
groups the arrivals of one model in prefill by at most eight."""


@dataclass(slots=True, eq=False)
class Lease:
    """One request, from queueing to its last byte."""

    id: LeaseId
    engine: EngineName
    since: Since
    """Start of its present wait: its arrival, or its suspension."""
    ask: Ask
    arrived: float
    state: LeaseState = LeaseState.WAITING
    called: bool = False
    """It is one of those for whom the engine was last brought in."""
    granted_at: float = 0.0
    """When its engine began to answer it."""
    began_at: float | None = None
    """When its first token came, if it is a stream and has begun."""
    promised: Forecast | None = None
    """What was predicted of it then."""
    ran_s: float = 0.0
    """How long it ran before `resumed_at`."""
    resumed_at: float = 0.0
    """When its engine last began or went on to answer it."""

    def ran(self, now: float) -> float:
        """Return for how long its engine has been answering it, suspensions left out."""
        return self.ran_s + (now - self.resumed_at if self.state is LeaseState.ACTIVE else 0.0)


def owes_first(lease: Lease) -> bool:
    """Return whether it is a stream whose first token has not come."""
    return lease.ask.streams and lease.began_at is None


class Queue:
    """Who waits for one engine: in order of arrival within each priority."""

    __slots__ = ("_lines", "_size", "deadlines")

    def __init__(self) -> None:
        self._lines: tuple[OrderedDict[LeaseId, Lease], ...] = tuple(
            OrderedDict() for _ in Priority
        )
        self._size = 0
        self.deadlines = 0
        """How many of them have a deadline of their own."""

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Lease]:
        """Iterate in the order of priority, then of arrival."""
        for line in self._lines:
            yield from line.values()

    def add(self, lease: Lease) -> None:
        """Put it at the end of its line."""
        self._lines[lease.ask.priority][lease.id] = lease
        self._size += 1
        self.deadlines += lease.ask.deadline_s is not None

    def remove(self, lease: Lease) -> None:
        """Take it out, wherever it stands."""
        del self._lines[lease.ask.priority][lease.id]
        self._size -= 1
        self.deadlines -= lease.ask.deadline_s is not None

    def clear(self) -> None:
        """Send everybody away."""
        for line in self._lines:
            line.clear()
        self._size = self.deadlines = 0

    def heads(self) -> Iterator[Lease]:
        """Iterate over the oldest of each priority, the most urgent priority first."""
        for line in self._lines:
            if line:
                yield next(iter(line.values()))

    def size(self, priority: Priority) -> int:
        """Return how many of that priority wait."""
        return len(self._lines[priority])

    def first(self, over_age_before: float) -> Lease:
        """Return who is next: the oldest of those who came before that time, else by priority."""
        heads = tuple(self.heads())
        oldest = min(heads, key=lambda lease: lease.since)
        return oldest if oldest.since[0] <= over_age_before else heads[0]


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
    """The tier that the move under way goes to."""
    moves_on: frozenset[DeviceName] = frozenset()
    """Exclusive devices that the transition under way touches."""
    seen: bool = False
    can_preempt: bool = False
    can_dump: bool = True
    pinned: bool = False
    preload: bool = False
    ahead_to: Tier = Tier.NONE
    """How near it was brought before anybody asked for it, and nobody has since."""
    ahead_from: float = 0.0
    """It left by `ttl`: before then it is not brought nearer unless somebody asks."""
    unasked: bool = False
    """An operator has swapped it out: it is not brought nearer before somebody asks."""
    dumped: bool = False
    """On disk, with its cache: an image that can be used only once."""
    measured: dict[DeviceName, int] = field(default_factory=dict)
    """Most bytes ever measured, on each of its devices."""
    host_measured: int = 0
    """Most bytes that its state ever took in the host tier."""

    waiting: Queue = field(default_factory=Queue)
    active: dict[LeaseId, Lease] = field(default_factory=dict)
    suspended: OrderedDict[LeaseId, Lease] = field(default_factory=OrderedDict)
    callers: int = 0
    """Active leases for whom it was brought in."""

    granted: deque[float] = field(default_factory=lambda: deque(maxlen=GROUP_MAX))
    """When the last requests were granted, oldest first."""
    moving_since: float = 0.0
    """Start of the transition under way."""
    misled: bool = False
    """The move under way takes another way than it began with: what it costs tells nothing."""
    left_for: "Engine | None" = None
    """Who has its place, or is to have it: it does not come back before that one came."""
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
    def promoting(self) -> bool:
        """Whether it is on the way from disk to host memory, and no further."""
        return self.state is EngineState.SWAPPING_IN and self.bound_for is Tier.HOST

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

    def asked(self) -> None:
        """Take in that somebody wants it now."""
        self.ahead_to = Tier.NONE
        self.ahead_from = 0.0
        self.unasked = False

    def calling(self) -> Since | None:
        """Return since when somebody wants it on its device (None: nobody does)."""
        oldest = self.ins_since if self.ins else None
        if self.waiting:
            for lease in self.waiting.heads():
                if oldest is None or lease.since < oldest:
                    oldest = lease.since
        if self.suspended:
            head = next(iter(self.suspended.values())).since
            if oldest is None or head < oldest:
                oldest = head
        return oldest

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for it, or an operator keeps it where it is."""
        return self.pinned or self.calling() is not None

    @property
    def pressing(self) -> bool:
        """Whether anything but batch work waits for it, to begin or to go on."""
        batch = Priority.BATCH
        waits = len(self.waiting) > self.waiting.size(batch)
        return (
            bool(self.ins)
            or waits
            or any(one.ask.priority is not batch for one in self.suspended.values())
        )

    @property
    def has_slot(self) -> bool:
        """Whether it may be given one more request."""
        return self.spec.slots is None or len(self.active) < self.spec.slots

    def leases(self) -> Iterator[Lease]:
        """Iterate over a copy of the leases that have been granted, running ones first."""
        yield from tuple(self.active.values())
        yield from tuple(self.suspended.values())
