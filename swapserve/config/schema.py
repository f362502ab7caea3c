"""The configuration as frozen dataclasses: every key, its type, unit and default.

`config/load.py` builds them from YAML; nothing else constructs them from user input. Sizes in
YAML may be written `8GiB`, times `30s`; here they are always bytes (int) and seconds (float).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from swapserve.config.recipes import Recipe
from swapserve.ids import DeviceName, EngineName
from swapserve.states import Tier

KeepCache = Literal["auto", "always", "never"]
BusyPolicy = Literal["preempt", "drain"]
Profile = Literal["auto", "root", "unprivileged"]
OnExit = Literal["stop", "leave"]

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The front door."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    max_body_bytes: int = 64 << 20
    queue_limit: int = 256
    """Requests that may wait for one engine; one more gets 429."""
    queue_timeout_s: float = 600.0
    """Longest time a request waits for its engine before 503."""
    headers_after_s: float = 1.0
    """A waiting stream gets its 200 and headers after this time."""
    keepalive_s: float = 5.0
    """Gap after which a silent stream gets an SSE comment while its engine is away."""
    user: str | None = None
    """Account the daemon becomes when started by root (None: stay, with all capabilities dropped)."""
    on_exit: OnExit = "stop"
    """What a clean shutdown does with the engines; a killed daemon always leaves them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathsConfig:
    """Where things are kept. Defaults depend on the profile; see `load.default_paths`."""

    state_dir: Path
    """Daemon's journal and footprints (`daemon/`), keeper's records (`keeper/`), logs (`logs/`)."""
    image_dir: Path
    """Checkpoint images (mode 0700: they hold prompts)."""
    run_dir: Path
    """Sockets, pid files, sandbox roots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperConfig:
    """The privileged part."""

    profile: Profile = "auto"
    subnet: str = "10.231.0.0/16"
    """Private range from which every sandbox gets a /30."""
    criu: Path | None = None
    """CRIU binary (None: PATH, then the private prefix that scripts/host-setup makes)."""
    huge_pages: bool = False
    """Switch transparent huge pages to `always` while a restore runs (host-wide, put back after)."""
    dump_timeout_s: float = 300.0
    restore_timeout_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesConfig:
    """Checkpoint images on disk."""

    budget_bytes: int = 100 * GIB
    min_free_bytes: int = 2 * GIB
    """Free space of the file system that images never take."""
    canary_rate: float = 0.05
    """Share of golden restores checked with the canary; the first one always is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """One pool of memory that engines are placed on."""

    name: DeviceName
    kind: Literal["host", "gpu"] = "host"
    memory_bytes: int
    """Budget that all engines on it share."""
    uuid: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingConfig:
    """How engines take turns."""

    busy: BusyPolicy = "preempt"
    """What happens to a busy victim: swapped out in mid-request, or waited for."""
    quantum_s: float = 10.0
    """Least time a busy engine runs before it may be preempted."""
    max_wait_s: float = 30.0
    """A waiter older than this overrides quantum and drain."""
    ttl_check_s: float = 1.0
    retry_backoff_s: float = 2.0
    """First pause after a failed start; doubles up to a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model and the engine that serves it."""

    name: EngineName
    recipe: Recipe
    aliases: tuple[str, ...] = ()
    model: str | None = None
    """Model file or directory (absolute after loading), if the recipe takes one."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Values for the recipe's placeholders, such as `python`, `binary`."""
    args: tuple[str, ...] = ()
    """Extra command-line arguments, after the recipe's."""
    env: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None
    """Port the engine binds (None: the recipe's inside a sandbox, a free one without)."""
    device: DeviceName
    memory_bytes: int | None = None
    """Footprint on the device (None: measured and remembered)."""
    tiers: tuple[Tier, ...] = (Tier.DISK,)
    """Tiers it may be swapped out to; `none` is always possible."""
    keep_cache: KeepCache = "auto"
    ttl_s: float | None = None
    """Idle time after which it is swapped out."""
    preload: bool = False
    pin: bool = False
    sandbox: bool = True
    golden: bool = True
    """Make and use a golden image."""
    start_timeout_s: float | None = None
    stop_grace_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything, validated."""

    source: Path
    server: ServerConfig
    paths: PathsConfig
    keeper: KeeperConfig
    images: ImagesConfig
    scheduling: SchedulingConfig
    devices: Mapping[DeviceName, DeviceConfig]
    models: Mapping[EngineName, ModelConfig]
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
