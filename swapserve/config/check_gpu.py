"""What is refused of GPUs before anything starts: each with the reason, and with what to do.

The reasons are the CUDA driver's limits. Its checkpoint supports neither managed memory (UVM) nor
memory shared between processes (CUDA IPC) and "does not attempt to keep the process in a good
state" once it meets some, so such an engine would be lost at its first swap.

Sources: NVIDIA/cuda-checkpoint, README, "Functionality" (UVM, IPC); CRIU, plugins/cuda/README.md,
"Known Limitations" (UVM, MIG, MPS).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from swapserve.config.machine import find_binary
from swapserve.config.models import Read
from swapserve.config.nodes import Problems
from swapserve.config.probes import driver_version, probes_path, read_probes, shown
from swapserve.config.reader import Section
from swapserve.config.recipes import launch_argv, launch_env
from swapserve.config.schema import DeviceConfig, KeeperConfig, ModelConfig
from swapserve.ids import DeviceName
from swapserve.states import Tier

UUID = re.compile(r"(GPU|MIG)-[0-9a-f]+(-[0-9a-f]+)*")
"""What NVML and `nvidia-smi -L` print, but for the lengths of its groups."""
DRIVER_MECHANISMS = ("checkpoint", "lean")
"""Those in which the CUDA driver moves state."""

_UNMOVABLE_ENV = {
    # ggml asks getenv() != nullptr, so "0" switches it on as well.
    # Source: ggml-org/llama.cpp, ggml/src/ggml-cuda/ggml-cuda.cu, ggml_cuda_device_malloc.
    "GGML_CUDA_ENABLE_UNIFIED_MEMORY": (
        "whatever its value, makes ggml use managed memory, which the CUDA driver cannot checkpoint"
    ),
    # Source: NVIDIA, "Multi-Process Service", Appendix: Environment Variables.
    "CUDA_MPS_PIPE_DIRECTORY": (
        "makes the engine a client of MPS, whose state the CUDA driver cannot checkpoint"
    ),
}
# One engine's ranks are the product of these. Sources: vLLM 0.32, engine/arg_utils.py;
# SGLang, "Server Arguments".
_RANKS = (
    ("--tensor-parallel-size", "-tp", "--tp-size", "--tp"),
    ("--pipeline-parallel-size", "-pp", "--pp-size", "--pp"),
    ("--prefill-context-parallel-size", "-pcp"),
    ("--data-parallel-size", "-dp", "--dp-size", "--dp"),
)


def check_devices(
    devices: Mapping[DeviceName, DeviceConfig],
    sections: Mapping[DeviceName, Section],
    problems: Problems,
) -> None:
    """Check that each GPU is named by a UUID of its own."""
    first: dict[str, DeviceName] = {}
    for name, section in sections.items():
        device = devices[name]
        key, line = f"{section.key}.uuid", section.line_of("uuid")
        if device.uuid is None:
            continue
        if device.kind != "gpu":
            found = f"{device.uuid!r} on a device of kind host"
            problems.add(line, key, found, "no uuid, or `kind: gpu`")
        elif UUID.fullmatch(device.uuid) is None:
            expected = (
                "GPU-..., as `nvidia-smi -L` prints it: the order of indices differs between tools"
            )
            problems.add(line, key, f"{device.uuid!r}", expected)
        elif device.uuid in first:
            found = f"{device.uuid}, which device {first[device.uuid]!r} has too"
            problems.add(line, key, found, "one device for each GPU: its memory is counted there")
        first.setdefault(device.uuid, name)


def check_keeper(keeper: KeeperConfig, section: Section, problems: Problems) -> None:
    """Check that what the keeper is told to use for GPUs is there."""
    tool = keeper.cuda_checkpoint
    if tool is not None and find_binary(str(tool)) is None:
        line = section.line_of("cuda_checkpoint")
        found = f"{tool}, which is not there"
        problems.add(line, "keeper.cuda_checkpoint", found, "an executable file")
    for index, path in enumerate(keeper.gpu_paths):
        if not path.exists():
            line = section.line_of("gpu_paths")
            found = f"{path}, which is not there"
            problems.add(line, f"keeper.gpu_paths[{index}]", found, "an existing file or directory")


def check_models(
    reads: Sequence[Read],
    devices: Mapping[DeviceName, DeviceConfig],
    state_dir: Path | None,
    problems: Problems,
) -> None:
    """Check of each model that what it is asked to do with GPUs can be done.

    Args:
        reads: the models.
        devices: what they run on.
        state_dir: where probes are kept; None: do not ask whether one allows what it must.
        problems: what is found is noted here.
    """
    for read in reads:
        model = read.model
        kinds = {devices[name].kind for name in model.devices}
        if kinds == {"host"}:
            _check_on_host(read, problems)
        elif kinds == {"gpu"}:
            # What others have started has arguments that nobody told us.
            for check in _ON_GPU if model.attach else (*_ON_GPU, *_AS_LAUNCHED):
                for refusal in check(model, devices):
                    _note(read, problems, refusal)
            if state_dir is not None:
                for refusal in _spread(model, probes_path(state_dir)):
                    _note(read, problems, refusal)


def uses_driver(model: ModelConfig) -> bool:
    """Whether the CUDA driver may have to move this engine's state."""
    ways = model.recipe.mechanisms if model.mechanism == "auto" else (model.mechanism,)
    return bool(model.gpus) and any(way in DRIVER_MECHANISMS for way in ways)


