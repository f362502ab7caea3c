"""`python -m evaluation schedule`: options, result file, table."""

import json
import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from evaluation import machine
from evaluation.engines import Missing
from evaluation.schedule.calibrate import CannotCalibrate
from evaluation.schedule.experiment import Experiment
from evaluation.schedule.ground import ground
from evaluation.schedule.profiles import PROFILES
from evaluation.schedule.table import missed, render
from evaluation.versions import commit
from swapserve.errors import SwapServeError
from swapserve.scheduler.policies.registry import POLICIES
from swapserve.testing.weights import SIZES

SCHEDULING = {"slo_ttft": "2s"}
"""For engines that move in some tenths of a second; all else as it is by default."""


def names(allowed: list[str], value: str) -> list[str]:
    """Read words with commas between them.

    Raises:
        BadParameter: one of them is not allowed, or there twice.
    """
    words = [word.strip() for word in value.split(",")]
    for word in words:
        if word not in allowed:
            raise click.BadParameter(f"{word!r} is none of {', '.join(allowed)}")
    if len(set(words)) < len(words):
        raise click.BadParameter(f"{value!r} names something twice")
    return words


@click.command()
@click.option(
    "--profiles",
    callback=lambda _ctx, _param, value: names(list(PROFILES), value),
    default=",".join(PROFILES),
    show_default=True,
)
@click.option(
    "--policies",
    callback=lambda _ctx, _param, value: names(list(POLICIES), value),
    default="adaptive",
    show_default=True,
)
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--engines", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option(
    "--part",
    type=click.FloatRange(min=0.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of each profile's usual length.",
)
@click.option("--repeats", type=click.IntRange(min=2), default=5, show_default=True)
@click.option("--simulations", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the traces.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Result.")
@click.option(
    "--work-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where images and state go for the time of the run  [default: the temporary directory]",
)
def schedule(
    *,
    profiles: list[str],
    policies: list[str],
    rounds: int,
    engines: int,
    size: str,
    part: float,
    repeats: int,
    simulations: int,
    seed: int,
    out: Path | None,
    work_dir: Path | None,
) -> None:
    """Replay traces against real engines and compare with the simulator.

    Some llama-servers take turns on a device that holds one of them. Needs root, CRIU and
    llama-server (scripts/host-setup); keep the machine quiet. Exit status 1 if a figure is not
    within its bound.
    """
    if os.geteuid() != 0:
        raise click.ClickException("CRIU needs root: run this as the superuser")
    if out is not None and not out.absolute().parent.is_dir():
        raise click.ClickException(f"{out.parent} is no directory to write {out.name} in")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    begun = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - begun:6.1f} s] {text}", err=True)

    result: dict[str, Any] = {
        "experiment": "schedule",
        "options": {
            "profiles": profiles,
            "policies": policies,
            "rounds": rounds,
            "engines": engines,
            "size": size,
            "part": part,
            "repeats": repeats,
            "simulations": simulations,
            "seed": seed,
            "scheduling": SCHEDULING,
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine.facts(),
    }
    try:
        with ground(
            engines=engines, size=size, held=1, scheduling=SCHEDULING, parent=work_dir
        ) as here:
            experiment = Experiment(here, profiles, policies, part=part, seed=seed, say=say)
            experiment.calibrate(repeats)
            for _ in range(rounds):
                experiment.round()
                experiment.calibrate(repeats)
                result |= experiment.result(simulations)
                result["minutes"] = (time.monotonic() - begun) / 60
                if out is not None:  # after each round: an interrupted run leaves what it has
                    _write(out, result)
    except (Missing, CannotCalibrate, SwapServeError) as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    click.echo(render(result))
    if wrong := missed(result):
        raise click.ClickException("; ".join(wrong))


def _write(out: Path, result: dict[str, Any]) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(result) + "\n")
    temporary.rename(out)
