"""What engines and their moves take on this machine now, measured through the front door.

Everything is timed as a client sees it, since the simulator's times are a client's too: what front
door, daemon and keeper add is part of the figures.
"""

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from evaluation.schedule.client import Stream, ask, body, http_client
from evaluation.schedule.ground import CONTEXT, ENGINE_BYTES, Ground
from evaluation.schedule.prompts import prompt
from evaluation.session import Session
from evaluation.simulate import EngineKind, Speed
from evaluation.simulate.costs import Way
from swapserve.ids import EngineName
from swapserve.states import Tier

LENGTHS = (8, 32, 128)
"""Tokens of the prompts from which the time to the first token is fitted."""
ANSWER = 24
BUSY_S = 1.5
BUSY_AFTER = 20
"""Seconds of a long answer, and how many of its tokens are there when its engine is swapped out."""
BUSY_MOST = CONTEXT - 512
BEHIND_S = 0.005
QUARTILES_OF_SIGMA = 1.349
"""Distance of a normal distribution's quartiles, in standard deviations."""
MOST_NOISE = 0.5
LEAST_MOVES = 5
"""Fewer of a run do not say how fast its moves were."""
Say = Callable[[str], None]


class CannotCalibrate(Exception):
    """A request of the calibration failed; says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """By how much a run was slower than the calibration: computing, moves idle and busy."""

    tokens: float = 1.0
    idle: float = 1.0
    busy: float = 1.0


CALIBRATED = Pace()


@dataclass(slots=True, kw_only=True)
class Calibration:
    """Every sample, in seconds.

    Attributes:
        cold: from nothing to serving, golden image included, as the daemon says.
        first: time to the first token on an engine that is there, by length of the prompt.
        itl: mean gap between tokens, one figure for each answer.
        out_idle, out_busy: ways out, as the daemon says.
        in_idle, in_busy: ways in: what a client waits beyond what it would on an engine that is
            there, less the way out of whoever had to leave.
        in_idle_daemon, in_busy_daemon: the same as the daemon says.
        queued: what a request behind another one waits beyond the sum of both.
    """

    cold: list[float] = field(default_factory=list)
    first: dict[int, list[float]] = field(default_factory=dict)
    itl: list[float] = field(default_factory=list)
    out_idle: list[float] = field(default_factory=list)
    out_busy: list[float] = field(default_factory=list)
    in_idle: list[float] = field(default_factory=list)
    in_busy: list[float] = field(default_factory=list)
    in_idle_daemon: list[float] = field(default_factory=list)
    in_busy_daemon: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)

    @classmethod
    def pooled(cls, found: Sequence["Calibration"]) -> "Calibration":
        """Return one with the samples of all."""
        first: dict[int, list[float]] = {}
        for one in found:
            for tokens, samples in one.first.items():
                first.setdefault(tokens, []).extend(samples)
        lists = {
            name: [sample for one in found for sample in getattr(one, name)]
            for name in cls.__dataclass_fields__
            if name != "first"
        }
        return cls(first=first, **lists)

    @property
    def itl_s(self) -> float:
        """Seconds between two tokens."""
        return _middle(self.itl)

    def first_s(self, tokens: int) -> float:
        """Return the time to the first token for a prompt of that length."""
        base, slope = self._line()
        return base + slope * tokens

    def pace(self, itl_s: float, golden: Sequence[float], live: Sequence[float]) -> "Pace":
        """Return how a run's speed compares with the calibration's.

        Args:
            itl_s: mean gap between tokens in the run.
            golden: seconds of its ways in from golden images, as the daemon says.
            live: the same from live images.
        """
        return Pace(
            tokens=itl_s / self.itl_s,
            idle=_pace(golden, self.in_idle_daemon),
            busy=_pace(live, self.in_busy_daemon),
        )

    def kind(self, pace: Pace = CALIBRATED) -> EngineKind:
        """Return the engine as the simulator knows it, at that pace."""
        base, slope = self._line()
        keep = Way(out_s=pace.busy * _middle(self.out_busy), in_s=pace.busy * _middle(self.in_busy))
        drop = Way(out_s=pace.idle * _middle(self.out_idle), in_s=pace.idle * _middle(self.in_idle))
        return EngineKind(
            name="llama-server",
            bytes=ENGINE_BYTES,
            lean_bytes=ENGINE_BYTES,
            speed=Speed(
                prefill_tokens_per_s=1.0 / (pace.tokens * slope),
                itl_s=pace.tokens * self.itl_s,
                first_s=pace.tokens * base,
                max_seqs=1,
            ),
            cold_s=_middle(self.cold),
            kill_s=drop.out_s,
            ways={(Tier.DISK, True): keep, (Tier.DISK, False): drop},
        )

    def noise(self) -> float:
        """Return the standard deviation of the logarithm of a move's time, from its quartiles."""
        logs: list[float] = []
        for samples in (self.out_busy, self.in_busy, self.in_idle):
            middle = _middle(samples)
            logs += [math.log(each / middle) for each in samples if each > 0]
        low, _, high = statistics.quantiles(logs, n=4)
        return min(MOST_NOISE, (high - low) / QUARTILES_OF_SIGMA)

    def as_json(self) -> dict[str, Any]:
        """Return the samples and what was made of them."""
        base, slope = self._line()
        return {
            "first_s": base,
            "prefill_tokens_per_s": 1.0 / slope,
            "itl_s": self.itl_s,
            "cold_s": _middle(self.cold),
            "idle": {"out_s": _middle(self.out_idle), "in_s": _middle(self.in_idle)},
            "busy": {"out_s": _middle(self.out_busy), "in_s": _middle(self.in_busy)},
            "noise": self.noise(),
            "samples": {name: getattr(self, name) for name in self.__dataclass_fields__},
        }

    def _line(self) -> tuple[float, float]:
        """Return base and slope through the medians: least squares of relative errors."""
        points = [(float(tokens), _middle(found)) for tokens, found in self.first.items()]
        weights = [1.0 / seconds**2 for _, seconds in points]
        total = sum(weights)
        x = sum(w * tokens for w, (tokens, _) in zip(weights, points, strict=True)) / total
        y = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
        above = below = 0.0
        for weight, (tokens, seconds) in zip(weights, points, strict=True):
            above += weight * (tokens - x) * (seconds - y)
            below += weight * (tokens - x) ** 2
        slope = max(above / below, 1e-6)
        return max(0.0, y - slope * x), slope