def ranks(model: ModelConfig) -> int | None:
    """Return over how many GPUs the command line spreads an engine; None if it does not say."""
    argv = launch_argv(model, host="", port=0)[1:]
    sizes = [_option(argv, names) for names in _RANKS]
    if model.recipe.adapter == "sglang" and "--enable-dp-attention" in argv:
        sizes[-1] = None  # its data-parallel ranks are the tensor-parallel ones
    given = [int(size) for size in sizes if size is not None and size.isdigit()]
    total = 1
    for size in given:
        total *= size
    return total if given or model.recipe.adapter in {"vllm", "sglang"} else None


class _Refusal(NamedTuple):
    field: str
    """Whose line counts."""
    at: str
    """The key below the model."""
    found: str
    expected: str


_Devices = Mapping[DeviceName, DeviceConfig]


def _note(read: Read, problems: Problems, refusal: _Refusal) -> None:
    line = read.section.line_of(refusal.field)
    problems.add(line, f"{read.section.key}.{refusal.at}", refusal.found, refusal.expected)


def _check_on_host(read: Read, problems: Problems) -> None:
    if read.model.mechanism != "auto":
        found = f"{read.model.mechanism}, for an engine on a device of kind host"
        expected = "auto: without GPU state there is nothing to choose"
        _note(read, problems, _Refusal("mechanism", "mechanism", found, expected))


def _once_each(model: ModelConfig, _devices: _Devices) -> Iterator[_Refusal]:
    if len(set(model.devices)) < len(model.devices):
        yield _Refusal("devices", "device", ", ".join(model.devices), "each GPU once")


def _visible(model: ModelConfig, _devices: _Devices) -> Iterator[_Refusal]:
    name = "CUDA_VISIBLE_DEVICES"
    if name in model.env:
        expected = "`device` alone to say it: what it uses elsewhere would not be counted"
        yield _Refusal("env", f"env.{name}", f"the value {model.env[name]!r}", expected)


def _offered(model: ModelConfig, _devices: _Devices) -> Iterator[_Refusal]:
    if model.mechanism not in {"auto", "restart", *model.recipe.mechanisms}:
        offered = ", ".join(dict.fromkeys(("auto", *model.recipe.mechanisms, "restart")))
        found = f"{model.mechanism}, which is not among the recipe's `mechanisms`"
        expected = f"one of {offered} with the recipe {model.recipe.name!r}, or another recipe"
        yield _Refusal("mechanism", "mechanism", found, expected)


def _whole_gpus(model: ModelConfig, devices: _Devices) -> Iterator[_Refusal]:
    split = [name for name in model.devices if (devices[name].uuid or "").startswith("MIG-")]
    if split and uses_driver(model):
        found = f"{model.mechanism} on {', '.join(split)}, an instance of MIG"
        expected = (
            "a whole GPU (`nvidia-smi -mig 0`): the CUDA driver cannot checkpoint state on a MIG"
            f" instance; or {_other_way(model)}"
        )
        yield _Refusal("devices", "device", found, expected)


def _movable_env(model: ModelConfig, _devices: _Devices) -> Iterator[_Refusal]:
    if not uses_driver(model):
        return
    env = launch_env(model, host="", port=0)
    for name, why in _UNMOVABLE_ENV.items():
        if name in env:
            own = name in model.env
            expected = f"it not to be set, or {_other_way(model)}"
            at = ("env", f"env.{name}") if own else ("recipe", "recipe")
            yield _Refusal(*at, f"{name}, which {why}", expected)


def _movable_args(model: ModelConfig, _devices: _Devices) -> Iterator[_Refusal]:
    """Refuse weights that the GPU reads in place from pinned host memory.

    No document says that a checkpoint brings such mappings back, and host memory that was
    registered was seen not to be registered after it.

    Sources: vLLM 0.32, model_executor/offloader/uva.py and envs.py; NVIDIA/nvcf, nvsnap,
    docs/PDF-BENCH-RESULTS.md (cudaHostUnregister fails after a restore).
    """
    if model.recipe.adapter != "vllm" or not uses_driver(model):
        return
    argv = launch_argv(model, host="", port=0)
    amount = _option(argv, ("--cpu-offload-gb",))
    off = launch_env(model, host="", port=0).get("VLLM_WEIGHT_OFFLOADING_DISABLE_UVA") == "1"
    by_copies = off or _option(argv, ("--offload-backend",)) == "prefetch"
    if amount is not None and _number(amount) != 0 and not by_copies:
        found = (
            f"--cpu-offload-gb {amount}: vLLM maps weights in host memory into the GPU (UVA), and"
            " nothing shows that a checkpoint brings such mappings back"
        )
        expected = (
            "env VLLM_WEIGHT_OFFLOADING_DISABLE_UVA: 1 (and --enforce-eager), no such argument, or"
            f" {_other_way(model)}"
        )
        yield _Refusal("args", "args", found, expected)


