"""vLLM's sleep mode.

Source for every call, its parameters and its order: vLLM 0.32.0, entrypoints/serve/dev,
entrypoints/rl/online/api_router.py, v1/engine/core.py, v1/executor/abstract.py. They exist only
with VLLM_SERVER_DEV_MODE=1. `/pause` came with 0.12, `/release_kv_cache_memory` in June 2026
(pull request 44890); a vLLM without one of them is refused, never worked around.
"""

import re
from contextlib import suppress

from swapserve.config.recipes import Mechanism
from swapserve.config.schema import ModelConfig
from swapserve.engines.base import Rest
from swapserve.engines.calls import NO_SUCH_CALL, CallFailed, field
from swapserve.engines.resting import (
    IDLE_TIMEOUT_S,
    REST_TIMEOUT_S,
    STATUS_TIMEOUT_S,
    WAKE_TIMEOUT_S,
    RestingAdapter,
)

RELOADABLE = {
    None,
    "auto",
    "hf",
    "fastsafetensors",
    "instanttensor",
    "mistral",
    "npcache",
    "pt",
} | {
    "safetensors",
    "runai_streamer",
}
"""Values of --load-format whose loader can read the weights a second time.

Source: model_executor/model_loader, loaders with `get_all_weights`.
"""
DRAFTS = ("--speculative-config", "-sc", "--spec-model", "--spec-method")
"""Options that bring a draft model, or may."""
_DISCARDED = re.compile(r'^vllm:engine_sleep_state\{.*sleep_state="discard_all".*\} (\S+)', re.M)


class VllmAdapter(RestingAdapter):
    """A vLLM OpenAI server."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self._deep: set[str] = set()
        """Addresses of engines that were put into a deep sleep and have not been woken since."""

    def _able(self) -> frozenset[Mechanism]:
        able: set[Mechanism] = {"checkpoint", "restart"}
        launch = self._launch
        if not (launch.is_set("VLLM_SERVER_DEV_MODE") and launch.has("--enable-sleep-mode")):
            return frozenset(able)
        able.add("sleep")
        # Only the built-in backend can drop the cache alone.
        if launch.value("--sleep-mode-backend") in {None, "cumem"}:
            able.add("lean")
        # Only the main model's weights are read again, so a draft model would be lost.
        drafts = any(launch.value(flag) for flag in DRAFTS)
        if launch.value("--load-format") in RELOADABLE and not drafts:
            able.add("deep_sleep")
        return frozenset(able)

    async def _rest(self, address: str, how: Rest) -> None:
        await self._pause(address)
        self._deep.discard(address)
        if how == "release":
            await self._calls.post(address, "/release_kv_cache_memory", timeout_s=REST_TIMEOUT_S)
        else:
            if how == "deep_sleep":
                self._deep.add(address)
            # Its default mode would abort a request that came in since, and waits for its turn.
            level = "2" if how == "deep_sleep" else "1"
            params = {"level": level, "mode": "keep"}
            await self._calls.post(address, "/sleep", params=params, timeout_s=REST_TIMEOUT_S)
        # Older versions answered before they were done.
        await self._until("falling asleep", lambda: self._sleeps(address), REST_TIMEOUT_S)

    async def _pause(self, address: str) -> None:
        # A step that runs while memory is unmapped is an illegal access and the end of the engine
        # (issue 28714). The pause is a call of its own and is waited for: `/sleep?mode=wait` that
        # timed out here would still put the engine to sleep whenever it becomes idle.
        try:
            await self._calls.post(
                address, "/pause", params={"mode": "wait"}, timeout_s=IDLE_TIMEOUT_S
            )
        except CallFailed:
            # Requests that it still works on go on; so there is nothing but the pause to undo.
            with suppress(CallFailed):
                await self._calls.post(address, "/resume", timeout_s=STATUS_TIMEOUT_S)
            raise

    async def _wake(self, address: str) -> None:
        if not await self._resting(address):
            return
        lost = await self._lost_its_weights(address)
        # In parts, and the cache last: it resumes with the last part, and must have read its
        # weights by then; and before the cache takes its place there is room for reading them.
        # (A part that does not sleep is left alone. Older versions, asked for all after a part,
        # map that part a second time.)
        await self._wake_up(address, "weights")
        if lost:
            await self._calls.post(
                address,
                "/collective_rpc",
                body={"method": "reload_weights"},
                timeout_s=WAKE_TIMEOUT_S,
            )
        await self._until(
            "/reset_prefix_cache", lambda: self._prefixes_forgotten(address), IDLE_TIMEOUT_S
        )
        await self._wake_up(address, "kv_cache")
        if await self._paused(address):
            await self._calls.post(address, "/resume", timeout_s=STATUS_TIMEOUT_S)
        await self._until("waking up", lambda: self._awake(address), STATUS_TIMEOUT_S)
        self._deep.discard(address)

    async def _wake_up(self, address: str, part: str) -> None:
        await self._calls.post(address, "/wake_up", params={"tags": part}, timeout_s=WAKE_TIMEOUT_S)

    async def _lost_its_weights(self, address: str) -> bool:
        """Whether they must be read from disk again; yes if nobody knows: that is never wrong."""
        if address in self._deep:
            return True
        try:
            metrics = await self._calls.get(address, "/metrics", timeout_s=STATUS_TIMEOUT_S)
        except CallFailed:
            discarded = None
        else:
            discarded = _DISCARDED.search(metrics.text)
        if discarded is None:
            return "deep_sleep" in self.mechanisms
        return float(discarded[1]) == 1

    async def _prefixes_forgotten(self, address: str) -> bool:
        """Drop the index of a cache whose content is gone; no while a block is held."""
        answer = await self._calls.post(address, "/reset_prefix_cache", timeout_s=STATUS_TIMEOUT_S)
        # Older versions answer with nothing.
        return not answer.content or field(answer, "success", bool)

    async def _resting(self, address: str) -> bool:
        # Awake in part counts as sleeping.
        return await self._sleeps(address) or await self._paused(address)

    async def _awake(self, address: str) -> bool:
        return not await self._resting(address)

    async def _sleeps(self, address: str) -> bool:
        return await self._flag(address, "is_sleeping")

    async def _paused(self, address: str) -> bool:
        return await self._flag(address, "is_paused")

    async def _flag(self, address: str, name: str) -> bool:
        try:
            answer = await self._calls.get(address, f"/{name}", timeout_s=STATUS_TIMEOUT_S)
        except CallFailed as error:
            if error.status == NO_SUCH_CALL:
                return False  # it has no such state to be in
            raise
        return field(answer, name, bool)
