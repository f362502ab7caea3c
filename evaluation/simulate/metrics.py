"""What is reported of simulated runs. Pure. Each figure is defined in `evaluation/README.md`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.simulate.outcome import UNSET, Activity, Outcome
from swapserve.states import Priority

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """When a request counts as served well."""

    ttft_s: float = 10.0
    """Longest time to the first token for who waits in front of it."""
    itl_s: float = 0.2
    """Longest mean gap between tokens, for readers that have no target of their own."""
    batch_slowdown: float = 10.0
    """How many times as long as by itself, after `ttft_s`, a batch request may take."""


def summarise(outcomes: Sequence[Outcome], targets: Targets) -> dict[str, Any]:
    """Return the figures of runs of the same workload with different seeds, pooled.

    Raises:
        ValueError: no runs.
    """
    if not outcomes:
        raise ValueError("no runs")
    activities = [outcome.activity for outcome in outcomes]
    seconds = sum(activity.seconds for activity in activities)
    sent = sum(len(outcome.workload) for outcome in outcomes)
    good = sum(sum(_good(outcome, targets)) for outcome in outcomes)
    device_s = sum(activity.seconds * activity.gpus for activity in activities)
    return {
        "requests": sent,
        "seconds": seconds,
        "answered": sum(sum(ended != UNSET for ended in o.records.ended) for o in outcomes),
        "refused": _refused(outcomes),
        "ttft_s": _times(outcomes, "ttft"),
        "e2e_s": _times(outcomes, "e2e"),
        "tpot_s": _times(outcomes, "tpot"),
        "ttft_p99_s_by_seed": [
            quantiles(_each(outcome, "ttft", None)).get("p99") for outcome in outcomes
        ],
        "goodput_per_s": good / seconds if seconds else 0.0,
        "attainment": good / sent if sent else 1.0,
        "attainment_by_priority": _attainment(outcomes, targets),
        "serving_share": _part(activities, "serving_s", device_s),
        "overhead_share": _part(activities, "moving_s", device_s),
        **{
            name: sum(getattr(activity, name) for activity in activities)
            for name in (
                "swaps_in",
                "swaps_out",
                "cold_starts",
                "caches_dropped",
                "lowered",
                "raised",
                "drains",
                "preemptions",
                "tokens_preempted",
                "prompt_tokens",
            )
        },
        "swaps_per_request": sum(a.swaps_in + a.cold_starts for a in activities) / max(1, sent),
        "longest_wait_s": max((_longest_wait(outcome) for outcome in outcomes), default=0.0),
        "longest_suspension_s": max(
            (max(outcome.records.spell_s, default=0.0) for outcome in outcomes), default=0.0
        ),
        "fairness": fairness(outcomes),
        "p90_covers": _covered(outcomes),
        "events": sum(activity.events for activity in activities),
        "cpu_s": sum(outcome.cpu_s for outcome in outcomes),
    }


# ------------------------------------------------------------------- times


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """Return count, nearest-rank percentiles, largest and mean; only the count of nothing."""
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        return {"n": 0}
    found = {name: ordered[min(count - 1, int(share * count))] for name, share in SHARES.items()}
    return {"n": count, **found, "max": ordered[-1], "mean": sum(ordered) / count}


def _times(outcomes: Sequence[Outcome], what: str) -> dict[str, dict[str, float]]:
    found = {"all": quantiles(value for o in outcomes for value in _each(o, what, None))}
    for priority in Priority:
        values = [value for o in outcomes for value in _each(o, what, priority)]
        if values:
            found[priority.name.lower()] = quantiles(values)
    return found


def _each(outcome: Outcome, what: str, priority: Priority | None) -> list[float]:
    records, work = outcome.records, outcome.workload
    found = []
    for number, wanted in enumerate(work.priority):
        if priority is not None and wanted != priority:
            continue
        arrived, first, ended = (
            records.arrived[number],
            records.first_at[number],
            records.ended[number],
        )
        if what == "ttft" and first != UNSET:
            found.append(first - arrived)
        elif what == "e2e" and ended != UNSET:
            found.append(ended - arrived)
        elif what == "tpot" and ended != UNSET and work.tokens_out[number] > 1:
            found.append((ended - first) / (work.tokens_out[number] - 1))
    return found


def _longest_wait(outcome: Outcome) -> float:
    records = outcome.records
    return max(
        (
            granted - arrived
            for granted, arrived in zip(records.granted, records.arrived, strict=True)
            if granted != UNSET
        ),
        default=0.0,
    )


# ----------------------------------------------------------------- goodput


def _good(outcome: Outcome, targets: Targets) -> list[bool]:
    """Return of each request whether it was served as it should be."""
    records, work = outcome.records, outcome.workload
    found = []
    for number in range(len(work)):
        ended = records.ended[number]
        if ended == UNSET:
            found.append(False)
            continue
        arrived, first = records.arrived[number], records.first_at[number]
        if work.priority[number] is Priority.BATCH:
            allowed = targets.ttft_s + targets.batch_slowdown * outcome.alone_s[number]
            found.append(ended - arrived <= allowed)
        else:
            gaps = work.tokens_out[number] - 1
            itl_s = work.reader_itl_s[number] or targets.itl_s
            in_pace = not gaps or (ended - first) / gaps <= itl_s
            found.append(first - arrived <= targets.ttft_s and in_pace)
    return found


def _attainment(outcomes: Sequence[Outcome], targets: Targets) -> dict[str, float]:
    sent = dict.fromkeys(Priority, 0)
    good = dict.fromkeys(Priority, 0)
    for outcome in outcomes:
        for priority, was_good in zip(
            outcome.workload.priority, _good(outcome, targets), strict=True
        ):
            sent[priority] += 1
            good[priority] += was_good
    return {each.name.lower(): good[each] / sent[each] for each in Priority if sent[each]}


def _refused(outcomes: Sequence[Outcome]) -> dict[str, int]:
    found: dict[str, int] = {}
    for outcome in outcomes:
        for error in outcome.records.refused.values():
            found[error] = found.get(error, 0) + 1
    return found


# ---------------------------------------------------------------- machines


def _part(activities: Sequence[Activity], name: str, device_s: float) -> float:
    return sum(getattr(activity, name) for activity in activities) / device_s if device_s else 0.0


def jain(values: Sequence[float]) -> float:
    """Return Jain's index: 1 if all are equal, one over their number if one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def fairness(outcomes: Sequence[Outcome]) -> float:
    """Return Jain's index over the models, each with the mean speed of its requests.

    A request's speed is the time that it takes by itself over the time that it took; of one that
    was refused it is zero.
    """
    speeds: dict[int, list[float]] = {}
    for outcome in outcomes:
        for number, model in enumerate(outcome.workload.model):
            took = outcome.e2e_s(number)
            speed = outcome.alone_s[number] / took if took else 0.0
            speeds.setdefault(model, []).append(speed)
    return jain([sum(each) / len(each) for each in speeds.values()])


def _covered(outcomes: Sequence[Outcome]) -> dict[str, float]:
    within = sum(outcome.covered[0] for outcome in outcomes)
    counted = sum(outcome.covered[1] for outcome in outcomes)
    return {"share": within / counted if counted else 0.0, "n": counted}
