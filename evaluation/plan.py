"""What is measured in which order, and about how long that takes. Pure."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.engines import EngineKind
from evaluation.session import HugePages

What = Literal["pairs", "cold", "preempt", "batch"]
Leg = Literal["bare", "swap_in"]

PAIRS = 4
"""Pairs of an arm without idle time in each cycle: 20 in five cycles."""
IDLE_PAIRS = 1
EVERY_CYCLE_UNTIL = 4
"""With so many cycles or more, an engine's arms with idle time come in every second one only."""
AWAY_S = 2.0
"""How long a preempted engine stays away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One group of samples; `legs` is the order within each pair."""

    kind: EngineKind
    what: What
    idle_s: float = 0.0
    legs: tuple[tuple[Leg, Leg], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Steps under one daemon, with one huge page setting."""

    cycle: int
    huge_pages: HugePages
    steps: tuple[Step, ...]


def plan(
    kinds: Sequence[EngineKind],
    *,
    cycles: int,
    idles: Sequence[float],
    huge_pages: Sequence[HugePages],
    seed: int,
) -> list[Block]:
    """Return all blocks in order; the same for the same arguments.

    In each cycle every arm comes in random order: huge page settings, steps within them, legs
    within a pair. What does not depend on huge pages (cold starts, preemption) is done under one
    setting per cycle, in turn.
    """
    rng = random.Random(seed)
    blocks = []
    for cycle in range(cycles):
        settings = rng.sample(huge_pages, k=len(huge_pages))
        with_rest = huge_pages[cycle % len(huge_pages)]
        for setting in settings:
            steps = _pairs(kinds, idles, cycle, cycles, rng)
            if setting == with_rest:
                steps += _rest(kinds, idles, cycle, cycles)
            rng.shuffle(steps)
            blocks.append(Block(cycle=cycle, huge_pages=setting, steps=tuple(steps)))
    return blocks


def _pairs(
    kinds: Sequence[EngineKind],
    idles: Iterable[float],
    cycle: int,
    cycles: int,
    rng: random.Random,
) -> list[Step]:
    steps = []
    for idle_s in idles:
        for place, kind in enumerate(kinds):
            if _due(idle_s, place, cycle, cycles):
                count = IDLE_PAIRS if idle_s else PAIRS
                legs = tuple(_legs(rng) for _ in range(count))
                steps.append(Step(kind=kind, what="pairs", idle_s=idle_s, legs=legs))
    return steps


def _legs(rng: random.Random) -> tuple[Leg, Leg]:
    return ("bare", "swap_in") if rng.random() < 0.5 else ("swap_in", "bare")  # noqa: PLR2004


def _rest(
    kinds: Sequence[EngineKind], idles: Iterable[float], cycle: int, cycles: int
) -> list[Step]:
    steps = [
        Step(kind=kind, what="cold", idle_s=idle_s)
        for idle_s in idles
        for place, kind in enumerate(kinds)
        if _due(idle_s, place, cycle, cycles)
    ]
    for kind in kinds:
        steps.append(Step(kind=kind, what="preempt"))
        if "batched" in kind.variants:
            steps.append(Step(kind=kind, what="batch"))
    return steps


def _due(idle_s: float, place: int, cycle: int, cycles: int) -> bool:
    return not idle_s or cycles < EVERY_CYCLE_UNTIL or (cycle + place) % 2 == 0


# ------------------------------------------------------------------ duration


@dataclass(slots=True, kw_only=True)
class Pace:
    """Seconds that the parts take; guesses until they are measured."""

    cold_s: float
    swap_in_s: float
    live_s: float
    stream_s: float
    swap_out_s: float = 0.3


DAEMON_S = 4.0
"""Start and end of a daemon."""


def guess(kind: EngineKind) -> Pace:
    """Return what the parts took on a machine with two cores."""
    if kind.name == "vllm":
        return Pace(cold_s=35.0, swap_in_s=2.0, live_s=5.0, stream_s=8.0)
    return Pace(cold_s=1.0, swap_in_s=0.4, live_s=0.5, stream_s=2.0)


def seconds(blocks: Iterable[Block], paces: dict[str, Pace]) -> float:
    """Return about how long blocks take."""
    return sum(
        DAEMON_S + sum(_step_s(step, paces[step.kind.name]) for step in block.steps)
        for block in blocks
    )


def setup_s(kinds: Iterable[EngineKind], paces: dict[str, Pace]) -> float:
    """Return about how long golden images and first cold starts take."""
    return DAEMON_S + sum(
        len(kind.variants) * (paces[kind.name].cold_s + paces[kind.name].live_s) for kind in kinds
    )


def _step_s(step: Step, pace: Pace) -> float:
    condition = pace.swap_in_s + pace.swap_out_s
    match step.what:
        case "pairs":
            return condition + len(step.legs) * 2 * (condition + step.idle_s)
        case "cold":
            return condition + pace.cold_s + step.idle_s
        case "preempt" | "batch":
            return condition + 2 * pace.live_s + 2 * pace.stream_s + AWAY_S
