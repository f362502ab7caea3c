"""Commands that talk to a running daemon."""

import time
from datetime import UTC, datetime

import click

from swapserve.cli import render
from swapserve.cli.context import Settings, echo_json, json_option, pass_settings
from swapserve.client.control import Action
from swapserve.status import EngineStatus

_DONE: dict[Action, str] = {
    "swap-in": "Bring a model onto its device.",
    "swap-out": "Move a model off its device; requests in flight are suspended or drained.",
    "start": "Start a model that was stopped, and let requests start it again.",
    "stop": "End a model's engine for good, until 'start'.",
    "pin": "Never swap a model out to make room.",
    "unpin": "Let a model be swapped out again.",
}


@click.command()
@click.option("--phases", is_flag=True, help="Show the last swap of each model by phase.")
@click.option(
    "--outlook", is_flag=True, help="Show what is expected of each model: waits, demand, costs."
)
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    is_flag=False,
    flag_value=1.0,
    default=None,
    metavar="[SECONDS]",
    help="Show again every second, or as often as given, until interrupted.",
)
@json_option
@pass_settings
def status(settings: Settings, *, phases: bool, outlook: bool, watch: float | None) -> None:
    """Show where every model is: state, tier, memory, requests, last swap."""
    with settings.client() as client:
        while True:
            now = client.status()
            if watch is not None and not settings.as_json:
                click.clear()
            if settings.as_json:
                echo_json(now.as_json(), one_line=watch is not None)
            else:
                click.echo(render.status_text(now, phases=phases, outlook=outlook))
            if watch is None:
                return
            time.sleep(watch)


def _command(action: Action, text: str) -> click.Command:
    @click.command(action, help=text)
    @click.argument("model")
    @click.option("--no-wait", is_flag=True, help="Return once the daemon has accepted it.")
    @json_option
    @pass_settings
    def command(settings: Settings, *, model: str, no_wait: bool) -> None:
        with settings.client() as client:
            engine = client.command(action, model, wait=not no_wait)
        if settings.as_json:
            echo_json(engine.as_json())
        else:
            click.echo(_outcome(engine, accepted=no_wait))

    return command


def _outcome(engine: EngineStatus, *, accepted: bool) -> str:
    pinned = ", pinned" if engine.pinned else ""
    line = f"{engine.name}: {engine.state}, tier {engine.tier}{pinned}"
    if accepted:
        return f"{line} (accepted)"
    if engine.last_swap is None:
        return line
    return f"{line}; last swap: {render.swap_text(engine.last_swap)}"


COMMANDS = [_command(action, text) for action, text in _DONE.items()]


@click.command()
@click.argument("model")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(1, 10_000),
    default=100,
    show_default=True,
    help="How many of the last lines.",
)
@json_option
@pass_settings
def logs(settings: Settings, *, model: str, lines: int) -> None:
    """Print the last lines of what a model's engine wrote."""
    with settings.client() as client:
        text = client.logs(model, lines)
    if settings.as_json:
        echo_json({"model": model, "lines": text.splitlines()})
    else:
        click.echo(text, nl=not text.endswith("\n"))


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with new ones until interrupted.")
@click.option(
    "--since",
    type=click.FloatRange(min=0),
    default=None,
    metavar="SECONDS",
    help="Only those of the last so many seconds.",
)
@json_option
@pass_settings
def events(settings: Settings, *, follow: bool, since: float | None) -> None:
    """Print what happened: changes of state, swaps, requests, notices.

    The daemon keeps the last few hundred events. With --json, one object per line.
    """
    start = 0.0 if since is None else datetime.now(UTC).timestamp() - since
    with settings.client() as client:
        for event in client.events(start, follow=follow):
            if settings.as_json:
                echo_json(event.data, one_line=True)
            else:
                click.echo(render.event_text(event.data))


@click.command()
@json_option
@pass_settings
def shutdown(settings: Settings) -> None:
    """Ask the daemon to end; engines are stopped or left as server.on_exit says."""
    with settings.client() as client:
        client.shutdown()
        url = client.base_url
    if settings.as_json:
        echo_json({"shutting_down": True})
    else:
        click.echo(f"The daemon at {url} is shutting down.")
