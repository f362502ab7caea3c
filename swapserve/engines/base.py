"""Talk to an engine on our own account: is it there, does it answer, and what does it answer.

Every call uses a connection of its own that is closed afterwards: an image must not hold an
outside connection that nobody will ever speak on.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from swapserve.config.schema import ModelConfig
from swapserve.errors import CanaryFailed, EngineError

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

    async def healthy(self, address: str) -> bool:
        """Whether it can serve; False also when nobody answers there (yet)."""

    async def warm_up(self, address: str) -> Canary | None:
        """Make it answer once; return that as its canary, None if it generates no text.

        Raises:
            EngineError: it fails to answer.
        """


class OpenAIAdapter:
    """An engine that speaks OpenAI's completions, as all of ours do."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        # No TLS towards our own sandbox: loading certificates would take 20 ms and 5 MB.
        self._client = httpx.AsyncClient(verify=False, trust_env=False)  # noqa: S501

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


def adapter_for(model: ModelConfig) -> Adapter:
    """Return the adapter of a model's recipe.

    vLLM, llama.cpp and generic engines behave alike in all that is asked here; their settings
    differ in the recipes.
    """
    return OpenAIAdapter(model)
