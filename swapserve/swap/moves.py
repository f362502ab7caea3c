"""Carry a way in or out of one engine out, step by step, with the keeper's verbs.

Nothing here knows of scheduling or of states; `lifecycle.actor` does.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from swapserve.config.recipes import Mechanism
from swapserve.config.schema import ImagesConfig, ModelConfig
from swapserve.engines.base import Adapter, Canary, Rest
from swapserve.errors import (
    CanaryFailed,
    CudaError,
    DeviceBusy,
    EngineCrashed,
    EngineError,
    ImageError,
    KeeperError,
    KeeperUnavailable,
    StartFailed,
    SwapServeError,
)
from swapserve.keeper.client import KeeperClient
from swapserve.keeper.protocol import Exited, Held, Holding, ImageKind, Measured
from swapserve.swap.plan import WayIn, WayOut, makes_golden
from swapserve.swap.trace import Trace

HEALTH_POLL_S = 0.05
PROBE_POLL_S = 0.01
RESTORED_TIMEOUT_S = 60.0
"""How long a restored engine may take to answer its first probe."""
STILL_TIMEOUT_S = 10.0
"""The same of one that could not leave: it may be busy with what it was asked before."""
LOG_TAIL_LINES = 25
RESTS: frozenset[Mechanism] = frozenset({"lean", "sleep", "deep_sleep"})
"""Mechanisms after which an engine has to be woken."""

log = logging.getLogger(__name__)


class Mover:
    """The moves of one engine. `notice` is told what an operator should know."""

    def __init__(
        self,
        model: ModelConfig,
        images: ImagesConfig,
        keeper: KeeperClient,
        adapter: Adapter,
        *,
        close_idle: Callable[[], Awaitable[None]],
        notice: Callable[[str], None],
    ) -> None:
        self._model = model
        self._images = images
        self._keeper = keeper
        self._adapter = adapter
        self._close_idle = close_idle
        self._notice = notice
        self._exit: Exited | None = None
        self._exit_seen = asyncio.Event()
        self._rests: bool | None = None
        """Whether the engine has put itself to rest in part or whole; None: not known."""
        self._unproven = False
        """It was promoted from its golden image and has not served since: a canary is due."""

    def exited(self, exited: Exited) -> None:
        """Note that the engine's process ended on its own."""
        self._exit = exited
        self._exit_seen.set()

    async def holding(self) -> Holding:
        """Ask the keeper what there is of the engine, after the verb under way."""
        return await self._keeper.holding(self._model.name, settled=True)

    async def resting(self, holding: Holding) -> bool:
        """Whether the running engine sleeps by itself, so that it must be woken to serve."""
        if holding.held is not Held.RUNNING or holding.address is None:
            return False
        if self._rests is None:
            self._rests = await self._adapter.resting(holding.address)
        return self._rests is True

    # ----------------------------------------------------------------- in

    async def enter(self, way: WayIn, holding: Holding, trace: Trace) -> None:
        """Bring the engine in that way, up to where it can answer requests.

        Raises:
            DeviceBusy: a GPU lacks free memory; nothing was tried and nothing has changed.
            CudaError: nothing has changed, unless it was `lost`.
            SwapServeError: it did not come; nothing of it runs.

        Cancellation: the keeper goes on with the verb under way, for the next daemon to find.
        """
        self._exit = None
        self._exit_seen.clear()
        unproven, self._unproven = self._unproven and way == "resume", False
        try:
            match way:
                case "adopt":
                    await self._adopt(holding, trace)
                case "resume" | "wake":
                    await self._resumed(way, holding, trace)
                    if unproven:
                        await self._canary_if_due(holding, trace)
                case "cold":
                    await self._cold(holding, trace)
                case "live" | "golden":
                    await self._restored(way, holding, trace)
        except KeeperUnavailable:
            raise
        except SwapServeError as error:
            if not nothing_tried(error):
                await self._clear()
            else:
                self._unproven = unproven
            raise

    async def _adopt(self, holding: Holding, trace: Trace) -> None:
        with trace.phase("health"):
            await self._healthy(holding, self._start_timeout_s(), HEALTH_POLL_S)
        self._rests = None  # whoever was here before may have put it to rest
        await self._wake(holding, trace)

    async def _resumed(self, way: WayIn, holding: Holding, trace: Trace) -> None:
        if way == "resume":
            await trace.verb("resume", self._keeper.resume(self._model.name))
        await self._wake(holding, trace)
        with trace.phase("probe"):
            await self._healthy(holding, RESTORED_TIMEOUT_S, PROBE_POLL_S)

    async def _wake(self, holding: Holding, trace: Trace) -> None:
        """Undo the engine's own rest, if there was one."""
        assert holding.address is not None
        if self._rests is False or not self._adapter.mechanisms & RESTS:
            return
        with trace.phase("wake"):
            if self._rests is None:
                self._rests = await self._adapter.resting(holding.address)
            if self._rests is not False:
                await self._adapter.wake(holding.address)
        self._rests = False

    async def _cold(self, holding: Holding, trace: Trace) -> None:
        name = self._model.name
        self._rests = False
        await trace.verb("spawn", self._keeper.spawn(name))
        holding = await self.holding()  # without a network of its own it may listen elsewhere
        with trace.phase("health"):
            await self._healthy(holding, self._start_timeout_s(), HEALTH_POLL_S)
        with trace.phase("warm_up"):
            canary = await self._warm_up(holding)
        if not makes_golden(self._model, holding):
            return
        record = canary.as_json() if canary else None
        try:
            await trace.verb("golden", self._keeper.dump(name, "golden", record))
        except KeeperUnavailable:
            raise
        except SwapServeError as error:
            # Worth a cold start next time, not worth this one. The probe tells whether the
            # attempt harmed the engine.
            self._notice(f"no golden image: {error}")
        with trace.phase("probe"):
            await self._healthy(holding, RESTORED_TIMEOUT_S, PROBE_POLL_S)

    async def _restored(self, way: WayIn, holding: Holding, trace: Trace) -> None:
        name = self._model.name
        kind: ImageKind = "live" if way == "live" else "golden"
        await trace.verb("restore", self._keeper.restore(name, kind))
        if way == "golden":
            self._rests = False
        await self._wake(holding, trace)
        with trace.phase("probe"):
            await self._healthy(holding, RESTORED_TIMEOUT_S, PROBE_POLL_S)
        if way == "golden":
            await self._canary_if_due(holding, trace)

    async def promote(self, kind: ImageKind, trace: Trace) -> None:
        """Bring an image's GPU state to host memory and leave the engine suspended.

        Raises:
            CudaError: nothing has changed, unless it was `lost`.
            ImageError: there is no image that can be used so; nothing has changed.
            SwapServeError: it did not come; nothing of it runs.

        Cancellation: as for `enter`.
        """
        try:
            await trace.verb("restore", self._keeper.restore(self._model.name, kind, resume=False))
        except (KeeperUnavailable, ImageError):
            raise
        except SwapServeError as error:
            if not nothing_tried(error):
                await self._clear()
            raise
        if kind == "golden":
            self._rests = False
        self._unproven = kind == "golden"

    async def _canary_if_due(self, holding: Holding, trace: Trace) -> None:
        """Ask what has come from a golden image for its canary, the first time and now and then."""
        if holding.canary is None:
            return
        if not holding.canary_passed or random.random() < self._images.canary_rate:  # noqa: S311
            with trace.phase("canary"):
                await self._canary(holding)

    async def _canary(self, holding: Holding) -> None:
        assert holding.canary is not None
        now = await self._warm_up(holding)
        if now is None:
            raise CanaryFailed(self._model.name, "canary", "it no longer generates text")
        Canary.from_json(holding.canary).check(self._model.name, now)
        if not holding.canary_passed:
            await self._keeper.canary_passed(self._model.name)

    async def quarantine(self, way: WayIn, error: SwapServeError) -> None:
        """Drop an image that did not restore to what it was made of."""
        from_golden = way == "golden" or isinstance(error, CanaryFailed)
        if from_golden and not isinstance(error, KeeperError):  # which is not about the image
            self._notice(f"golden image dropped: {error}")
            try:
                await self._keeper.drop_image(self._model.name, "golden")
            except KeeperUnavailable:
                raise
            except SwapServeError as failure:  # so it is tried, and fails, once more
                self._notice(f"the golden image could not be dropped: {failure}")

    async def _warm_up(self, holding: Holding) -> Canary | None:
        assert holding.address is not None
        try:
            return await self._adapter.warm_up(holding.address)
        except EngineError as error:
            raise await self._start_failed(str(error)) from error

    async def _healthy(self, holding: Holding, timeout_s: float, poll_s: float) -> None:
        """Wait until the engine answers its probe.

        Raises:
            StartFailed: it ended, or did not become healthy in time; has the end of its log.
        """
        assert holding.address is not None
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._adapter.healthy(holding.address):
                    if self._exit is not None:
                        break
                    await self._pause(poll_s)
                else:
                    return
        except TimeoutError:
            raise await self._start_failed(f"not healthy within {timeout_s:g} s") from None
        raise await self._start_failed(f"its process ended ({self._exit.status})")

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the end of the process."""
        try:
            async with asyncio.timeout(seconds):
                await self._exit_seen.wait()
        except TimeoutError:
            return

    async def _start_failed(self, reason: str) -> StartFailed:
        tail = await self._keeper.log_tail(self._model.name, LOG_TAIL_LINES)
        return StartFailed(self._model.name, reason, tail)

    def _start_timeout_s(self) -> float:
        own = self._model.start_timeout_s
        return self._model.recipe.start_timeout_s if own is None else own

    async def _clear(self) -> None:
        """End whatever a failed move left running, so that its memory is free."""
        try:
            await self.holding()  # a verb that outlasted our patience goes on until its end
            await self._keeper.stop(self._model.name, 0.0)
        except SwapServeError as error:
            log.warning("event=not_cleared engine=%s error=%s", self._model.name, error)

    # ---------------------------------------------------------------- out

    async def leave(self, way: WayOut, trace: Trace) -> None:
        """Move the engine off its device that way.

        Raises:
            SwapServeError: it could not; `still_serves` tells what that means for it.
        """
        name = self._model.name
        with trace.phase("close_idle"):
            await self._close_idle()
        match way:
            case "checkpoint":
                await trace.verb("suspend", self._keeper.suspend(name))
            case "lean":
                await self._rest("release", trace)
                await self._suspend_at_rest(trace)
            case "sleep" | "deep_sleep":
                await self._rest(way, trace)
            case "live":
                await trace.verb("dump", self._keeper.dump(name, "live"))
            case "discard":
                await trace.verb("discard", self._keeper.discard(name))
            case "kill":
                await trace.verb("stop", self._keeper.stop(name, self._stop_grace_s()))

    async def _rest(self, how: Rest, trace: Trace) -> None:
        holding = await self.holding()
        assert holding.address is not None
        self._rests = None  # until it has said so, nobody knows
        with trace.phase(how):
            await self._adapter.rest(holding.address, how)
        self._rests = True

    async def _suspend_at_rest(self, trace: Trace) -> None:
        """Move what the engine has kept; where that fails it must serve again, cache and all."""
        try:
            await trace.verb("suspend", self._keeper.suspend(self._model.name))
        except CudaError as error:
            if not error.lost:
                await self._wake(await self.holding(), trace)
            raise

    async def still_serves(self) -> bool:
        """Whether the engine answers after a move out that failed."""
        holding = await self.holding()
        if holding.held is not Held.RUNNING or holding.address is None:
            return False
        try:
            await self._wake(holding, Trace())
        except SwapServeError as error:
            log.warning("event=not_woken engine=%s error=%s", self._model.name, error)
            return False
        try:
            await self._healthy(holding, STILL_TIMEOUT_S, HEALTH_POLL_S)
        except StartFailed:
            return False
        return True

    async def stop(self, trace: Trace) -> None:
        """End the engine for good (images of an idle engine stay)."""
        await trace.verb("stop", self._keeper.stop(self._model.name, self._stop_grace_s()))

    async def crashed(self, exited: Exited) -> EngineCrashed:
        """Describe an end that nobody asked for."""
        tail = await self._keeper.log_tail(self._model.name, LOG_TAIL_LINES)
        return EngineCrashed(self._model.name, exited.status, tail)

    async def measure(self) -> Measured:
        """Return the bytes it takes now."""
        return await self._keeper.measure(self._model.name)

    def _stop_grace_s(self) -> float:
        own = self._model.stop_grace_s
        return self._model.recipe.stop_grace_s if own is None else own


def nothing_tried(error: SwapServeError) -> bool:
    """Whether a move in ended before anything was done, so that the engine rests as before."""
    return isinstance(error, DeviceBusy) or (isinstance(error, CudaError) and not error.lost)
