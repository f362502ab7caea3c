"""`python -m evaluation EXPERIMENT`: measurements with real engines on this machine."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import click

from evaluation import machine, plan, report, table
from evaluation.bare import BareFailed
from evaluation.engines import KINDS, EngineKind, Missing
from evaluation.gpu.command import gpu
from evaluation.schedule.command import schedule
from evaluation.session import HugePages, place
from evaluation.simulate.command import command as simulate
from evaluation.stream import StreamFailed
from evaluation.swap import Experiment, WrongAnswer, new_paces
from evaluation.versions import commit, versions
from swapserve.errors import SwapServeError
from swapserve.testing.weights import SIZES

SETTINGS: tuple[HugePages, ...] = ("off", "on")
MOST_IDLE_S = 3600


Parse = Callable[[click.Context, click.Parameter, str], tuple[Any, ...]]


def listed(allowed: Sequence[str]) -> Parse:
    """Return what reads words with commas between them, each allowed and none twice."""

    def parse(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
        words = tuple(word.strip() for word in value.split(","))
        for word in words:
            if word not in allowed:
                raise click.BadParameter(f"{word!r} is none of {', '.join(allowed)}")
        return _each_once(words, value)

    return parse


def seconds(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[float, ...]:
    """Read numbers of seconds with commas between them, none twice."""
    try:
        numbers = tuple(float(word) for word in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of seconds such as 0,30") from error
    if not all(0 <= number <= MOST_IDLE_S for number in numbers):
        raise click.BadParameter(f"{value!r} is not between 0 and {MOST_IDLE_S} seconds")
    return _each_once(numbers, value)


def _each_once(found: tuple[Any, ...], value: str) -> tuple[Any, ...]:
    if len(set(found)) < len(found):
        raise click.BadParameter(f"{value!r} names something twice")
    return found


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Measure SwapServe with real engines on this machine."""


cli.add_command(gpu)
cli.add_command(simulate)
cli.add_command(schedule)


@cli.command()
@click.option("--engines", callback=listed(list(KINDS)), default="vllm,llamacpp", show_default=True)
@click.option("--cycles", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--idle", callback=seconds, default="0,30", show_default=True)
@click.option("--huge-pages", callback=listed(SETTINGS), default="off,on", show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order of the arms.")
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Result.")
@click.option(
    "--work-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where images and state go for the time of the run  [default: the temporary directory]",
)
def swap(
    *,
    engines: tuple[str, ...],
    cycles: int,
    idle: tuple[float, ...],
    huge_pages: tuple[str, ...],
    seed: int,
    size: str,
    out: Path | None,
    work_dir: Path | None,
) -> None:
    """Cold start, bare CRIU and SwapServe, interleaved in one run.

    Needs root, CRIU, and the engines that scripts/setup --engines makes; keep the machine quiet.
    Progress goes to standard error, the table to standard output.
    """
    if os.geteuid() != 0:
        raise click.ClickException("CRIU needs root: run this as the superuser")
    if out is not None and not out.absolute().parent.is_dir():
        raise click.ClickException(f"{out.parent} is no directory to write {out.name} in")
    _interruptible()
    kinds = [KINDS[name] for name in engines]
    settings = cast("tuple[HugePages, ...]", huge_pages)
    blocks = plan.plan(kinds, cycles=cycles, idles=idle, huge_pages=settings, seed=seed)
    options = {
        "engines": engines,
        "cycles": cycles,
        "idle": idle,
        "huge_pages": huge_pages,
        "seed": seed,
        "size": size,
    }
    try:
        found = _measure(kinds, blocks, options, size=size, work_dir=work_dir, out=out)
    except (Missing, BareFailed, StreamFailed, WrongAnswer, SwapServeError) as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    click.echo(table.render(found))
    if wrong := report.wrong_streams(found["samples"]):
        raise click.ClickException(f"{wrong} preempted streams were not what they should be")


@cli.command()
@click.option("--tables", default="", help="Names with commas between them  [default: all]")
@click.option("--turns", type=click.IntRange(min=2), default=40, show_default=True)
@click.option("--after", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order in a turn.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Result.")
def mechanisms(*, tables: str, turns: int, after: int, seed: int, out: Path | None) -> None:
    """`mechanism: auto` against each single one, on the stand-in for NVIDIA's driver.

    Needs gcc and the packages for tests. What comes after the first turns (--after) counts.
    """
    # Here, because it stands on the tests' stand-in, which others have no use for.
    from evaluation.mechanisms import TABLES, measure, render  # noqa: PLC0415

    if after >= turns:
        raise click.BadParameter(
            f"{after} is not less than the {turns} turns", param_hint="--after"
        )
    _interruptible()
    names = [name.strip() for name in tables.split(",")] if tables else list(TABLES)
    if unknown := [name for name in names if name not in TABLES]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(TABLES)}")
    result: dict[str, Any] = {
        "experiment": "mechanisms",
        "options": {"turns": turns, "after": after, "seed": seed},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine.facts(),
        "tables": {},
    }
    for name in names:
        result["tables"][name] = measure(
            TABLES[name], turns=turns, after=after, seed=seed, say=partial(click.echo, err=True)
        )
        if out is not None:
            _write(out, result)
    click.echo(render(result["tables"]))
    if missed := [name for name, found in result["tables"].items() if not found["met"]]:
        raise click.ClickException(f"auto cost more than the bound: {', '.join(missed)}")


def _measure(
    kinds: Sequence[EngineKind],
    blocks: Sequence[plan.Block],
    options: dict[str, Any],
    *,
    size: str,
    work_dir: Path | None,
    out: Path | None,
) -> dict[str, Any]:
    begun = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - begun:6.1f} s] {text}", err=True)

    paces = {kind.name: plan.guess(kind) for kind in kinds}
    expected = plan.setup_s(kinds, paces) + plan.seconds(blocks, paces)
    say(f"about {expected / 60:.0f} minutes on a quiet machine")
    result: dict[str, Any] = {
        "experiment": "swap",
        "options": options,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(kinds),
        "machine": machine.facts(),
        "method": report.METHOD,
    }
    with place(kinds, size=size, parent=work_dir) as here:
        experiment = Experiment(here, kinds, say)
        experiment.set_up(paces)
        for number, block in enumerate(blocks):
            left = plan.seconds(blocks[number:], paces) / 60
            say(
                f"cycle {block.cycle + 1}, huge pages {block.huge_pages}: about {left:.0f} min left"
            )
            experiment.run(block)
            new_paces(experiment.samples, paces)
            result["minutes"] = (time.monotonic() - begun) / 60
            result["summary"] = report.summarise(experiment.samples)
            result["samples"] = experiment.samples
            if out is not None:  # after each block: an interrupted run leaves what it has
                _write(out, result)
    return result


def _interruptible() -> None:
    """End with everything cleaned up, whatever tells us to."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # also where a shell had it ignored


def _write(out: Path, result: dict[str, Any]) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.rename(out)


if __name__ == "__main__":
    sys.exit(cli(prog_name="python -m evaluation"))