def _middle(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def _pace(seconds: Sequence[float], calibrated: Sequence[float]) -> float:
    """Return the ratio of medians, one if there are too few to tell."""
    if len(seconds) < LEAST_MOVES:
        return 1.0
    return _middle(seconds) / _middle(calibrated)


def calibrate(ground: Ground, session: Session, *, repeats: int, say: Say) -> Calibration:
    """Start every engine once, then measure; afterwards each has a golden image.

    Args:
        ground: at least two engines, of which one fits.
        session: a running daemon.
        repeats: samples of each kind.
        say: told what is going on.

    Raises:
        CannotCalibrate: a request failed.
        SwapServeError: a command was refused.
    """
    return asyncio.run(_Bench(ground, session, repeats, say).run())


class _Bench:
    def __init__(self, ground: Ground, session: Session, repeats: int, say: Say) -> None:
        self._names = ground.names
        self._session = session
        self._repeats = repeats
        self._say = say
        self._found = Calibration()
        self._numbers = iter(range(10**6))

    async def run(self) -> Calibration:
        async with http_client() as http:
            self._http = http
            self._say("first starts")
            for name in self._names:
                await self._ask(name, LENGTHS[0], ANSWER)
                self._found.cold.append(await self._last_swap_s(name))
            # A golden image's first restore is checked with a canary, and takes longer.
            for name in self._names[:-1]:
                await self._ask(name, LENGTHS[0], ANSWER)
            self._say("prompts and answers")
            await self._serving(self._names[-2])
            self._say("moves of idle engines")
            for number in range(2 * self._repeats):
                await self._idle(self._names[-2 + number % 2], self._names[-1 - number % 2])
            self._say("moves of busy engines")
            for _ in range(self._repeats):
                await self._busy(self._names[0])
        return self._found

    async def _serving(self, name: EngineName) -> None:
        for tokens in LENGTHS * self._repeats:
            stream = await self._ask(name, tokens, ANSWER)
            if stream.prompt_tokens not in {None, tokens}:
                raise CannotCalibrate(f"{tokens} tokens, the engine says {stream.prompt_tokens}")
            self._found.first.setdefault(tokens, []).append(stream.ttft_s)
            self._found.itl.append(stream.itl_s)
        for _ in range(self._repeats):
            async with asyncio.TaskGroup() as tasks:
                first = tasks.create_task(self._ask(name, LENGTHS[1], ANSWER))
                await asyncio.sleep(BEHIND_S)
                second = tasks.create_task(self._ask(name, LENGTHS[1], ANSWER))
            behind = second.result().at[0] - first.result().at[-1]
            self._found.queued.append(behind - self._found.first_s(LENGTHS[1]))

    async def _idle(self, leaves: EngineName, comes: EngineName) -> None:
        """Ask for an engine while the other one is there and idle."""
        await self._ask(leaves, LENGTHS[0], 1)
        await self._quiet(leaves)
        stream = await self._ask(comes, LENGTHS[1], ANSWER)
        out_s, in_s = await self._last_swap_s(leaves), await self._last_swap_s(comes)
        hot_s = self._found.first_s(LENGTHS[1])
        self._found.out_idle.append(out_s)
        self._found.in_idle.append(stream.ttft_s - hot_s - out_s)
        self._found.in_idle_daemon.append(in_s)

    async def _busy(self, name: EngineName) -> None:
        """Swap an engine out in mid-answer, and in again."""
        answer = min(BUSY_MOST, BUSY_AFTER + round(BUSY_S / self._found.itl_s))
        enough = asyncio.Event()

        def seen(stream: Stream) -> None:
            if len(stream.at) >= BUSY_AFTER:
                enough.set()

        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(self._ask(name, LENGTHS[1], answer, on_token=seen))
            await enough.wait()
            _, out = await asyncio.to_thread(self._session.swap_out, name)
            begun = time.monotonic()
            _, back = await asyncio.to_thread(self._session.swap_in, name)
        stream = asked.result()
        if stream.longest_gap[1] < begun:
            raise CannotCalibrate(f"{name}: {answer} tokens were over before the engine was away")
        self._found.out_busy.append(out.seconds)
        self._found.in_busy.append(stream.longest_gap[1] - begun - self._found.itl_s)
        self._found.in_busy_daemon.append(back.seconds)

    async def _ask(
        self,
        name: EngineName,
        tokens: int,
        answer: int,
        *,
        on_token: Callable[[Stream], None] = lambda _: None,
    ) -> Stream:
        text = prompt(tokens, next(self._numbers))
        found = await ask(
            self._http, self._session.address, body(name, text, answer), on_token=on_token
        )
        if found.error is not None:
            raise CannotCalibrate(f"{name}: {found.error}")
        return found

    async def _quiet(self, name: EngineName) -> None:
        await asyncio.to_thread(self._session.quiet, name)

    async def _last_swap_s(self, name: EngineName) -> float:
        status = await asyncio.to_thread(self._session.engine, name)
        if status.last_swap is None or status.last_swap.error is not None:
            raise CannotCalibrate(f"{name} has not moved: {status.last_swap}")
        return status.last_swap.seconds

    _http: aiohttp.ClientSession
