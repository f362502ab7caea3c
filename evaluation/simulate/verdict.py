"""How the default policy does against the others, by rules that are fixed beforehand. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from swapserve.scheduler.policies.registry import DEFAULT

BOUND = "static"
"""Holds everything at once: what no policy that swaps can reach."""
DRAINS = "fifo-drain"
NO_WORSE = 1.05
"""The default's p99 TTFT over that of the best other policy with as much goodput."""
EQUAL_GOODPUT = 0.99
"""So much of the default's goodput is as much."""
LEAST_S = 0.1
"""Shorter times to the first token are equal."""
TIMES_BETTER = 3.0
"""In `mixed`: p99 TTFT of interactive requests under `fifo-drain` over the default's."""


def judge(rows: Sequence[dict[str, Any]], *, max_wait_s: float) -> dict[str, Any]:
    """Return what holds in each group of rows with the same workload, and whether in all.

    `against_best`: the default against the best of the others, on the p99 TTFT of interactive
    requests. `against_drain`: in `mixed`, against draining. `waits`: nobody waited longer than
    `max_wait_s` where all models of a GPU can be brought in once within it.
    """
    groups: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["profile"], row["gpus"], row["models"])
        groups.setdefault(key, {})[row["policy"]] = row
    found = []
    for (profile, gpus, models), policies in groups.items():
        if DEFAULT in policies:
            found.append(
                {
                    "profile": profile,
                    "gpus": gpus,
                    "models": models,
                    "against_best": _against_best(policies),
                    "against_drain": _against_drain(policies) if profile == "mixed" else None,
                    "waits": _waits(policies[DEFAULT], max_wait_s),
                }
            )
    return {
        "groups": found,
        **{name: _all(found, name) for name in ("against_best", "against_drain", "waits")},
    }


def _all(found: Iterable[dict[str, Any]], name: str) -> bool | None:
    judged = [group[name]["met"] for group in found if group[name] is not None]
    return all(judged) if judged else None


def _p99(row: dict[str, Any]) -> float | None:
    """Return the p99 TTFT of those who wait in front of it: of a batch nobody minds."""
    times = row["ttft_s"]
    value: float | None = times.get("interactive", times["all"]).get("p99")
    return value


def _against_best(policies: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    mine = policies[DEFAULT]
    rivals = {
        name: p99
        for name, row in policies.items()
        if name not in {DEFAULT, BOUND}
        and row["goodput_per_s"] >= EQUAL_GOODPUT * mine["goodput_per_s"]
        and (p99 := _p99(row)) is not None
    }
    own = _p99(mine)
    if own is None or not rivals:
        return None
    best = min(rivals, key=rivals.__getitem__)
    ratio = max(own, LEAST_S) / max(rivals[best], LEAST_S)
    return {"best": best, "ratio": ratio, "met": ratio <= NO_WORSE}


def _against_drain(policies: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    if DRAINS not in policies:
        return None
    own, other = (_p99(policies[name]) for name in (DEFAULT, DRAINS))
    if own is None or other is None:
        return None
    if not policies[DEFAULT]["round_s"]:
        return None  # nobody swaps: there is nothing to be better at
    ratio = other / max(own, 1e-9)
    return {"ratio": ratio, "met": ratio >= TIMES_BETTER}


def _waits(row: dict[str, Any], max_wait_s: float) -> dict[str, Any] | None:
    if row["round_s"] > max_wait_s:
        return None
    longest = row["longest_wait_s"]
    return {"longest_s": longest, "met": longest <= max_wait_s}
