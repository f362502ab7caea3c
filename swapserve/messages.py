"""What the pure scheduler core is told (events) and what it asks for (effects).

The way of one swap: `LeaseRequested(b)` → `SwapOut(a)`, later `EngineLeft(a)` → `BringIn(b)`,
later `EngineReady(b)` → `GrantLease`. The runner carries effects out and feeds their outcome
back as events; every `BringIn` is answered by `EngineReady` or `TransitionFailed`, every
`SwapOut` by `EngineLeft` or `TransitionFailed`, every `StopEngine` by `EngineLeft`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from swapserve.errors import SwapServeError
from swapserve.ids import CommandId, DeviceName, EngineName, LeaseId
from swapserve.states import EngineState, Priority, Tier

Footprint = Mapping[DeviceName, int]
"""Bytes by device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a request asks of its engine, as far as the front door can tell."""

    priority: Priority = Priority.INTERACTIVE
    deadline_s: float | None = None
    """Seconds after its arrival by which the answer must begin; None: no such wish."""
    tokens_in: float = 1.0
    """Length of its prompt, estimated from the body's size."""
    tokens_max: int | None = None
    """Longest answer that it allows."""
    key: str = ""
    """Name of the API key it came with; empty without keys."""
    conversation: int = 0
    """Hash of how its prompt begins; the next turn of a chat has the same. 0: unknown."""
    streams: bool = False
    """Whether a `LeaseBegan` will tell when its first token has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What a request that was answered to its end has taken, for predictions to learn from.

    Times leave out the queue and every suspension; None: not known (no stream, or a suspension
    fell into that part).
    """

    tokens_in: float
    tokens_out: float
    prefill_s: float | None
    """From its grant to the first token."""
    decode_s: float | None
    """From the first token to the last."""


Verb = Literal["swap_in", "swap_out", "start", "stop", "pin", "unpin"]
"""What an operator can ask for."""

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSeen:
    """An engine and where it is now; sent once for each when the daemon starts."""

    engine: EngineName
    state: EngineState
    tier: Tier
    footprint: Footprint | None
    """Last known use of each of its devices while it serves; None if nobody knows."""
    can_preempt: bool
    """Whether it survives a swap out with requests in flight (live images, or the host tier)."""
    can_dump: bool = True
    """Whether that holds for the way to disk too; else only for the host tier."""
    host_bytes: int = 0
    """What it holds of its RAM device in the host tier."""
    residue: Footprint = field(default_factory=dict)
    """What an engine that is off its devices still holds there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequested:
    """A request wants its engine."""

    lease: LeaseId
    engine: EngineName
    ask: Ask = field(default_factory=Ask)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseBegan:
    """The first token of a stream has come: somebody has something to read."""

    lease: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseEnded:
    """A request is over: answered, failed, refused or its client left (in any lease state)."""

    lease: LeaseId
    used: Used | None = None
    """Only of one that was answered to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReady:
    """A `BringIn` succeeded, or a `SwapOut` was given up with the engine still serving."""

    engine: EngineName
    footprint: Footprint
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLeft:
    """The engine is off its device and the bytes were seen free."""

    engine: EngineName
    tier: Tier
    seconds: float
    leases_lost: bool = False
    """Its process is gone for good, so suspended and active leases cannot continue."""
    cache_kept: bool = False
    """Whether what it has computed of prompts is still there when it comes back."""
    host_bytes: int = 0
    """What it now holds of its RAM device (host tier)."""
    residue: Footprint = field(default_factory=dict)
    """What it still holds of its devices: an engine that only sleeps keeps its CUDA contexts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionFailed:
    """A transition ended badly. `tier` DEVICE: bytes may still be in use there.

    A bring-in that was refused before anything was tried (a GPU has less room than planned) ends
    with `SWAPPED_OUT`, the tier it was on, and no lease lost: it is tried again after a pause.
    """

    engine: EngineName
    error: SwapServeError
    state: EngineState
    tier: Tier
    leases_lost: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineExited:
    """The process ended without being asked to; device bytes are free.

    In the middle of a transition it does not replace the transition's own answer.
    """

    engine: EngineName
    error: SwapServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class FootprintMeasured:
    """New reading of what a resident engine holds on its device."""

    engine: EngineName
    footprint: Footprint


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandGiven:
    """An operator asks for something; answered by `CommandDone` exactly once."""

    command: CommandId
    verb: Verb
    engine: EngineName


@dataclass(frozen=True, slots=True)
class Tick:
    """The timer that the core last asked for went off."""


@dataclass(frozen=True, slots=True)
class ShutdownAsked:
    """Refuse waiting leases, start nothing new."""


Event = (
    EngineSeen
    | LeaseRequested
    | LeaseBegan
    | LeaseEnded
    | EngineReady
    | EngineLeft
    | TransitionFailed
    | EngineExited
    | FootprintMeasured
    | CommandGiven
    | Tick
    | ShutdownAsked
)

# --------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True, kw_only=True)
class BringIn:
    """Bring the engine onto its device, or only nearer to it.

    `to` DEVICE: resume it, restore an image, or cold start; answered by `EngineReady`. `to` HOST
    (one whose state is on disk, ahead of demand): restore the image and leave the engine
    suspended, with its GPU state in host memory; answered by `EngineLeft` with tier HOST.
    `TransitionFailed` answers either.
    """

    engine: EngineName
    to: Tier = Tier.DEVICE
    cause: str = "demand"
    """`demand`: somebody asked; `preload`: configured; `ahead`: it is likely that somebody will."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapOut:
    """Move the engine off its devices, or one that is off already further down.

    `in_flight` counts the requests that are inside: those that become suspended, and those that
    were suspended before in an engine that is off already. They must survive the move.
    """

    engine: EngineName
    in_flight: int
    cause: str
    to: Tier
    """Highest tier it may go to: HOST only if RAM was reserved for all that it holds."""
    cache_s: float = 0.0
    """Seconds of prefill that its cache is expected to save, if it is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopEngine:
    """End the engine's process for good (operator)."""

    engine: EngineName


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Show the engine as draining (True) or as ready again (False); no work is done."""

    engine: EngineName
    on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantLease:
    """Let the request go to its engine now."""

    lease: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseLease:
    """Tell the request why it cannot be served; the lease is over (no LeaseEnded needed)."""

    lease: LeaseId
    error: SwapServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendLease:
    """The request's engine is going away in mid-answer; its stream stays open."""

    lease: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeLease:
    """The suspended request's engine is back."""

    lease: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseLease:
    """The active or suspended request cannot continue; the lease is over."""

    lease: LeaseId
    error: SwapServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandDone:
    """The operator's command ended (`error` None: as asked)."""

    command: CommandId
    error: SwapServeError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SetTimer:
    """Send a `Tick` at this monotonic time; replaces the previous one (None: no timer)."""

    at: float | None


