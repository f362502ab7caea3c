"""What a run comes to, real or simulated, and how the two compare. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.stats import percentile

BOUND = 0.25
"""Part by which a real figure may differ from the simulated one, and real runs from each other."""
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
        simulated: median over the simulated runs.
        low, high: the tenth and ninetieth percentile of those.
        verdict: None if the figure is only told.
    """

    name: str
    real: Sequence[float]
    simulated: float
    low: float
    high: float
    verdict: Verdict | None

    @property
    def ratio(self) -> float | None:
        """The real runs' median over the simulated one; None if that is zero."""
        return statistics.median(self.real) / self.simulated if self.simulated else None


def compare(
    real: Sequence[Mapping[str, float]], simulated: Sequence[Mapping[str, float]]
) -> list[Compared]:
    """Compare figures of real runs of a trace with those of simulated ones."""
    found = []
    for name in simulated[0]:
        runs = [one[name] for one in real]
        those = [one[name] for one in simulated]
        found.append(
            Compared(
                name=name,
                real=runs,
                simulated=statistics.median(those),
                low=percentile(those, 0.1),
                high=percentile(those, 0.9),
                verdict=judge(runs, statistics.median(those)) if name in JUDGED else None,
            )
        )
    return found


def judge(real: Sequence[float], simulated: float) -> Verdict:
    """Say whether real runs are within the bound of the simulated figure.

    The rule is fixed before anything is measured. If the real runs differ by more than the bound
    among themselves, no verdict but by unanimity: met if all are within it, not met if all are
    beyond it on the same side.
    """
    least, most = (1.0 - BOUND) * simulated, (1.0 + BOUND) * simulated
    if all(least <= each <= most for each in real):
        return "met"
    if all(each > most for each in real) or all(each < least for each in real):
        return "not met"
    if max(real) > (1.0 + BOUND) * min(real):
        return "too noisy"
    return "met" if least <= statistics.median(real) <= most else "not met"
