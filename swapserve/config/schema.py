"""The configuration as frozen dataclasses: every key, its type, unit and default.

`config/load.py` builds them from YAML; nothing else constructs them from user input. Sizes in
YAML may be written `8GiB`, times `30s`; here they are always bytes (int) and seconds (float).
`fields.py` derives the YAML keys, `docs/configuration.md` and the JSON Schema from these classes:
`ttl_s` is the key `ttl`, and the string after an attribute is its description.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from swapserve.config.fields import Yaml
from swapserve.config.recipes import IMAGE_PATTERN, Mechanism, Recipe
from swapserve.ids import DeviceName, EngineName
from swapserve.states import Tier

KeepCache = Literal["auto", "always", "never"]
Profile = Literal["auto", "root", "unprivileged"]
OnExit = Literal["stop", "leave"]
MechanismChoice = Literal["auto", Mechanism]
ContainerRuntime = Literal["auto", "podman", "docker", "apptainer"]
Launch = Literal["process", "container", "attached"]
PriorityName = Literal["urgent", "interactive", "batch"]

GIB = 1 << 30
NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9._:/-]*"
POLICY_PATTERN = "[a-z0-9][a-z0-9-]*"
POLICIES = (
    "adaptive",
    "lru",
    "lfu",
    "fifo-drain",
    "lru-drain",
    "time-slice-drain",
    "static",
)
"""Those that come with the program; further ones are plugins."""
REMOVED = {
    "scheduling.busy": "`policy`: `adaptive` where it was preempt, `lru-drain` for drain",
}
"""Keys of earlier versions, and what to write now."""
DEVICE_PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]*"
ATTACH_PATTERN = "pid:[1-9][0-9]*|port:[1-9][0-9]*|container:[A-Za-z0-9][A-Za-z0-9_.-]*"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One entry of `server.api_keys` as a mapping: a key, and whose it is."""

    secret: Annotated[str, Yaml(key="key", kind="secret")]
    """The key itself."""
    name: Annotated[str, Yaml(pattern=NAME_PATTERN, default="`key-N` for the Nth entry")]
    """Whose it is: events and predictions know it by this name."""
    priority: PriorityName = "interactive"
    """Priority of its requests, and the most that they may ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The front door."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs `api_keys`."""
    port: Annotated[int, Yaml(low=0, high=65535)] = 8080
    """Port to listen on; 0 takes a free one."""
    api_keys: Annotated[tuple[ApiKey, ...], Yaml(kind="api_keys")] = ()
    """Keys that clients must send as `Authorization: Bearer`; none: no key is asked for."""
    admin_keys: Annotated[tuple[str, ...], Yaml(kind="secrets")] = ()
    """Keys for the admin API; none: only callers on this machine may use it."""
    max_body_bytes: Annotated[int, Yaml(low=1024)] = 64 << 20
    """Largest request body; a larger one gets 413."""
    queue_limit: Annotated[int, Yaml(low=1)] = 256
    """Requests that may wait for one engine; one more gets 429."""
    queue_limit_total: Annotated[int, Yaml(low=1)] = 4096
    """Requests that may wait for all engines together."""
    queue_timeout_s: Annotated[float, Yaml(low=1)] = 600.0
    """Longest time a request waits for its engine before 503."""
    headers_after_s: float = 1.0
    """A waiting stream gets its 200 and headers after this time."""
    keepalive_s: Annotated[float, Yaml(low=0.1)] = 5.0
    """Gap after which a silent stream gets an SSE comment while its engine is away."""
    user: str | None = None
    """Account the daemon becomes when started by root (none: stay, all capabilities dropped)."""
    on_exit: OnExit = "stop"
    """What a clean shutdown does with the engines; a killed daemon always leaves them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathsConfig:
    """Where things are kept; the defaults depend on the profile."""

    state_dir: Annotated[
        Path, Yaml(default="`/var/lib/swapserve`; unprivileged: `$XDG_STATE_HOME/swapserve`")
    ]
    """Journal and footprints (`daemon/`), keeper's records (`keeper/`), `logs/`, `models/`."""
    image_dir: Annotated[
        Path, Yaml(default="`/var/lib/swapserve/images`; unprivileged: `$XDG_CACHE_HOME/swapserve`")
    ]
    """Checkpoint images (mode 0700: they hold prompts)."""
    run_dir: Annotated[
        Path, Yaml(default="`/run/swapserve`; unprivileged: `$XDG_RUNTIME_DIR/swapserve`")
    ]
    """Sockets, pid files, sandbox roots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperConfig:
    """The privileged part."""

    profile: Profile = "auto"
    """Rights to work with: `root` can do everything, `unprivileged` has no CRIU, no sandbox."""
    subnet: str = "10.231.0.0/16"
    """Private range from which every sandbox gets a /30."""
    criu: Path | None = None
    """CRIU binary (none: PATH, then the private prefix that scripts/host-setup makes)."""
    huge_pages: bool = False
    """Switch transparent huge pages to `always` while a restore runs (host-wide, put back)."""
    dump_timeout_s: Annotated[float, Yaml(low=1)] = 300.0
    """Longest CRIU dump."""
    restore_timeout_s: Annotated[float, Yaml(low=1)] = 300.0
    """Longest CRIU restore."""
    cuda_lock_timeout_s: Annotated[float, Yaml(low=0.1)] = 10.0
    """Longest wait for the GPU work in flight of one process before its state is moved."""
    cuda_rate_bytes: Annotated[int, Yaml(low=1)] = 512 << 20
    """Slowest rate, per second, at which moving GPU state is not yet taken for hung."""
    gpu_margin_bytes: int = 512 << 20
    """GPU memory that must be left over, by NVML's reading, when GPU state comes back."""
    gpu_paths: tuple[Path, ...] = ()
    """Further host paths that engines on a GPU are shown, writable (/dev/nvidia* are by itself)."""
    cuda_checkpoint: Path | None = None
    """NVIDIA's cuda-checkpoint, for drivers without the API (none: PATH)."""
    container_runtime: ContainerRuntime = "auto"
    """What runs engines with an `image`; `auto` takes the first of the three that answers."""
    container_program: Path | None = None
    """Its program, for a `container_runtime` other than `auto` (none: PATH)."""
    container_timeout_s: Annotated[float, Yaml(low=1)] = 120.0
    """Longest call of the container runtime, such as making and starting a container."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesConfig:
    """Checkpoint images on disk."""

    budget_bytes: int = 100 * GIB
    """Space that all images together may take."""
    min_free_bytes: int = 2 * GIB
    """Free space of the file system that images never take."""
    canary_rate: Annotated[float, Yaml(low=0, high=1)] = 0.05
    """Share of golden restores checked with the canary; the first one always is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """A pool of memory that engines are placed on; the key is its name.

    Without any, there is one device `host`.
    """

    name: Annotated[DeviceName, Yaml(skip=True)]
    kind: Literal["host", "gpu"] = "host"
    """RAM of this machine, or a GPU. With GPUs, RAM also holds the state of engines swapped out."""
    memory_bytes: Annotated[int, Yaml(low=1, default="80 % of RAM; required for a GPU")]
    """Budget that all engines on it share."""
    uuid: str | None = None
    """The GPU, as `nvidia-smi -L` names it; required for a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingConfig:
    """How engines take turns."""

    policy: Annotated[str, Yaml(pattern=POLICY_PATTERN)] = "adaptive"
    """Who comes, who leaves, and when: `adaptive`, `lru`, `lfu`, `fifo-drain`, `lru-drain`,
    `time-slice-drain`, `static`, or a plugin's name."""
    quantum_s: Annotated[float | None, Yaml(low=0.1)] = None
    """Least time a busy engine runs before it may be preempted (none: from the swap's cost)."""
    overhead_share: Annotated[float, Yaml(low=0, high=0.9)] = 0.2
    """Share of a device's time that swaps under contention may take."""
    max_wait_s: float = 30.0
    """A request that has waited longer comes before all others, and no quantum holds it up."""
    slo_ttft_s: Annotated[float, Yaml(low=0.01)] = 10.0
    """Time in which an interactive request should get its first token."""
    slo_itl_s: Annotated[float, Yaml(low=0.001)] = 0.2
    """Longest mean gap between tokens that a reader does not mind."""
    look_ahead: bool = True
    """Bring engines nearer before they are asked for, into memory that is free."""
    retry_backoff_s: Annotated[float, Yaml(low=0.01)] = 2.0
    """First pause after a failed start; doubles up to a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model and the engine that serves it."""

    name: Annotated[EngineName, Yaml(pattern=NAME_PATTERN)]
    """What clients send as `model`."""
    recipe: Annotated[Recipe, Yaml(kind="text")]
    """How its engine is run: `vllm`, `llamacpp`, `generic`, or a file of `recipe_dirs`."""
    aliases: Annotated[tuple[str, ...], Yaml(pattern=NAME_PATTERN)] = ()
    """Further names for it."""
    model: str | None = None
    """Model file or directory, or a hub id (`org/name`) fetched with `swapserve pull`."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Values for the recipe's placeholders, such as `python`, `binary`."""
    args: tuple[str, ...] = ()
    """Extra command-line arguments, after the recipe's; may use the recipe's placeholders."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables, over the recipe's; may use the recipe's placeholders."""
    image: Annotated[str | None, Yaml(pattern=IMAGE_PATTERN)] = None
    """Container image to run it in, in place of the recipe's; see the recipe's `image`."""
    attach: Annotated[str | None, Yaml(pattern=ATTACH_PATTERN)] = None
    """An engine that runs already, `pid:N`, `port:N` or `container:NAME`: never started or ended,
    only suspended and resumed. The recipe says how to talk to it; `name` is what it answers to."""
    port: Annotated[int | None, Yaml(low=1, high=65535)] = None
    """Port the engine binds (none: the recipe's inside a sandbox, a free one without)."""
    devices: Annotated[
        tuple[DeviceName, ...],
        Yaml(key="device", kind="names", default="the only GPU, or the only device"),
    ]
    """Device it runs on; a list of GPUs for an engine that is spread over several."""
    memory_bytes: Annotated[int | None, Yaml(low=1)] = None
    """Footprint on each of its devices (none: measured and remembered)."""
    tiers: Annotated[
        tuple[Tier, ...],
        Yaml(choices=("host", "disk", "none"), default="disk, and on a GPU host before it"),
    ] = (Tier.DISK,)
    """Tiers it may be swapped out to; `none` is always possible."""
    mechanism: MechanismChoice = "auto"
    """How an engine on a GPU gives its memory back; `auto` measures and takes the cheapest."""
    keep_cache: KeepCache = "auto"
    """Whether an idle engine is dumped with its cache (`always`) or dropped (`never`)."""
    ttl_s: Annotated[float | None, Yaml(low=0.1)] = None
    """Idle time after which it is swapped out (none: only when another engine needs the room)."""
    min_resident_s: float = 0.0
    """Once brought in it stays at least so long, unless a request has waited for `max_wait`."""
    slots: Annotated[int | None, Yaml(low=1)] = None
    """Requests that it answers at the same time, such as llama-server's `-np` or vLLM's
    `--max-num-seqs`; further ones wait in the queue, not in the engine (none: no limit)."""
    queue_limit: Annotated[int | None, Yaml(low=1)] = None
    """Requests that may wait for it (none: `server.queue_limit`)."""
    deadline_s: Annotated[float | None, Yaml(low=0.01)] = None
    """Time in which an answer has to begin; a request that cannot meet it is refused early. The
    header `x-swapserve-deadline` sets another one (none: no deadline)."""
    slo_ttft_s: Annotated[float | None, Yaml(low=0.01)] = None
    """The same as `scheduling.slo_ttft`, for this model."""
    slo_itl_s: Annotated[float | None, Yaml(low=0.001)] = None
    """The same as `scheduling.slo_itl`, for this model."""
    preload: bool = False
    """Bring it in when the daemon starts."""
    pin: bool = False
    """Never swap it out for another engine."""
    sandbox: bool = True
    """Own namespaces; without them the disk tier is off."""
    golden: bool = True
    """Make and use a golden image."""
    start_timeout_s: Annotated[float | None, Yaml(low=1)] = None
    """Longest cold start (none: the recipe's)."""
    stop_grace_s: float | None = None
    """Time between TERM and KILL (none: the recipe's)."""
    executable: Annotated[Path | None, Yaml(skip=True)] = None
    """The first word of the command line, as found while loading."""
    gpus: Annotated[tuple[str, ...], Yaml(skip=True)] = ()
    """UUIDs of its GPUs, in the order of `devices`; empty on a device of kind `host`."""
    ram: Annotated[DeviceName | None, Yaml(skip=True)] = None
    """Device of kind `host` that its GPU state is put on in the host tier; None without GPUs."""

    @property
    def device(self) -> DeviceName:
        """Its first device."""
        return self.devices[0]

    @property
    def container_image(self) -> str | None:
        """Image it runs in, None if it is a process of this machine or was not started by us."""
        return None if self.attach else self.image or self.recipe.image

    @property
    def launch(self) -> Launch:
        """How it comes to run."""
        if self.attach:
            return "attached"
        return "container" if self.container_image else "process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything, validated."""

    source: Annotated[Path, Yaml(skip=True)]
    server: ServerConfig
    paths: PathsConfig
    keeper: KeeperConfig
    images: ImagesConfig
    scheduling: SchedulingConfig
    devices: Mapping[DeviceName, DeviceConfig]
    models: Mapping[EngineName, ModelConfig]
    recipe_dirs: tuple[Path, ...] = ()
    """Directories with recipes of your own; they win over the shipped ones of the same name."""
    log_format: Annotated[Literal["text", "json"], Yaml(section="log", key="format")] = "text"
    """Lines for people or for machines."""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Yaml(section="log", key="level")
    ] = "info"
    """Least important lines that are written."""