def _as_many_gpus(model: ModelConfig, _devices: _Devices) -> Iterator[_Refusal]:
    # Nobody shows us the command line of an engine that others have started.
    size, gpus = None if model.attach else ranks(model), len(model.gpus)
    if size is not None and size != gpus:
        found = f"a command line for {_count(size)} on {_count(gpus)}"
        expected = (
            f"`device` with {_count(size)}, or --tensor-parallel-size {gpus} (times pipeline and"
            " data parallel sizes) in `args`"
        )
        yield _Refusal("args" if model.args else "devices", "args", found, expected)


def _disk_in_sandbox(model: ModelConfig, _devices: _Devices) -> Iterator[_Refusal]:
    if Tier.DISK not in model.tiers or model.sandbox:
        return
    expected = "host or none: CRIU brings back only what ran in a sandbox"
    if model.launch == "container":
        yield _Refusal("tiers", "tiers", "disk, for a container", expected)
    else:
        found = "disk, with `sandbox: false`"
        yield _Refusal("tiers", "tiers", found, f"{expected}; or `sandbox: true`")


def _room_in_ram(model: ModelConfig, devices: _Devices) -> Iterator[_Refusal]:
    if Tier.HOST not in model.tiers or model.mechanism in {"restart", "deep_sleep"}:
        return
    if model.memory_bytes is None:
        return
    need = model.memory_bytes * len(model.gpus)
    room = devices[model.ram].memory_bytes if model.ram is not None else 0
    if need > room:
        found = f"host, which takes {need} bytes of RAM; device {model.ram!r} has {room}"
        expected = "a device of kind host with that much memory, or mechanism: restart"
        yield _Refusal("tiers", "tiers", found, expected)


_Checks = tuple[Callable[[ModelConfig, _Devices], Iterator[_Refusal]], ...]
_ON_GPU: _Checks = (_once_each, _offered, _whole_gpus, _room_in_ram)
_AS_LAUNCHED: _Checks = (_visible, _movable_env, _movable_args, _as_many_gpus, _disk_in_sandbox)


def _spread(model: ModelConfig, path: Path) -> Iterator[_Refusal]:
    """Refuse the driver for an engine on several GPUs, unless it was shown to work.

    Its processes share memory (CUDA IPC) or talk through NCCL, both of which checkpoints are known
    to fail or hang on. Sources: NVIDIA/cuda-checkpoint, README; NVIDIA/nccl pull request 2340.
    """
    if len(model.gpus) == 1 or not uses_driver(model):
        return
    why = _not_shown(model, path)
    if why:
        found = f"{model.mechanism} on {len(model.gpus)} GPUs: {why}"
        shows = (
            "" if model.attach else f", or a probe that shows it (`swapserve probe {model.name}`)"
        )
        expected = (
            f"{_other_way(model)}{shows}: memory that processes share over CUDA IPC, and NCCL, are"
            " what the CUDA driver's checkpoint fails on"
        )
        yield _Refusal("mechanism", "mechanism", found, expected)


def _not_shown(model: ModelConfig, path: Path) -> str:
    """Return why no probe allows it; empty if one does."""
    try:
        probes = read_probes(path)
    except (OSError, ValueError) as error:
        return f"{path} cannot be read ({error})"
    driver = driver_version()
    probe = shown(probes, model, driver)
    if probe is None:
        other = shown(probes, model, None)
        if other is not None:
            return f"it was probed with driver {other.driver}, and this one is {driver}"
        return f"{path} has no probe of it with this command line"
    return "" if probe.works else f"a probe has shown that it does not work: {probe.found}"


def _other_way(model: ModelConfig) -> str:
    """Return what to do without the driver."""
    for way in ("sleep", "deep_sleep"):
        if way in model.recipe.mechanisms:
            return f"`mechanism: {way}`"
    return "an engine that SwapServe starts" if model.attach else "`mechanism: restart`"


def _option(argv: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the last value of an option, given as `--name value` or `--name=value`."""
    value = None
    for index, word in enumerate(argv):
        name, equals, text = word.partition("=")
        if name.replace("_", "-") in names:  # vLLM takes both spellings
            value = text if equals else next(iter(argv[index + 1 : index + 2]), "")
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"
