"""From samples to medians, ratios and verdicts. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from evaluation.stats import (
    LEAST_PAIRS,
    WIDEST_INTERVAL,
    Interval,
    Verdict,
    above,
    below,
    interval,
)

Sample = dict[str, Any]
Arm = tuple[float, str]
"""Idle seconds and huge page setting."""

MOST_OVER_BARE = 1.25
MOST_OVER_KILL_S = 0.05
LEAST_COLD_RATIO = {
    ("vllm", 0.0, "on"): 15.0,
    ("vllm", 30.0, "off"): 3.0,
    ("vllm", 30.0, "on"): 3.0,
}
TIMED = ("cold", "swap_in", "bare", "hot", "discard", "kill")
METHOD = {
    "first token": "from before the request is sent (bare: before CRIU is started) to the first"
    " piece of text; same client, request, image and sandbox in every arm",
    "cold": "the same command line without a golden image, through the front door, up to the"
    " first token of the engine's first request; that is SwapServe's warm-up, so a hot request of"
    " the same length, measured just after, is taken off; the first start of each engine is"
    " dropped",
    "bare": "fork, exec criu restore on the golden image, then the request straight to the engine",
    "kill": "from SIGKILL until the first process of a bare engine's tree is reaped",
    "swap_in": "a request through the front door for an engine that was discarded",
    "idle": "seconds between the end of the engine's last life and the beginning of this one",
    "huge pages": "transparent huge pages at `always` while CRIU restores, in both arms",
    "swapin_over_bare": "swap_in / bare within a pair, back to back in random order",
    "cold_over_swapin": "cold / median swap_in of the same cycle (of all cycles where that one has"
    " none) with the same idle time",
    "discard_minus_kill_s": "seconds of a discard as its caller sees it - kill, within a pair",
    "verdict": "upper end of the 95 % bootstrap interval of the median against the bound, at least"
    f" {LEAST_PAIRS} pairs; 'too noisy' if the interval holds the bound and is wider than"
    f" {WIDEST_INTERVAL:.0%} of the median",
    "preempt": "counted only with 50 token ids on each side of the longest silence, a silence"
    " at least as long as the engine was away, its old process gone and another one afterwards",
}


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return medians, ratios and verdicts by engine."""
    names = sorted({sample["engine"] for sample in samples})
    return {
        name: _engine(name, [sample for sample in samples if sample["engine"] == name])
        for name in names
    }


