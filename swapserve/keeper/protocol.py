"""What daemon and keeper say to each other: JSON lines over a Unix socket.

A request is `{"id": n, "verb": "...", ...}`, its answer `{"id": n, "ok": {...}}` or
`{"id": n, "error": {"code", "message", "phase", "log_tail"}}`. Several may be under way at once.
The keeper also sends `{"event": "exited", ...}` lines at any time. A verb that was started
runs to its end even when the daemon that asked for it is gone.
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

PROTOCOL_VERSION = 3

ImageKind = Literal["live", "golden"]


class Held(StrEnum):
    """What the keeper holds of one engine (facts, not intentions)."""

    NOTHING = "nothing"
    RUNNING = "running"
    SUSPENDED = "suspended"
    """Frozen, with its GPU state in host memory."""
    LIVE_IMAGE = "live_image"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """The keeper's word on one engine.

    Attributes:
        engine: configured name.
        held: what there is of it.
        verb: the verb under way, None if none.
        pid: host pid of the engine's first process while it runs.
        address: `host:port` at which the daemon reaches it (stays the same while it is away).
        golden: whether a golden image exists whose fingerprint matches now.
        live_image_bytes, golden_image_bytes: size on disk, 0 if there is none.
        restored_from: image kind of the present process, None after a cold start.
        can_dump: whether CRIU images are possible for this engine here.
        canary: the record stored with the golden image, as the adapter wrote it.
        canary_passed: whether the golden image has passed its canary since it was made.
        owned: whether it is ours to end (False: it was attached to, not started).
        can_suspend: whether its GPU state can be moved to host memory.
        why_not: why not, in words; empty if it can.
        host_bytes: GPU state that rests in host memory now, 0 unless it is suspended.
    """

    engine: str
    held: Held
    verb: str | None
    pid: int | None
    address: str | None
    golden: bool
    live_image_bytes: int
    golden_image_bytes: int
    restored_from: ImageKind | None
    can_dump: bool
    canary: dict[str, Any] | None = None
    canary_passed: bool = False
    owned: bool = True
    can_suspend: bool = False
    why_not: str = ""
    host_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the wire form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Holding":
        """Build from the wire form; unknown keys are an error (TypeError)."""
        return cls(**{**data, "held": Held(data["held"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class VerbReport:
    """How long a verb took, by phase, and what it moved.

    Attributes:
        seconds: wall time of the whole verb in the keeper.
        phases: seconds by phase name; what is missing to `seconds` is unaccounted.
        bytes: image or GPU bytes moved, 0 if none.
    """

    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    bytes: int = 0

    @property
    def unaccounted_s(self) -> float:
        """Seconds that no phase explains."""
        return self.seconds - sum(self.phases.values())

    def as_json(self) -> dict[str, Any]:
        """Return the wire form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "VerbReport":
        """Build from the wire form."""
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """An engine's process ended without the keeper having been asked to end it."""

    engine: str
    pid: int
    status: str
    """`exit 1`, `signal SIGKILL`, or `unknown` for an adopted process that is not our child."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a running engine takes.

    Attributes:
        host_bytes: proportional share of RAM of the whole tree.
        device_bytes: GPU memory by UUID, as NVML counts it; empty without GPUs.
        dump_bytes: what a CRIU image of it would hold now.
    """

    host_bytes: int
    device_bytes: dict[str, int]
    dump_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return the wire form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Measured":
        """Build from the wire form."""
        return cls(**data)
