"""The command that shows whether the CUDA driver can move an engine's state."""

import asyncio
import sys
from dataclasses import asdict

import click

from swapserve.cli.context import EXIT_FAILED, Settings, echo_json, json_option, pass_settings
from swapserve.config.load import load


@click.command()
@click.argument("name")
@json_option
@pass_settings
def probe(settings: Settings, *, name: str) -> None:
    """Show whether the CUDA driver can move the GPU state of the engine NAME.

    Starts it with a keeper of its own, moves its state away and back, and compares what it
    answers. The result is kept; with it a configuration may use the driver for an engine on
    several GPUs. The daemon must not run, and nothing else may use these GPUs meanwhile. A driver
    that cannot do it may lose the engine.

    The exit status is 1 if the state cannot be moved.
    """
    config = load(settings.need_config_path(), check_binaries=False, secrets=False)
    # Here, because only this command needs it, and the others should start at once.
    from swapserve.swap import probe as probes  # noqa: PLC0415

    result = asyncio.run(probes.probe(config, name))
    if settings.as_json:
        echo_json(asdict(result))
    else:
        verdict = "can be moved" if result.works else "cannot be moved"
        click.echo(f"{name}: its GPU state {verdict} by driver {result.driver}: {result.found}.")
    if not result.works:
        sys.exit(EXIT_FAILED)
