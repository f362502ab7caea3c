"""What a run comes to, real or simulated, and how the two compare. Pure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.stats import percentile

BOUND = 0.25
"""Part by which a real figure may differ from the simulated one, and their ratios by run."""
JUDGED = ("ttft_p50_s", "ttft_p90_s", "ttft_mean_s", "e2e_p50_s", "e2e_p90_s", "swaps")
"""Figures that a verdict is given on; the others are told."""

Verdict = Literal["met", "not met", "too noisy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a run; times in seconds from its beginning, None for what never happened."""

    model: int
    priority: str
    tokens_out: int
    sent: float
    first: float | None
    last: float | None
    error: str | None = None

    @property
    def answered(self) -> bool:
        """Whether all of its tokens came."""
        return self.error is None and self.first is not None and self.last is not None

    @property
    def ttft_s(self) -> float:
        """Time to its first token; only of one that was answered."""
        assert self.first is not None
        return self.first - self.sent

    @property
    def e2e_s(self) -> float:
        """Time to its last token; only of one that was answered."""
        assert self.last is not None
        return self.last - self.sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a trace.

    Attributes:
        requests: in the trace's order.
        seconds: from the first request to the last token.
        swaps: moves in.
        moving_s: time in which an engine was on its way there or back.
        preemptions: how often a request was suspended.
        forecasts: requests whose time was predicted.
        forecasts_met: of those, how many took no longer than the P90.
    """

    requests: Sequence[Request]
    seconds: float
    swaps: int
    moving_s: float
    preemptions: int
    forecasts: int
    forecasts_met: int

    def figures(self) -> dict[str, float]:
        """Return everything by name.

        Raises:
            ValueError: nothing was answered.
        """
        answered = [request for request in self.requests if request.answered]
        ttft = [request.ttft_s for request in answered]
        e2e = [request.e2e_s for request in answered]
        return {
            "ttft_p50_s": statistics.median(ttft),
            "ttft_p90_s": percentile(ttft, 0.9),
            "ttft_mean_s": statistics.fmean(ttft),
            "longest_wait_s": max(ttft),
            "e2e_p50_s": statistics.median(e2e),
            "e2e_p90_s": percentile(e2e, 0.9),
            "e2e_mean_s": statistics.fmean(e2e),
            "swaps": self.swaps,
            "preemptions": self.preemptions,
            "overhead_share": self.moving_s / self.seconds,
            "seconds": self.seconds,
            "failed": len(self.requests) - len(answered),
            **self._by_priority(answered),
        }

    def _by_priority(self, answered: Sequence[Request]) -> dict[str, float]:
        found: dict[str, float] = {}
        priorities = sorted({request.priority for request in answered})
        for priority in priorities if len(priorities) > 1 else ():
            those = [request for request in answered if request.priority == priority]
            ttft = [request.ttft_s for request in those]
            found[f"{priority}_ttft_p50_s"] = statistics.median(ttft)
            found[f"{priority}_ttft_p90_s"] = percentile(ttft, 0.9)
            found[f"{priority}_e2e_p50_s"] = statistics.median([each.e2e_s for each in those])
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One figure of a profile.

    Attributes:
        real: of each real run.
        simulated: for each of them the median of its simulations.
        low, high: the tenth and ninetieth percentile of all these.
        ratios: real over simulated; None where something was simulated not to happen.
        verdict: None if the figure is only told.
    """

    name: str
    real: Sequence[float]
    simulated: Sequence[float]
    low: float
    high: float
    ratios: Sequence[float | None]
    verdict: Verdict | None


Figures = Mapping[str, float]


def compare(real: Sequence[Figures], simulated: Sequence[Sequence[Figures]]) -> list[Compared]:
    """Compare figures of real runs of a trace, each with those of its simulations."""
    found = []
    for name in real[0]:
        runs = [one[name] for one in real]
        those = [[one[name] for one in group] for group in simulated]
        middles = [statistics.median(group) for group in those]
        every = [each for group in those for each in group]
        ratios = [_ratio(one, middle) for one, middle in zip(runs, middles, strict=True)]
        found.append(
            Compared(
                name=name,
                real=runs,
                simulated=middles,
                low=percentile(every, 0.1),
                high=percentile(every, 0.9),
                ratios=ratios,
                verdict=judge(ratios) if name in JUDGED else None,
            )
        )
    return found


def _ratio(real: float, simulated: float) -> float | None:
    if real == simulated:
        return 1.0
    return real / simulated if simulated else None


def judge(given: Sequence[float | None]) -> Verdict:
    """Say whether real runs are as simulated, by the ratios of the two.

    The rule is fixed before anything is measured. Met if all are within the bound, not met if all
    are beyond it on the same side. Otherwise, if they differ by more than the bound among
    themselves, there is no verdict; else their median decides.
    """
    ratios = [math.inf if each is None else each for each in given]
    least, most = 1.0 - BOUND, 1.0 + BOUND
    if all(least <= each <= most for each in ratios):
        return "met"
    if all(each > most for each in ratios) or all(each < least for each in ratios):
        return "not met"
    if max(ratios) > most * min(ratios):
        return "too noisy"
    return "met" if least <= statistics.median(ratios) <= most else "not met"
