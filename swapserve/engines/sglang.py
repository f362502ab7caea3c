"""SGLang's release and resumption of memory.

Source: SGLang of 2026-08, srt/managers/scheduler_update_weights_mixin.py (later
a file of its own), srt/entrypoints/http_server.py, docs/advanced_features/
sglang_for_rl.md. Two mistakes end the engine, because they raise in its scheduler process: a
release while there is a request, and a resumption of what was not released. No call tells what is
released, so the engine is given a note: its weight version, which it keeps and tells but does not
use.
"""

from dataclasses import dataclass
from typing import Literal

from swapserve.config.recipes import Mechanism
from swapserve.config.schema import ModelConfig
from swapserve.engines.base import Canary, Rest
from swapserve.engines.calls import NO_SUCH_CALL, CallFailed, field
from swapserve.engines.resting import (
    IDLE_TIMEOUT_S,
    REST_TIMEOUT_S,
    STATUS_TIMEOUT_S,
    WAKE_TIMEOUT_S,
    RestingAdapter,
)

TAGS: dict[str, list[str]] = {
    "release": ["kv_cache"],
    "sleep": ["kv_cache", "weights"],
    "deep_sleep": ["kv_cache", "weights"],
}
NOTE = "swapserve"
"""First part of the weight version of an engine at rest; then how, then the former version."""
State = Rest | Literal["awake", "weightless"]
"""`weightless`: resumed, but its weights have not been read again."""
STATES: tuple[State, ...] = ("release", "sleep", "deep_sleep", "weightless")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an engine's note, or else our memory, says of it."""

    state: State | None
    """None: nobody knows."""
    version: str | None
    """Its weight version when awake; None: it takes no notes."""
    noted: bool


class SGLangAdapter(RestingAdapter):
    """An SGLang server."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self._remembered: dict[str, State] = {}
        """By address, for versions that take no note."""

    def _able(self) -> frozenset[Mechanism]:
        able: set[Mechanism] = {"checkpoint", "restart"}
        launch = self._launch
        # Without it a release answers "done" and frees nothing.
        if not launch.has("--enable-memory-saver"):
            return frozenset(able)
        able.add("lean")
        # Whether weights survive is decided at launch, not with the call. The weights of a draft
        # model need a flag of their own, and cannot be read from disk again.
        speculative = launch.value("--speculative-algorithm") is not None
        if launch.has("--enable-weights-cpu-backup"):
            if not speculative or launch.has("--enable-draft-weights-cpu-backup"):
                able.add("sleep")
        elif self._model_path is not None and not speculative:
            able.add("deep_sleep")
        return frozenset(able)

    @property
    def _model_path(self) -> str | None:
        return self._launch.value("--model-path", "--model")

    async def warm_up(self, address: str) -> Canary | None:
        """Ask for a few tokens, which also shows that it is awake."""
        canary = await super().warm_up(address)
        self._remembered[address] = "awake"
        return canary

    async def _rest(self, address: str, how: Rest) -> None:
        seen = await self._look(address)
        if seen.state == how:
            return
        if seen.state not in {"awake", None}:
            raise CallFailed("/release_memory_occupation", f"it is in '{seen.state}' already", None)
        await self._until("/flush_cache", lambda: self._idle(address), IDLE_TIMEOUT_S)
        # From here on a request that slips in waits, instead of running on memory that is gone.
        # In place: nothing is aborted, should there be something after all.
        await self._calls.post(
            address, "/pause_generation", body={"mode": "in_place"}, timeout_s=IDLE_TIMEOUT_S
        )
        if not await self._idle(address):
            raise CallFailed("/flush_cache", "a request came in", None)
        # Before the release: a note too many costs a restart, one too few answers of nonsense.
        await self._note(address, seen, how)
        try:
            await self._calls.post(
                address,
                "/release_memory_occupation",
                body={"tags": TAGS[how]},
                timeout_s=REST_TIMEOUT_S,
            )
        except CallFailed as error:
            if error.status is not None:  # it refused, so there is nothing to resume
                await self._note(address, seen, "awake")
            raise

    async def _wake(self, address: str) -> None:
        seen = await self._look(address)
        if seen.state is None:
            raise CallFailed("/model_info", "it does not tell whether anything is released", None)
        if seen.state in TAGS:
            await self._calls.post(
                address,
                "/resume_memory_occupation",
                body={"tags": TAGS[seen.state]},
                timeout_s=WAKE_TIMEOUT_S,
            )
        # Only now, with the cache there: loading ends with a flush of it.
        if seen.state in {"deep_sleep", "weightless"}:
            await self._note(address, seen, "weightless")
            await self._reload(address)
        if seen.noted or seen.state != "awake":
            await self._note(address, seen, "awake")
        await self._calls.post(address, "/continue_generation", body={}, timeout_s=STATUS_TIMEOUT_S)

    async def _resting(self, address: str) -> bool | None:
        seen = await self._look(address)
        return None if seen.state is None else seen.state != "awake"

    async def _look(self, address: str) -> "_Seen":
        remembered = self._remembered.get(address)
        version = await self._version(address)
        if version is None:
            return _Seen(remembered, None, noted=False)
        first, _, rest = version.partition(":")
        if first != NOTE:
            return _Seen("awake", version, noted=False)
        how, _, former = rest.partition(":")
        known = next((known for known in STATES if known == how), None)
        # What we did after the note was left is newer than the note.
        return _Seen("awake" if remembered == "awake" else known, former, noted=True)

    async def _note(self, address: str, seen: "_Seen", state: State) -> None:
        """Remember the state, and leave a note with the engine if it takes one."""
        self._remembered[address] = state
        if seen.version is None:
            return
        version = seen.version if state == "awake" else f"{NOTE}:{state}:{seen.version}"
        await self._calls.post(
            address,
            "/update_weight_version",
            body={"new_version": version, "abort_all_requests": False},
            timeout_s=STATUS_TIMEOUT_S,
        )

    async def _version(self, address: str) -> str | None:
        for path in ("/model_info", "/get_model_info"):  # the newer name first
            try:
                answer = await self._calls.get(address, path, timeout_s=STATUS_TIMEOUT_S)
            except CallFailed as error:
                if error.status == NO_SUCH_CALL:
                    continue
                raise
            if "weight_version" not in answer.text:
                return None
            return field(answer, "weight_version", str)
        return None

    async def _reload(self, address: str) -> None:
        answer = await self._calls.post(
            address,
            "/update_weights_from_disk",
            body={"model_path": self._model_path},
            timeout_s=WAKE_TIMEOUT_S,
        )
        if not field(answer, "success", bool):
            raise CallFailed("/update_weights_from_disk", answer.text, answer.status_code)

    async def _idle(self, address: str) -> bool:
        """Whether there is no request at all; drops the cache then, as a release does anyway."""
        try:
            await self._calls.post(address, "/flush_cache", timeout_s=STATUS_TIMEOUT_S)
        except CallFailed as error:
            if error.status == 400:  # noqa: PLR2004 (its "not now")
                return False
            raise
        return True
