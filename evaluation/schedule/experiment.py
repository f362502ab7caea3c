"""The order of things: measure, replay every profile, simulate, compare."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from evaluation.machine import watched
from evaluation.schedule.calibrate import CALIBRATED, Calibration, Pace, calibrate
from evaluation.schedule.figures import BOUND, Compared, Run, compare
from evaluation.schedule.ground import Ground
from evaluation.schedule.predict import cluster, predict
from evaluation.schedule.profiles import PROFILES
from evaluation.schedule.replay import Replayed, replay
from evaluation.simulate import Workload
from swapserve.blueprint import rules_of

METHOD = (
    "What engines and moves take is measured through the front door, before the first round of real"
    " runs and after each; the simulator gets the medians of all that, the daemon's rules and the"
    " very trace that was replayed, and it begins with what the daemon had learnt by then. Since a"
    " machine's cores change from minute to minute, engines compute and move at the pace of that"
    " very run: its mean gap between two tokens, its median ways in, over the calibrated ones;"
    " nothing else is taken from it, and `calibrated_only` is without. A simulated figure is"
    " the median over simulations whose moves vary as the measured ones did. Verdicts: met if every"
    f" real run is within {BOUND:.0%} of it; not met if all are beyond on one side; else too noisy"
    f" if the ratios differ by more than {BOUND:.0%} among themselves; else by their median."
)
Say = Callable[[str], None]
Key = tuple[str, str]
"""Profile and policy."""


class Experiment:
    """Everything that is measured in one go.

    Args:
        here: engines and their device.
        profiles: names of the traces.
        policies: names of the daemon's policies.
        part: of each profile's usual length.
        seed: of the traces.
        say: told what is going on.
    """

    def __init__(
        self,
        here: Ground,
        profiles: Sequence[str],
        policies: Sequence[str],
        *,
        part: float,
        seed: int,
        say: Say,
    ) -> None:
        self._here = here
        self._keys = [(profile, policy) for profile in profiles for policy in policies]
        self._part = part
        self._seed = seed
        self._say = say
        self._calibrations: list[Calibration] = []
        self._replayed: dict[Key, list[Replayed]] = {key: [] for key in self._keys}
        self._machine: dict[Key, list[dict[str, float]]] = {key: [] for key in self._keys}
        self._learnt: dict[Key, list[object]] = {key: [] for key in self._keys}
        self._traces: dict[str, Workload] = {}

    def calibrate(self, repeats: int) -> None:
        """Measure engines and moves; the first time, make the traces after it.

        Raises:
            CannotCalibrate: a request failed.
            Missing: the daemon does not start.
        """
        self._say("calibration")
        with self._here.daemon("adaptive") as session:
            found = calibrate(self._here, session, repeats=repeats, say=self._say)
        self._calibrations.append(found)
        if not self._traces:
            here = cluster(self._here, found)
            self._traces = {
                name: PROFILES[name].trace(here, part=self._part, seed=self._seed)
                for name in dict(self._keys)
            }

    def round(self) -> None:
        """Replay every profile under every policy once.

        Raises:
            Missing: the daemon does not start.
        """
        for profile, policy in self._keys:
            trace = self._traces[profile]
            self._say(f"{profile}, {policy}: {len(trace)} requests")
            self._learnt[profile, policy].append(self._here.learnt())
            with self._here.daemon(policy) as session, watched() as machine:
                found = replay(self._here, session, trace)
            figures = found.run.figures()
            self._say(
                f"  {figures['seconds']:.0f} s, {figures['swaps']:.0f} swaps,"
                f" TTFT {figures['ttft_p50_s']:.2f} / {figures['ttft_p90_s']:.2f} s"
            )
            self._replayed[profile, policy].append(found)
            self._machine[profile, policy].append(machine)

    def result(self, seeds: int) -> dict[str, Any]:
        """Simulate every real run, so many times each, and compare."""
        pooled = Calibration.pooled(self._calibrations)
        profiles = {}
        for (profile, policy), replayed in self._replayed.items():
            if not replayed:
                continue
            trace = self._traces[profile]
            paces = [
                pooled.pace(one.itl_s, one.ways_in("golden"), one.ways_in("live"))
                for one in replayed
            ]
            simulated = self._simulated((profile, policy), pooled, paces, seeds)
            blind = self._simulated((profile, policy), pooled, [CALIBRATED] * len(paces), seeds)
            real = [one.run.figures() for one in replayed]
            profiles[f"{profile}, {policy}"] = {
                "profile": profile,
                "policy": policy,
                "about": PROFILES[profile].about,
                "requests": len(trace),
                "figures": _by_name(compare(real, _figures(simulated))),
                "calibrated_only": _by_name(compare(real, _figures(blind))),
                "forecasts": _coverage([one.run for one in replayed]),
                "forecasts_simulated": _coverage([run for group in simulated for run in group]),
                "trace": [trace.arrival, trace.model, trace.tokens_in, trace.tokens_out],
                "runs": [
                    {"machine": machine, "pace": asdict(pace), **one.as_json()}
                    for one, machine, pace in zip(
                        replayed, self._machine[profile, policy], paces, strict=True
                    )
                ],
            }
        return {
            "method": METHOD,
            "calibration": pooled.as_json(),
            "profiles": profiles,
            "forecasts": _coverage([one.run for found in self._replayed.values() for one in found]),
        }

    def _simulated(
        self, key: Key, found: Calibration, paces: Sequence[Pace], seeds: int
    ) -> list[list[Run]]:
        """Return the simulations of each real run, at those paces."""
        profile, policy = key
        rules = rules_of(self._here.config(policy), wall_offset_s=0.0)
        return [
            predict(
                cluster(self._here, found, pace),
                self._traces[profile],
                policy,
                rules,
                noise=found.noise(),
                learnt=learnt,
                seeds=range(seeds),
            )
            for pace, learnt in zip(paces, self._learnt[key], strict=True)
        ]


def _figures(groups: Sequence[Sequence[Run]]) -> list[list[dict[str, float]]]:
    return [[run.figures() for run in group] for group in groups]


def _by_name(compared: Sequence[Compared]) -> dict[str, Any]:
    return {one.name: asdict(one) for one in compared}


def _coverage(runs: Sequence[Run]) -> dict[str, Any]:
    """Return how many requests were forecast, and which share took no longer than the P90."""
    count, met = sum(run.forecasts for run in runs), sum(run.forecasts_met for run in runs)
    return {"count": count, "met": met, "share": met / count if count else None}
