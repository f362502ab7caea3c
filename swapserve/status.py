"""Snapshots of what is where, as the admin API, CLI, metrics and `/v1/models` show them."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from swapserve.states import EngineState, Tier

MoveKind = Literal["cold_start", "swap_in", "promote", "swap_out", "stop"]
"""`promote`: from disk to host memory, ahead of demand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSummary:
    """One finished transition. Seconds by phase; `unaccounted_s` is what no phase explains."""

    kind: MoveKind
    mechanism: str
    """How it came or left: `cold`, `golden`, `live`, `resume`, `checkpoint`, `discard`, ..."""
    from_tier: Tier
    to_tier: Tier
    cause: str
    seconds: float
    phases: dict[str, float]
    unaccounted_s: float
    bytes: int
    finished_at: float
    """Wall clock, seconds since the epoch."""
    error: str | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SwapSummary":
        """Build from the plain form."""
        tiers = {"from_tier": Tier(data["from_tier"]), "to_tier": Tier(data["to_tier"])}
        return cls(**{**data, **tiers})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What the scheduler expects of one engine now; times and rates are predictions."""

    queued: dict[str, int] = field(default_factory=dict)
    """Requests that wait, by priority."""
    wait_s: float = 0.0
    """Time that a request which came now would wait for it."""
    arrivals_per_s: float = 0.0
    """Requests that come for it."""
    out_s: dict[str, float] = field(default_factory=dict)
    """Cost of a swap out while idle, by the tier it would go to."""
    in_s: dict[str, float] = field(default_factory=dict)
    """Cost of a swap in, by the tier it would come from; `none` is a cold start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """One engine now."""

    name: str
    aliases: tuple[str, ...]
    recipe: str
    devices: tuple[str, ...]
    mechanism: str | None
    """How it gives GPU memory back, as configured; None without GPU."""
    state: EngineState
    tier: Tier
    since: float
    """Wall clock at which it entered this state."""
    footprint_bytes: int | None
    footprint_source: Literal["configured", "measured", "unknown"]
    host_bytes: int
    """GPU state that rests in host memory now."""
    active: int
    waiting: int
    suspended: int
    pinned: bool
    golden_image: bool
    image_bytes: int
    restored_from: str | None
    address: str | None
    pid: int | None
    last_swap: SwapSummary | None
    error: str | None
    outlook: Outlook = field(default_factory=Outlook)

    def as_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "EngineStatus":
        """Build from the plain form."""
        last = data["last_swap"]
        changed = {
            "aliases": tuple(data["aliases"]),
            "devices": tuple(data["devices"]),
            "state": EngineState(data["state"]),
            "tier": Tier(data["tier"]),
            "last_swap": None if last is None else SwapSummary.from_json(last),
            "outlook": Outlook(**data["outlook"]),
        }
        return cls(**{**data, **changed})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatus:
    """One pool of memory now; reserved + committed never exceed capacity."""

    name: str
    kind: str
    capacity_bytes: int
    reserved_bytes: int
    committed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Everything."""

    version: str
    pid: int
    uptime_s: float
    profile: str
    keeper_pid: int
    policy: str = ""
    """Name of the scheduling policy."""
    forecasts: int = 0
    """Requests whose run time was forecast and is known by now."""
    forecasts_met: int = 0
    """Those of them that took no longer than the 90th percentile of their forecast."""
    devices: tuple[DeviceStatus, ...] = field(default_factory=tuple)
    engines: tuple[EngineStatus, ...] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Status":
        """Build from the plain form; raises KeyError, TypeError or ValueError on another one."""
        changed = {
            "devices": tuple(DeviceStatus(**device) for device in data["devices"]),
            "engines": tuple(EngineStatus.from_json(engine) for engine in data["engines"]),
        }
        return cls(**{**data, **changed})