Effect = (
    BringIn
    | SwapOut
    | StopEngine
    | Drain
    | GrantLease
    | RefuseLease
    | SuspendLease
    | ResumeLease
    | LoseLease
    | CommandDone
    | SetTimer
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One pool of memory as the core sees it."""

    name: DeviceName
    capacity_bytes: int
    exclusive: bool = False
    """A GPU: at most one transition of an engine on it at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One engine as the core sees it: configuration only."""

    name: EngineName
    devices: tuple[DeviceName, ...]
    """All of them are needed at the same time."""
    memory_bytes: int | None
    """On each of its devices; None: measured."""
    pin: bool
    preload: bool
    ttl_s: float | None
    ram: DeviceName | None = None
    """Where its state rests in the host tier; None: it has no host tier."""
    slots: int | None = None
    """Requests that it answers at the same time; others wait here, not in it. None: no limit."""
    queue_limit: int | None = None
    """Requests that may wait for it; None: `Rules.queue_limit`."""
    min_resident_s: float = 0.0
    """Once brought in it stays at least so long, unless somebody has waited for `max_wait`."""
    slo_ttft_s: float | None = None
    """Time in which an interactive request for it should get its first token; None: the rules'."""
    slo_itl_s: float | None = None
    """Longest mean gap between tokens that a reader does not mind; None: the rules'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The figures that a policy works with, the same for every policy."""

    max_wait_s: float
    """A wish older than this comes before all others, and no quantum holds it up."""
    queue_limit: int
    """Requests that may wait for one engine."""
    queue_timeout_s: float
    retry_backoff_s: float
    quantum_s: float | None = None
    """Least time a busy engine runs before it is preempted; None: from the cost of the swap."""
    overhead_share: float = 0.2
    """Share of a device's time that swaps under contention may take."""
    queue_limit_total: int = 1_000_000
    """Requests that may wait for all engines together."""
    slo_ttft_s: float = 10.0
    slo_itl_s: float = 0.2
    look_ahead: bool = True
    """Bring engines nearer before they are asked for, where memory is free."""
    wall_offset_s: float = 0.0
    """Unix time when the monotonic clock was zero: demand depends on the hour."""
