"""What is common to engines that can rest: deadlines, and an attempt that is taken back."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from swapserve.config.recipes import Mechanism
from swapserve.config.schema import ModelConfig
from swapserve.engines.base import OpenAIAdapter, Rest
from swapserve.engines.calls import NO_SUCH_CALL, CallFailed, Calls
from swapserve.errors import QuiesceFailed

REST_TIMEOUT_S = 300.0
"""Weights of 140 GB, copied to memory that has to be pinned first, at half a GB per second."""
WAKE_TIMEOUT_S = 600.0
"""The same weights read from a slow disk."""
IDLE_TIMEOUT_S = 10.0
"""What clients left behind, such as a request they hung up on, is over in this time."""
STATUS_TIMEOUT_S = 10.0
"""Engines answer a question about their state after what they are doing just now."""
POLL_S = 0.02
_MECHANISM: dict[Rest, Mechanism] = {
    "release": "lean",
    "sleep": "sleep",
    "deep_sleep": "deep_sleep",
}


class RestingAdapter(OpenAIAdapter, ABC):
    """An engine with calls of its own to give memory back and to take it again.

    Subclasses raise `CallFailed`; each call, and each wait for something, has a deadline.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self._calls = Calls(self._client)

    @abstractmethod
    async def _rest(self, address: str, how: Rest) -> None:
        """Put it to rest."""

    @abstractmethod
    async def _wake(self, address: str) -> None:
        """Undo whatever `_rest` got done, as far as it got."""

    @abstractmethod
    async def _resting(self, address: str) -> bool | None:
        """Say whether it must be woken."""

    async def rest(self, address: str, how: Rest) -> None:
        """Put it to rest, or leave it as it was."""
        if _MECHANISM[how] not in self._able():
            await super().rest(address, how)
        try:
            await self._rest(address, how)
        except CallFailed as error:
            left_awake = await self._take_back(address)
            raise self._failed(how, error, left_awake=left_awake) from error

    async def wake(self, address: str) -> None:
        """Wake it from whatever rest it is in."""
        try:
            await self._wake(address)
        except CallFailed as error:
            left_awake = await self._not_woken(address)
            raise self._failed("wake", error, left_awake=left_awake) from error

    async def resting(self, address: str) -> bool | None:
        """Ask the engine."""
        try:
            return await self._resting(address)
        except CallFailed:
            return None

    async def _take_back(self, address: str) -> bool | None:
        try:
            await self._wake(address)
        except CallFailed:
            return await self._not_woken(address)
        return True

    async def _not_woken(self, address: str) -> bool | None:
        """Return `left_awake` after a failed wake-up: awake in part is not awake."""
        return False if await self.resting(address) else None

    async def _until(
        self, description: str, probe: Callable[[], Awaitable[bool]], timeout_s: float
    ) -> None:
        """Ask until the answer is yes; no engine tells by itself.

        Raises:
            CallFailed: not in time, or the question failed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not await probe():  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise CallFailed(description, f"not within {timeout_s:g} s", None) from error

    def _failed(self, phase: str, error: CallFailed, *, left_awake: bool | None) -> QuiesceFailed:
        unsupported = error.status == NO_SUCH_CALL
        return QuiesceFailed(
            self._model.name, phase, str(error), left_awake=left_awake, unsupported=unsupported
        )
