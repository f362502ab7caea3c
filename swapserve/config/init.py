"""A first configuration, commented, from what the machine has."""

import glob
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from swapserve.config.layout import Part, parts
from swapserve.config.machine import DEFAULT_SHARE, default_paths, find_binary, total_memory
from swapserve.config.reference import default_text
from swapserve.config.schema import PathsConfig
from swapserve.config.values import format_size

_MIB = 1 << 20
_GPU_REST_BYTES = 768 * _MIB
_GPU_REST_SHARE = 0.03
"""Kept free on a GPU, the larger counts: `keeper.gpu_margin` and what the driver reserves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU of this machine."""

    uuid: str
    name: str
    memory_bytes: int
    mig: bool = False
    """Whether MIG splits it into instances."""

    @property
    def budget_bytes(self) -> int:
        """What engines may use of it."""
        rest = max(_GPU_REST_BYTES, int(self.memory_bytes * _GPU_REST_SHARE))
        return max(self.memory_bytes - rest, _MIB) // _MIB * _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to run models with."""

    memory_bytes: int
    paths: PathsConfig
    gpus: tuple[Gpu, ...] = ()
    llama_server: Path | None = None
    vllm_pythons: tuple[Path, ...] = ()
    cuda: frozenset[Path] = frozenset()
    """Those of the programs above that are built for NVIDIA's GPUs."""
    gguf_files: tuple[Path, ...] = ()
    model_dirs: tuple[Path, ...] = ()
    """Hugging Face folders."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One model of the list, line by line."""

    lines: list[str]
    why_not: str = ""
    """Why it is there as a comment only."""


def look(
    *, gpus: Iterable[Gpu] = (), venvs: Iterable[Path] = (), models: Iterable[Path] = ()
) -> Machine:
    """Look for engines and models.

    Args:
        gpus: as the caller measured them.
        venvs: virtual environments that may have vLLM, besides those that scripts/setup makes.
        models: directories to search for models, besides where `swapserve pull` puts them.
    """
    paths = default_paths("auto")
    found = [path for top in (paths.state_dir / "models", *models) for path in _models(top)]
    unique = tuple(dict.fromkeys(path.absolute() for path in found))
    server = find_binary("llama-server")
    pythons = tuple(_vllm_pythons((*venvs, *_known_venvs())))
    cuda = {python for python in pythons if _torch_has_cuda(python)}
    if server is not None and _llama_has_cuda(server):
        cuda.add(server)
    return Machine(
        memory_bytes=total_memory(),
        paths=paths,
        gpus=tuple(gpus),
        llama_server=server,
        vllm_pythons=pythons,
        cuda=frozenset(cuda),
        gguf_files=tuple(path for path in unique if path.suffix == ".gguf"),
        model_dirs=tuple(path for path in unique if path.suffix != ".gguf"),
    )


def starter(machine: Machine) -> str:
    """Return a configuration as commented YAML; what has no model or no engine is commented out."""
    lines = [
        "# SwapServe's configuration. `swapserve config check` reads it and names every mistake;",
        "# docs/configuration.md explains every key. What follows a # is a default or an example.",
        "",
        *_devices(machine),
        "",
        *_model_list(machine),
        "",
    ]
    for part in parts():
        if part.shape == "section":
            lines += [*_defaults(part, machine.paths), ""]
    return "\n".join(lines)


def _devices(machine: Machine) -> Iterator[str]:
    budget = int(machine.memory_bytes * DEFAULT_SHARE) // _MIB * _MIB
    ram = f"{_gib(machine.memory_bytes)} of RAM"
    yield "# Pools of memory. Engines on one share its budget: those that do not fit take turns."
    yield "devices:"
    yield f"  host:   # this machine has {ram}; the rest is for everything else"
    yield f"    memory: {format_size(budget)}"
    if machine.gpus:
        yield "    # Also holds the state of engines that were swapped out of a GPU."
    names = _gpu_names(machine)
    for gpu in machine.gpus:
        yield from _gpu(gpu, names.get(gpu.uuid))


def _gpu(gpu: Gpu, name: str | None) -> Iterator[str]:
    if name is None:
        yield f"  # {gpu.name} ({gpu.uuid}) is split by MIG, and the CUDA driver cannot move state"
        yield "  # of instances; `nvidia-smi -mig 0` makes it whole"
        return
    rest = _gib(gpu.memory_bytes - gpu.budget_bytes)
    yield f"  {name}:   # {gpu.name} of {_gib(gpu.memory_bytes)}; {rest} of it stay free"
    yield "    kind: gpu"
    yield f"    uuid: {gpu.uuid}"
    yield f"    memory: {format_size(gpu.budget_bytes)}"


