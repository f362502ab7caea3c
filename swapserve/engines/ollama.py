"""Ollama's unloading and loading of models.

Its server keeps no GPU state; each loaded model has a runner process that does. Unloading ends that
process, loading starts one, so a deep sleep is all there is. Source: Ollama of 2026-08,
server/routes.go, server/sched.go, docs/api.md.
"""

from typing import Any

from swapserve.config.recipes import Mechanism
from swapserve.engines.base import Rest
from swapserve.engines.calls import CallFailed, field
from swapserve.engines.resting import (
    IDLE_TIMEOUT_S,
    STATUS_TIMEOUT_S,
    WAKE_TIMEOUT_S,
    RestingAdapter,
)

FOREVER = -1
"""`keep_alive` of a model that Ollama shall not unload by itself."""
_NO_TEXT = 400


class OllamaAdapter(RestingAdapter):
    """An Ollama server that serves one model, under the name it has in Ollama."""

    def _able(self) -> frozenset[Mechanism]:
        return super()._able() | {"deep_sleep"}

    async def _rest(self, address: str, how: Rest) -> None:
        for name in await self._loaded(address):
            answer = await self._calls.post(
                address,
                "/api/generate",
                body={"model": name, "keep_alive": 0, "stream": False},
                timeout_s=STATUS_TIMEOUT_S,
            )
            if field(answer, "done_reason", str) != "unload":
                raise CallFailed("/api/generate", f"not unloaded: {answer.text}", None)
        # It answers at once, and unloads when the last request is done.
        await self._until("unloading", lambda: self._resting(address), IDLE_TIMEOUT_S)

    async def _wake(self, address: str) -> None:
        # Asked for also if it is loaded: an unloading that was put off until the last request
        # ends is taken back by this.
        body: dict[str, Any] = {"model": self._model.name, "keep_alive": FOREVER}
        try:
            await self._calls.post(
                address, "/api/generate", body={**body, "stream": False}, timeout_s=WAKE_TIMEOUT_S
            )
        except CallFailed as error:
            if error.status != _NO_TEXT:
                raise
            # A model without text, for embeddings.
            await self._calls.post(
                address, "/api/embed", body={**body, "input": ""}, timeout_s=WAKE_TIMEOUT_S
            )
        await self._until("loading", lambda: self._awake(address), STATUS_TIMEOUT_S)

    async def _resting(self, address: str) -> bool:
        return not await self._loaded(address)

    async def _awake(self, address: str) -> bool:
        return bool(await self._loaded(address))

    async def _loaded(self, address: str) -> list[str]:
        answer = await self._calls.get(address, "/api/ps", timeout_s=STATUS_TIMEOUT_S)
        try:
            return [str(model["model"]) for model in field(answer, "models", list)]
        except (KeyError, TypeError) as error:
            reason = f"it answered {answer.text}"
            raise CallFailed("/api/ps", reason, answer.status_code) from error
