"""Talk to an engine on our own account: is it there, does it answer, and what does it answer.

Every call uses a connection of its own that is closed afterwards: an image must not hold an
outside connection that nobody will ever speak on.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import httpx

from swapserve.config.recipes import Mechanism
from swapserve.config.schema import ModelConfig
from swapserve.engines.launch import Launch
from swapserve.errors import CanaryFailed, EngineError, QuiesceFailed

Rest = Literal["release", "sleep", "deep_sleep"]
"""How an engine gives GPU memory back by its own means.

`release`: its cache only, before the driver moves the rest. `sleep`: weights go to host memory.
`deep_sleep`: weights are dropped, and read from disk again.
"""

PROBE_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 120.0
CANARY_PROMPT = "The capital of France is"
CANARY_TOKENS = 8
LOGPROB_TOLERANCE = 0.05
"""Batching and cache hits move logprobs by less than this; a damaged engine by more."""
_CLOSE = {"Connection": "close"}
_SERVER_ERROR = 500


@dataclass(frozen=True, slots=True)
class Canary:
    """What a healthy engine answers to a fixed prompt at temperature 0.

    Attributes:
        tokens: the generated tokens, or pieces of text.
        logprobs: one per token; empty if the engine does not tell them.
    """

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the form that is stored with an image."""
        return {"tokens": list(self.tokens), "logprobs": list(self.logprobs)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Canary":
        """Build from the stored form."""
        return cls(tuple(data["tokens"]), tuple(data["logprobs"]))

    def check(self, engine: str, now: "Canary") -> None:
        """Compare with an answer given later.

        Raises:
            CanaryFailed: other tokens, or logprobs too far off.
        """
        if now.tokens != self.tokens:
            raise CanaryFailed(
                engine,
                "canary",
                f"it answered {''.join(now.tokens)!r}, not {''.join(self.tokens)!r}",
            )
        for before, after in zip(self.logprobs, now.logprobs, strict=False):
            if abs(before - after) > LOGPROB_TOLERANCE:
                message = f"a logprob moved from {before:.4f} to {after:.4f}"
                raise CanaryFailed(engine, "canary", message)


class Adapter(Protocol):
    """What is asked of every kind of engine."""

    @property
    def mechanisms(self) -> frozenset[Mechanism]:
        """How the engine, as it is launched, can give GPU memory back."""

    async def healthy(self, address: str) -> bool:
        """Whether it can serve; False also when nobody answers there (yet)."""

    async def warm_up(self, address: str) -> Canary | None:
        """Make it answer once; return that as its canary, None if it generates no text.

        Raises:
            EngineError: it fails to answer.
        """

    async def rest(self, address: str, how: Rest) -> None:
        """Make it give its memory back; only while it has no request in flight.

        Returns when the engine says that it is done. What of a failed attempt can be taken back
        is taken back before this raises.

        Raises:
            QuiesceFailed: it did not; tells what that means for the engine.

        Cancellation: the engine may be anywhere between awake and at rest; ask `resting`.
        """

    async def wake(self, address: str) -> None:
        """Undo whatever rest it is in, so that it serves; nothing happens if it is awake.

        Raises:
            QuiesceFailed: it does not serve, or would not give what it gave before.

        Cancellation: as with `rest`; a second call goes on from there.
        """

    async def resting(self, address: str) -> bool | None:
        """Whether it must be woken before it can serve; None if that cannot be told."""


class OpenAIAdapter:
    """An engine that speaks OpenAI's completions, as all of ours do, and cannot rest by itself."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._launch = Launch(model)
        # No TLS towards our own sandbox: loading certificates would take 20 ms and 5 MB.
        self._client = httpx.AsyncClient(verify=False, trust_env=False)  # noqa: S501

    @property
    def mechanisms(self) -> frozenset[Mechanism]:
        """What the recipe names and the command line does not switch off."""
        return frozenset(self._model.recipe.mechanisms) & self._able()

    def _able(self) -> frozenset[Mechanism]:
        """Return what this kind of engine, launched like this, can do."""
        # The driver does not move managed memory. llama.cpp, and Ollama with it, takes that
        # for everything if the variable is set at all, to whatever.
        # Source: ggml/src/ggml-cuda/ggml-cuda.cu, ggml_cuda_device_malloc.
        if "GGML_CUDA_ENABLE_UNIFIED_MEMORY" in self._launch.env:
            return frozenset({"restart"})
        return frozenset({"checkpoint", "restart"})

    async def rest(self, address: str, how: Rest) -> None:
        """Refuse: there is no such call."""
        message = "this engine has no call for that"
        raise QuiesceFailed(self._model.name, how, message, left_awake=True, unsupported=True)

    async def wake(self, address: str) -> None:
        """Do nothing: it never rests."""

    async def resting(self, address: str) -> bool | None:
        """Return False: it never rests."""
        return False

    async def healthy(self, address: str) -> bool:
        """Ask its health path."""
        url = f"http://{address}{self._model.recipe.health_path}"
        try:
            answer = await self._client.get(url, timeout=PROBE_TIMEOUT_S, headers=_CLOSE)
        except httpx.HTTPError:
            return False
        return answer.is_success

    async def warm_up(self, address: str) -> Canary | None:
        """Ask for a few tokens at temperature 0 (an engine without text: for an embedding)."""
        name = self._model.name
        body = {
            "model": name,
            "prompt": CANARY_PROMPT,
            "max_tokens": CANARY_TOKENS,
            "temperature": 0,
            "logprobs": 1,
        }
        answer = await self._post(address, "/v1/completions", body)
        if answer.is_success:
            return _canary(answer.json())
        if answer.status_code >= _SERVER_ERROR:
            raise EngineError(name, f"'{name}' answered its warm-up request with {answer.text}")
        await self._post(address, "/v1/embeddings", {"model": name, "input": CANARY_PROMPT})
        return None

    async def _post(self, address: str, path: str, body: dict[str, Any]) -> httpx.Response:
        try:
            return await self._client.post(
                f"http://{address}{path}", json=body, timeout=ANSWER_TIMEOUT_S, headers=_CLOSE
            )
        except httpx.HTTPError as error:
            name = self._model.name
            reason = str(error) or type(error).__name__
            raise EngineError(name, f"'{name}' did not answer {path}: {reason}") from error


def _canary(answer: dict[str, Any]) -> Canary | None:
    """Read OpenAI's completion shape, with its old and its new way to give logprobs."""
    choice = answer["choices"][0]
    said = choice.get("logprobs") or {}
    if content := said.get("content"):
        return Canary(
            tuple(item["token"] for item in content), tuple(item["logprob"] for item in content)
        )
    if tokens := said.get("tokens"):
        return Canary(tuple(tokens), tuple(said.get("token_logprobs") or ()))
    text = choice.get("text", "")
    return Canary((text,), ()) if text else None