def _gpu_names(machine: Machine) -> dict[str, str]:
    """Return a device's name for the UUID of each GPU that can be one."""
    whole = (gpu for gpu in machine.gpus if not gpu.mig)
    return {gpu.uuid: f"gpu{index}" for index, gpu in enumerate(whole)}


def _model_list(machine: Machine) -> Iterator[str]:
    yield "# Clients name one of these (or an alias) as `model`."
    entries = list(_entries(machine))
    if not entries:
        yield "# No model was found. Fetch one with `swapserve pull org/name`, or give a path, and"
        yield "# take away the # of an example:"
    yield "models:" if any(not entry.why_not for entry in entries) else "# models:"
    for entry in entries or [*_examples(machine)]:
        dead = entry.why_not or not entries
        if entry.why_not:
            yield f"# {entry.why_not}:"
        for index, line in enumerate(entry.lines):
            yield f"{'# ' if dead else ''}{'  - ' if index == 0 else '    '}{line}"


def _entries(machine: Machine) -> Iterator[_Entry]:
    taken: set[str] = set()
    places = _Places(machine)
    server = machine.llama_server
    for path in machine.gguf_files:
        if server is not None:
            spot = places.take(_size(path), server)
            yield _llama(_name(path.stem, taken), path, spot)
    for path in machine.model_dirs:
        if machine.vllm_pythons:
            spot = places.take(_size(path), _python(machine))
            yield _vllm(_name(path.name, taken), path, machine, spot)


def _examples(machine: Machine) -> Iterator[_Entry]:
    models = machine.paths.state_dir / "models"
    gguf = next(iter(machine.gguf_files), models / "org--name" / "model.gguf")
    spot = _Spot(tuple(_gpu_names(machine).values())[:1])
    yield _llama("small", gguf, spot)
    folder = next(iter(machine.model_dirs), models / "org--name")
    yield _vllm("large", folder, machine, spot)


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a model runs: GPUs, or the host."""

    gpus: tuple[str, ...] = ()
    note: str = ""
    """Why it is on the host although there are GPUs."""


class _Places:
    """Hands out devices: each model goes to the GPU that has least on it so far."""

    def __init__(self, machine: Machine) -> None:
        self._cuda = machine.cuda
        names = _gpu_names(machine)
        self._budgets = {
            names[gpu.uuid]: gpu.budget_bytes for gpu in machine.gpus if gpu.uuid in names
        }
        self._taken = dict.fromkeys(self._budgets, 0)

    def take(self, size: int, program: Path) -> _Spot:
        """Return a place for a model of so many bytes; several GPUs if one is too small."""
        if not self._budgets:
            return _Spot()
        if program not in self._cuda:
            return _Spot(note="its program is not built for NVIDIA's GPUs")
        fits = [name for name, budget in self._budgets.items() if size < budget]
        if not fits:
            return _Spot(self._several(size))
        name = min(fits, key=lambda one: self._taken[one])
        self._taken[name] += size
        return _Spot((name,))

    def _several(self, size: int) -> tuple[str, ...]:
        """Return a power of two of GPUs, as tensor parallelism wants it: perhaps too few."""
        count = 2
        while count * min(self._budgets.values()) <= size:
            count *= 2
        return tuple(f"gpu{index}" for index in range(count))


_OPTIONS = (
    "# args: []        # further arguments of the engine",
    "# memory: 2GiB    # measured if absent",
    "# ttl: 10m        # swap it out when idle for this long",
    "# pin: true       # never swap it out for another",
)
_MECHANISM = (
    "# mechanism: auto # how it gives GPU memory back; auto measures and takes the cheapest"
)


def _common(name: str, recipe: str, path: Path) -> list[str]:
    return [f"name: {json.dumps(name)}", f"recipe: {recipe}", f"model: {json.dumps(str(path))}"]


def _llama(name: str, path: Path, spot: _Spot) -> _Entry:
    return _placed(_common(name, "llamacpp", path), spot, ["mechanism: restart"])


def _vllm(name: str, path: Path, machine: Machine, spot: _Spot) -> _Entry:
    params = f"params: {{python: {json.dumps(str(_python(machine)))}}}"
    ranks = f"args: [--tensor-parallel-size, {len(spot.gpus)}]"
    lines = [*_common(name, "vllm", path), params]
    return _placed(lines, spot, [ranks, "mechanism: sleep"])


def _placed(lines: list[str], spot: _Spot, spread: list[str]) -> _Entry:
    """Return an entry; `spread` is what it needs on several GPUs, which is left to the user."""
    if len(spot.gpus) > 1:
        device = f"device: [{', '.join(spot.gpus)}]"
        why_not = f"Too large for one GPU; on {len(spot.gpus)} equal ones"
        return _Entry([*lines, device, *spread], why_not)
    if spot.note:
        lines = [*lines, f"device: host   # {spot.note}"]
    elif spot.gpus:
        return _Entry([*lines, f"device: {spot.gpus[0]}", *_OPTIONS, _MECHANISM])
    return _Entry([*lines, *_OPTIONS])


def _python(machine: Machine) -> Path:
    """Return the Python to run vLLM with: one for GPUs, if there are both."""
    fitting = [one for one in machine.vllm_pythons if machine.gpus and one in machine.cuda]
    return next(iter((*fitting, *machine.vllm_pythons)), Path("/path/to/venv/bin/python"))


def _size(path: Path) -> int:
    """Return the bytes of a model's weights, of all files if it is in several."""
    split = re.search(r"-\d+-of-\d+\.gguf$", path.name)
    if path.is_dir():
        files = [*path.glob("*.safetensors")]
    elif split:
        files = [*path.parent.glob(f"{glob.escape(path.name[: split.start()])}-*-of-*.gguf")]
    else:
        files = [path]
    return sum(file.stat().st_size for file in files)


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.3g} GiB"


