"""Many simulations: each profile on each cluster under each policy, seeds pooled."""

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

from evaluation.simulate.azure import Row, replay
from evaluation.simulate.cluster import Cluster, build
from evaluation.simulate.costs import Costs
from evaluation.simulate.load import Size
from evaluation.simulate.metrics import Targets, quantiles, summarise
from evaluation.simulate.outcome import Outcome
from evaluation.simulate.profiles import PROFILES
from evaluation.simulate.run import RULES, simulate
from evaluation.simulate.workload import Workload
from swapserve.messages import Rules
from swapserve.scheduler.plugins import load_policy

TRACE = "trace"
"""Name of the profile that replays traces given by path."""
CURVE = (*(place / 100 for place in range(1, 100)), 0.995, 0.999)
"""Shares at which the times to the first token are kept, to draw them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that decides what a grid computes."""

    costs: Costs
    profiles: tuple[str, ...]
    policies: tuple[str, ...]
    gpus: tuple[int, ...]
    models: tuple[int, ...]
    seeds: int = 1
    size: Size = field(default_factory=Size)
    held: float = 1.0
    spread: int = 0
    noise: float = 0.0
    rules: Rules = RULES
    targets: Targets = field(default_factory=Targets)
    traces: tuple[tuple[Row, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of the result."""

    profile: str
    gpus: int
    models: int
    policy: str


def cells(plan: Plan) -> list[Cell]:
    """Return all cells, those of the same workload next to each other."""
    return [
        Cell(profile=profile, gpus=gpus, models=models, policy=policy)
        for profile, gpus, models, policy in itertools.product(
            plan.profiles, plan.gpus, plan.models, plan.policies
        )
    ]


def workload(plan: Plan, profile: str, cluster: Cluster, seed: int) -> Workload:
    """Return what is asked of the cluster.

    Raises:
        ValueError: no such profile.
    """
    size = replace(plan.size, seed=seed)
    if profile == TRACE:
        return replay(plan.traces, cluster, size)
    if profile not in PROFILES:
        raise ValueError(f"'{profile}' is none of {', '.join(PROFILES)}")
    return PROFILES[profile](cluster, size)


def compute(plan: Plan, cell: Cell) -> dict[str, Any]:
    """Simulate one cell with all seeds and return its row."""
    cluster = build(
        plan.costs, gpus=cell.gpus, models=cell.models, held=plan.held, spread=plan.spread
    )
    outcomes = [
        simulate(
            cluster,
            workload(plan, cell.profile, cluster, seed),
            load_policy(cell.policy),
            rules=plan.rules,
            noise=plan.noise,
            seed=seed,
        )
        for seed in range(1, plan.seeds + 1)
    ]
    return {
        "profile": cell.profile,
        "gpus": cell.gpus,
        "models": cell.models,
        "policy": cell.policy,
        "round_s": max(cluster.round_s(gpu) for gpu in range(cluster.gpus)),
        **summarise(outcomes, plan.targets),
        "ttft_curve_s": _curve(outcomes),
    }


def _curve(outcomes: Sequence[Outcome]) -> list[float]:
    found = sorted(
        time
        for outcome in outcomes
        for number in range(len(outcome.workload))
        if (time := outcome.ttft_s(number)) is not None
    )
    return [round(found[min(len(found) - 1, int(share * len(found)))], 4) for share in CURVE]


def compute_all(
    plan: Plan, *, jobs: int, say: Callable[[str], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """Yield all rows in order.

    Args:
        plan: what to compute.
        jobs: processes to use.
        say: told of each row.
    """
    todo = cells(plan)
    if jobs == 1:
        for cell in todo:
            row = compute(plan, cell)
            say(_told(row))
            yield row
        return
    # A pool that ends its processes with the block, also where that is left by Ctrl-C; they
    # themselves leave Ctrl-C to us.
    with get_context("spawn").Pool(jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for row in pool.imap(partial(compute, plan), todo):
            say(_told(row))
            yield row


def _told(row: dict[str, Any]) -> str:
    ttft = row["ttft_s"]["all"] or quantiles(())
    p99 = ttft.get("p99")
    return (
        f"{row['profile']}, {row['gpus']} GPUs, {row['models']} models, {row['policy']}:"
        f" TTFT p99 {'-' if p99 is None else f'{p99:.1f} s'}, {row['cpu_s']:.1f} s"
    )
