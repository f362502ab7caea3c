"""What the simulator says of a trace on engines as they were measured."""

from collections.abc import Iterable

from evaluation.schedule.calibrate import CALIBRATED, Calibration, Pace
from evaluation.schedule.figures import Request, Run
from evaluation.schedule.ground import ENGINE_BYTES, Ground
from evaluation.simulate import Cluster, Model, Outcome, Workload, simulate
from evaluation.simulate.outcome import UNSET
from swapserve.messages import Rules
from swapserve.scheduler.knowledge import Knowledge

SLOTS = 1


def cluster(ground: Ground, calibration: Calibration, pace: Pace = CALIBRATED) -> Cluster:
    """Return the engines and their device as the simulator knows them, at that pace."""
    kind = calibration.kind(pace)
    models = tuple(Model(name=name, kind=kind, gpus=(0,), slots=SLOTS) for name in ground.names)
    return Cluster(models=models, gpu_bytes=(ground.held * ENGINE_BYTES,), ram_bytes=0)


def predict(
    here: Cluster,
    workload: Workload,
    policy: str,
    rules: Rules,
    *,
    noise: float,
    learnt: object,
    seeds: Iterable[int],
) -> list[Run]:
    """Simulate a trace, each time with other moves.

    Args:
        here: engines and device.
        workload: the trace.
        policy: the daemon's.
        rules: the daemon's.
        noise: standard deviation of the logarithm of a move's time.
        learnt: what the daemon's scheduler knew at the beginning, as stored; None: nothing.
        seeds: of the moves, one for each simulation.
    """
    return [
        _run(
            simulate(
                here,
                workload,
                policy,
                rules=rules,
                noise=noise,
                seed=seed,
                knowledge=Knowledge.from_json(learnt, 0.0),
            )
        )
        for seed in seeds
    ]


def _run(outcome: Outcome) -> Run:
    activity = outcome.activity
    within, counted = outcome.covered
    return Run(
        requests=[_request(outcome, number) for number in range(len(outcome.workload))],
        seconds=activity.seconds,
        swaps=activity.swaps_in,
        moving_s=activity.moving_s,
        preemptions=activity.preemptions,
        forecasts=counted,
        forecasts_met=within,
    )


def _request(outcome: Outcome, number: int) -> Request:
    records, work = outcome.records, outcome.workload
    first, ended = records.first_at[number], records.ended[number]
    return Request(
        model=work.model[number],
        priority=work.priority[number].name.lower(),
        tokens_out=work.tokens_out[number],
        sent=records.arrived[number],
        first=None if first == UNSET else first,
        last=None if ended == UNSET else ended,
        error=records.refused.get(number),
    )
