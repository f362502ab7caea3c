"""A first configuration, commented, from what the machine has."""

import json
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
"""Part of a GPU's memory to offer; the rest is for contexts of the driver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU of this machine."""

    uuid: str
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to run models with."""

    memory_bytes: int
    paths: PathsConfig
    gpus: tuple[Gpu, ...] = ()
    llama_server: Path | None = None
    vllm_pythons: tuple[Path, ...] = ()
    gguf_files: tuple[Path, ...] = ()
    model_dirs: tuple[Path, ...] = ()
    """Hugging Face folders."""


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
    return Machine(
        memory_bytes=total_memory(),
        paths=paths,
        gpus=tuple(gpus),
        llama_server=find_binary("llama-server"),
        vllm_pythons=tuple(_vllm_pythons((*venvs, *_known_venvs()))),
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
    ram = f"{machine.memory_bytes / (1 << 30):.0f} GiB of RAM"
    yield "# Pools of memory. Engines on one share its budget: those that do not fit take turns."
    yield "devices:"
    yield f"  host:   # this machine has {ram}; the rest is for everything else"
    yield f"    memory: {format_size(budget)}"
    for gpu in machine.gpus:
        yield f"  # {gpu.name} ({gpu.uuid}): this version cannot move engines off a GPU"


def _model_list(machine: Machine) -> Iterator[str]:
    yield "# Clients name one of these (or an alias) as `model`."
    entries = list(_entries(machine))
    if not entries:
        yield "# No model was found. Fetch one with `swapserve pull org/name`, or give a path, and"
        yield "# take away the # of an example:"
    yield "models:" if entries else "# models:"
    for entry in entries or [*_examples(machine)]:
        for index, line in enumerate(entry):
            mark = "  - " if index == 0 else "    "
            yield f"{'' if entries else '# '}{mark}{line}"


def _entries(machine: Machine) -> Iterator[list[str]]:
    taken: set[str] = set()
    for path in machine.gguf_files:
        if machine.llama_server is not None:
            yield [*_entry(_name(path.stem, taken), "llamacpp", path), *_OPTIONS]
    for path in machine.model_dirs:
        if machine.vllm_pythons:
            yield _vllm(_name(path.name, taken), path, machine)


def _examples(machine: Machine) -> Iterator[list[str]]:
    models = machine.paths.state_dir / "models"
    gguf = next(iter(machine.gguf_files), models / "org--name" / "model.gguf")
    yield [*_entry("small", "llamacpp", gguf), *_OPTIONS]
    folder = next(iter(machine.model_dirs), models / "org--name")
    yield _vllm("large", folder, machine)


_OPTIONS = (
    "# args: []        # further arguments of the engine",
    "# memory: 2GiB    # measured if absent",
    "# ttl: 10m        # swap it out when idle for this long",
    "# pin: true       # never swap it out for another",
)


def _entry(name: str, recipe: str, path: Path) -> list[str]:
    return [f"name: {json.dumps(name)}", f"recipe: {recipe}", f"model: {json.dumps(str(path))}"]


def _vllm(name: str, path: Path, machine: Machine) -> list[str]:
    python = next(iter(machine.vllm_pythons), Path("/path/to/venv/bin/python"))
    params = f"params: {{python: {json.dumps(str(python))}}}"
    return [*_entry(name, "vllm", path), params, *_OPTIONS]


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