def _engine(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    arms = sorted({_arm(sample) for sample in samples if "pair" in sample})
    without_idle = [sample for sample in samples if not sample["idle_s"]]
    exact = _streams(_of(samples, "preempt"))
    return {
        "arms": [_summary(name, arm, samples) for arm in arms],
        "swapin_over_bare": _judged(_over_bare(without_idle), MOST_OVER_BARE),
        "discard_minus_kill_s": _judged(_over_kill(without_idle), MOST_OVER_KILL_S),
        "preempt_tokens_equal": exact["tokens_equal"],
        "preempt": exact,
        "batched": _streams(batched) if (batched := _of(samples, "batch")) else None,
        "image_bytes": max((one["image_bytes"] for one in _of(samples, "swap_in")), default=None),
    }


def _summary(name: str, arm: Arm, samples: Sequence[Sample]) -> dict[str, Any]:
    idle_s, huge_pages = arm
    here = [one for one in samples if _arm(one) == arm]
    # A cold start knows nothing of huge pages: it stands for both settings.
    cold = [one for one in _of(samples, "cold") if one["idle_s"] == idle_s]
    ratios = _cold_over_swap_in(cold, _of(here, "swap_in"))
    found: dict[str, Any] = {"idle_s": idle_s, "huge_pages": huge_pages}
    for what in TIMED:
        values = _seconds(cold if what == "cold" else here, what)
        found[what] = asdict(interval(values)) if values else None
    found["swapin_over_bare"] = _judged(_over_bare(here), MOST_OVER_BARE)
    least = LEAST_COLD_RATIO.get((name, idle_s, huge_pages))
    found["cold_over_swapin"] = _at_least(ratios, least)
    found["phases"] = _phases(_of(here, "swap_in"))
    return found


def _arm(sample: Sample) -> Arm:
    return float(sample["idle_s"]), str(sample["huge_pages"])


def _of(samples: Iterable[Sample], what: str) -> list[Sample]:
    return [sample for sample in samples if sample["what"] == what]


def _seconds(samples: Iterable[Sample], what: str) -> list[float]:
    if what == "kill":
        return [sample["kill_s"] for sample in _of(samples, "bare")]
    return [sample["seconds"] for sample in _of(samples, what)]


def _by_pair(samples: Iterable[Sample], what: str) -> dict[int, Sample]:
    return {sample["pair"]: sample for sample in _of(samples, what)}


def _over_bare(samples: Sequence[Sample]) -> list[float]:
    bare = _by_pair(samples, "bare")
    return [
        sample["seconds"] / bare[pair]["seconds"]
        for pair, sample in _by_pair(samples, "swap_in").items()
        if pair in bare
    ]


def _over_kill(samples: Sequence[Sample]) -> list[float]:
    bare = _by_pair(samples, "bare")
    return [
        sample["seconds"] - bare[pair]["kill_s"]
        for pair, sample in _by_pair(samples, "discard").items()
        if pair in bare
    ]


def _cold_over_swap_in(cold: Sequence[Sample], swap_in: Sequence[Sample]) -> list[float]:
    if not swap_in:
        return []
    overall = statistics.median(sample["seconds"] for sample in swap_in)
    by_cycle = defaultdict(list)
    for sample in swap_in:
        by_cycle[sample["cycle"]].append(sample["seconds"])
    return [
        sample["seconds"] / statistics.median(by_cycle.get(sample["cycle"]) or [overall])
        for sample in cold
    ]


def _phases(swap_in: Sequence[Sample]) -> dict[str, float]:
    """Return the median seconds of every phase that most swaps have."""
    seconds = defaultdict(list)
    for sample in swap_in:
        for phase, value in sample["swap"]["phases"].items():
            seconds[phase].append(value)
    return {
        phase: statistics.median(values)
        for phase, values in seconds.items()
        if 2 * len(values) > len(swap_in)
    }


def _judged(values: Sequence[float], most: float) -> dict[str, Any] | None:
    if not values:
        return None
    found = interval(values)
    return _with(found, {"at_most": most}, below(found, most))


def _at_least(values: Sequence[float], least: float | None) -> dict[str, Any] | None:
    if not values:
        return None
    found = interval(values)
    if least is None:
        return asdict(found)
    return _with(found, {"at_least": least}, above(found, least))


def _with(found: Interval, bound: dict[str, float], verdict: Verdict) -> dict[str, Any]:
    return {**asdict(found), **bound, "verdict": verdict}


def _streams(samples: Sequence[Sample]) -> dict[str, Any]:
    """Summarise preempted streams; `tokens_equal` is true only if every cycle shows it."""
    cases = [case for sample in samples for case in sample["cases"]]
    counted = [case for case in cases if case["counted"]]
    every = bool(samples) and len(counted) == len(cases)
    asked = [case["equal"] for case in counted if case["equal"] is not None]
    return {
        "streams": len(cases),
        "counted": len(counted),
        "whole": every and all(case["whole"] for case in counted),
        "tokens_equal": (every and all(asked)) if asked or not every else None,
        "swap_out_s": _median([sample["swap_out_s"] for sample in samples]),
        "swap_in_s": _median([sample["swap_in_s"] for sample in samples]),
        "image_bytes": _median([sample["swap_out"]["bytes"] for sample in samples]),
    }


def wrong_streams(samples: Iterable[Sample]) -> int:
    """Count the streams that were preempted beyond doubt and then were wrong."""
    cases = (case for sample in samples for case in sample.get("cases", ()))
    return sum(case["counted"] and (case["equal"] is False or not case["whole"]) for case in cases)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
