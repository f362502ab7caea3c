"""`python -m evaluation simulate`: policies against each other, without engines."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from evaluation import machine
from evaluation.simulate.azure import BadTrace, read
from evaluation.simulate.costs import DEFAULT, BadCosts, Costs, named, read_costs
from evaluation.simulate.engine import IllegalEffect
from evaluation.simulate.grid import TRACE, Plan, cells, compute_all
from evaluation.simulate.load import Size
from evaluation.simulate.measured import read_results
from evaluation.simulate.metrics import Targets
from evaluation.simulate.plots import draw
from evaluation.simulate.profiles import PROFILES
from evaluation.simulate.run import RULES, Stuck
from evaluation.simulate.table import render
from evaluation.simulate.verdict import judge
from evaluation.versions import commit
from swapserve.errors import ConfigError
from swapserve.scheduler.plugins import load_policy
from swapserve.scheduler.policies.registry import POLICIES

MOST_GPUS = 64
MOST_MODELS = 1024

_FILE = click.Path(dir_okay=False, path_type=Path)


def _names(allowed: tuple[str, ...]) -> Any:  # noqa: ANN401 - what click calls
    def parse(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
        words = tuple(word.strip() for word in value.split(","))
        for word in words:
            if word not in allowed:
                raise click.BadParameter(f"{word!r} is none of {', '.join(allowed)}")
        return _once(words, value)

    return parse


def _policies(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in value.split(","))
    for word in words:
        try:
            load_policy(word, path="--policies")
        except ConfigError as error:
            raise click.BadParameter(str(error)) from error
    return _once(words, value)


def _counts(most: int) -> Any:  # noqa: ANN401
    def parse(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
        try:
            found = tuple(int(word) for word in value.split(","))
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is no list of numbers such as 1,2") from error
        if not all(1 <= number <= most for number in found):
            raise click.BadParameter(f"{value!r} is not between 1 and {most}")
        return _once(found, value)

    return parse


def _once(found: tuple[Any, ...], value: str) -> tuple[Any, ...]:
    if len(set(found)) < len(found):
        raise click.BadParameter(f"{value!r} names something twice")
    return found


@click.command(name="simulate")
@click.option(
    "--profiles", callback=_names((*PROFILES, TRACE)), default=",".join(PROFILES), show_default=True
)
@click.option(
    "--policies",
    callback=_policies,
    default=",".join(POLICIES),
    show_default=True,
    help="SwapServe's own, or those of installed packages.",
)
@click.option("--gpus", callback=_counts(MOST_GPUS), default="1,2,8", show_default=True)
@click.option("--models", callback=_counts(MOST_MODELS), default="2,8,64", show_default=True)
@click.option(
    "--requests", type=click.IntRange(min=1), default=2000, show_default=True, help="Per run."
)
@click.option("--costs", default=DEFAULT, show_default=True, help="A table's name, or a file.")
@click.option(
    "--results", type=_FILE, help="Of `evaluation swap` or `gpu`: measured costs instead."
)
@click.option(
    "--trace",
    "traces",
    type=_FILE,
    multiple=True,
    help="CSV in the format of the Azure LLM trace; several: models belong to them in turn.",
)
@click.option("--load", type=click.FloatRange(min=0.01, max=10), default=0.7, show_default=True)
@click.option(
    "--held",
    type=click.FloatRange(min=1),
    default=1.0,
    show_default=True,
    help="Memory of a GPU, as a multiple of its largest engine.",
)
@click.option(
    "--spread",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Every N-th model needs two GPUs; 0: none.",
)
@click.option("--alpha", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Zipf.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs.")
@click.option(
    "--noise",
    type=click.FloatRange(min=0, max=2),
    default=0.0,
    show_default=True,
    help="Standard deviation of the logarithm of each move's time.",
)
@click.option(
    "--max-wait",
    type=click.FloatRange(min=0.1),
    default=RULES.max_wait_s,
    show_default=True,
    help="As in the configuration, seconds.",
)
@click.option("--slo-ttft", type=click.FloatRange(min=0), default=10.0, show_default=True)
@click.option("--slo-itl", type=click.FloatRange(min=0), default=0.2, show_default=True)
@click.option("--json", "out", type=_FILE, help="Result.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Charts go there.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
def command(**options: Any) -> None:  # noqa: ANN401 - all of them, as click has read them
    """Policies against each other on imagined GPUs: the scheduler's own core, without engines.

    Progress goes to standard error, the table to standard output.
    """
    out: Path | None = options["out"]
    if out is not None and not out.absolute().parent.is_dir():
        raise click.ClickException(f"{out.parent} is no directory to write {out.name} in")
    if TRACE in options["profiles"] and not options["traces"]:
        raise click.BadParameter("give the trace with --trace", param_hint="--profiles")
    try:
        plan = _plan(options)
    except (BadCosts, BadTrace) as error:
        raise click.ClickException(str(error)) from error
    result = _simulated(plan, options)
    click.echo(render(result))
    if out is not None:
        _write(out, result)
    if options["plots"] is not None:
        draw(result["rows"], options["plots"])


def _plan(options: dict[str, Any]) -> Plan:
    profiles = options["profiles"]
    if options["traces"] and TRACE not in profiles:
        profiles = (*profiles, TRACE)
    targets = Targets(ttft_s=options["slo_ttft"], itl_s=options["slo_itl"])
    return Plan(
        costs=_costs(options),
        profiles=profiles,
        policies=options["policies"],
        gpus=options["gpus"],
        models=options["models"],
        seeds=options["seeds"],
        size=Size(requests=options["requests"], load=options["load"], alpha=options["alpha"]),
        held=options["held"],
        spread=options["spread"],
        noise=options["noise"],
        rules=replace(
            RULES,
            max_wait_s=options["max_wait"],
            slo_ttft_s=targets.ttft_s,
            slo_itl_s=targets.itl_s,
        ),
        targets=targets,
        traces=tuple(tuple(read(path)) for path in options["traces"]),
    )


def _costs(options: dict[str, Any]) -> Costs:
    if options["results"] is not None:
        return read_results(options["results"])
    given: str = options["costs"]
    return read_costs(Path(given)) if given.endswith((".yaml", ".yml")) else named(given)


def _simulated(plan: Plan, options: dict[str, Any]) -> dict[str, Any]:
    begun = time.monotonic()
    total = len(cells(plan))
    done = [0]

    def say(text: str) -> None:
        done[0] += 1
        click.echo(f"[{time.monotonic() - begun:6.1f} s] {done[0]}/{total} {text}", err=True)

    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        with _interruptible():
            rows = list(compute_all(plan, jobs=options["jobs"], say=say))
    except (IllegalEffect, Stuck) as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    told = {name: value for name, value in options.items() if name not in {"out", "plots"}}
    # A trace is a file of whoever runs this: its name says enough.
    told["traces"] = [path.name for path in options["traces"]]
    told["results"] = None if options["results"] is None else str(options["results"])
    return {
        "experiment": "simulate",
        "options": told,
        "started": started,
        "commit": commit(),
        "machine": machine.facts(),
        "seconds": time.monotonic() - begun,
        "costs": {
            "name": plan.costs.name,
            "about": plan.costs.about,
            "sources": {name: dict(source) for name, source in plan.costs.sources.items()},
        },
        "rows": rows,
        "verdicts": judge(rows, max_wait_s=plan.rules.max_wait_s),
    }


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let a termination end the block like Ctrl-C, so that no process is left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(out: Path, result: dict[str, Any]) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.rename(out)