def _name(text: str, taken: set[str]) -> str:
    """Return a model name made of a file's name, a new one each time."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rpartition("--")[2]).lstrip("._-").lower()
    name, count = base or "model", 1
    while name in taken:
        count += 1
        name = f"{base or 'model'}-{count}"
    taken.add(name)
    return name


def _defaults(part: Part, paths: PathsConfig) -> Iterator[str]:
    yield f"# {part.doc}"
    yield f"#{part.name}:"
    for key in part.keys:
        value = str(getattr(paths, key.field)) if part.name == "paths" else default_text(key)
        yield f"#  {key.name}: {value or 'null'}   # {key.doc}"


def _models(top: Path) -> Iterator[Path]:
    """Yield GGUF files and Hugging Face folders at or below a directory, two levels deep."""
    for directory in (top, *sorted(top.glob("*/")), *sorted(top.glob("*/*/"))):
        if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
            yield directory
        # Of a model in several files, llama-server is given the first.
        parts_after_first = re.compile(r"-(?!0*1-)\d+-of-\d+\.gguf$")
        for path in sorted(directory.glob("*.gguf")):
            if not parts_after_first.search(path.name):
                yield path


def _known_venvs() -> Iterator[Path]:
    """Yield environments that scripts/setup makes, and that of a `vllm` command on PATH."""
    cache = os.environ.get("SWAPSERVE_CACHE")
    root = os.geteuid() == 0
    home = default_paths("unprivileged").image_dir.parent
    yield from sorted(
        (Path(cache) if cache else Path("/var/cache/swapserve") if root else home).glob("engines/*")
    )
    command = shutil.which("vllm")
    if command is not None:
        yield Path(command).resolve().parent.parent


def _vllm_pythons(venvs: Iterable[Path]) -> Iterator[Path]:
    for venv in dict.fromkeys(venv.absolute() for venv in venvs):
        python = venv / "bin" / "python"
        if python.exists() and any(venv.glob("lib/python3*/site-packages/vllm/__init__.py")):
            yield python


def _torch_has_cuda(python: Path) -> bool:
    venv = python.parent.parent
    return any(venv.glob("lib/python3*/site-packages/torch/lib/libtorch_cuda.so"))


def _llama_has_cuda(server: Path) -> bool:
    """Return whether a llama-server brings ggml's CUDA backend, beside it or in itself."""
    home = server.resolve().parent
    if any(any(place.glob("libggml-cuda*")) for place in (home, home.parent / "lib")):
        return True
    try:
        with server.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with content:
                return content.find(b"libcuda.so") >= 0
    except (OSError, ValueError):  # not for us to read; empty
        return False
