"""Engine states, tiers and the legal changes between them (a leaf: imports nothing of ours)."""

from enum import IntEnum, StrEnum


class EngineState(StrEnum):
    """What an engine is doing; its actor is the only writer."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    SWAPPING_OUT = "swapping_out"
    SWAPPED_OUT = "swapped_out"
    SWAPPING_IN = "swapping_in"
    STOPPING = "stopping"
    FAILED = "failed"


class Tier(StrEnum):
    """Where an engine's state rests."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    NONE = "none"


class LeaseState(StrEnum):
    """Where one request stands."""

    WAITING = "waiting"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    ENDED = "ended"


_S = EngineState

TRANSITIONS: dict[EngineState, frozenset[EngineState]] = {
    _S.STOPPED: frozenset({_S.STARTING, _S.SWAPPING_IN}),
    _S.STARTING: frozenset({_S.READY, _S.FAILED, _S.STOPPING}),
    _S.READY: frozenset({_S.DRAINING, _S.SWAPPING_OUT, _S.STOPPING, _S.FAILED}),
    _S.DRAINING: frozenset({_S.READY, _S.SWAPPING_OUT, _S.STOPPING, _S.FAILED}),
    _S.SWAPPING_OUT: frozenset({_S.SWAPPED_OUT, _S.READY, _S.FAILED}),
    # To SWAPPING_OUT: further down, from host memory to disk.
    _S.SWAPPED_OUT: frozenset(
        {_S.SWAPPING_IN, _S.SWAPPING_OUT, _S.STARTING, _S.STOPPING, _S.FAILED}
    ),
    _S.SWAPPING_IN: frozenset({_S.READY, _S.STARTING, _S.SWAPPED_OUT, _S.FAILED, _S.STOPPING}),
    _S.STOPPING: frozenset({_S.STOPPED, _S.FAILED}),
    _S.FAILED: frozenset({_S.STARTING, _S.SWAPPING_IN, _S.STOPPING, _S.STOPPED}),
}
"""Every legal change of state. A change that is not here is a bug of ours (IllegalTransition)."""

OCCUPYING = frozenset(
    {_S.STARTING, _S.READY, _S.DRAINING, _S.SWAPPING_OUT, _S.SWAPPING_IN, _S.STOPPING}
)
"""States in which an engine holds (or may hold) memory of its device."""


class Priority(IntEnum):
    """How urgent a request is; lower comes first."""

    URGENT = 0
    INTERACTIVE = 1
    BATCH = 2
