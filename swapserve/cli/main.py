"""The `swapserve` command."""

from pathlib import Path

import click

from swapserve.cli import control, local, probe
from swapserve.cli.context import Program, Settings, json_option


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 no daemon answers.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="SWAPSERVE_CONFIG",
    show_envvar=True,
    help="Configuration file  [default: ./swapserve.yaml, /etc/swapserve/swapserve.yaml]",
)
@click.option(
    "--url",
    envvar="SWAPSERVE_URL",
    show_envvar=True,
    help="Address of the daemon  [default: from the configuration]",
)
@click.option(
    "--key",
    envvar="SWAPSERVE_ADMIN_KEY",
    show_envvar=True,
    help="Admin key  [default: from the configuration]",
)
@json_option
@click.pass_context
def cli(ctx: click.Context, *, config: Path | None, url: str | None, key: str | None) -> None:
    """Serve many models on few devices by swapping whole inference engines."""
    settings = ctx.ensure_object(Settings)
    settings.config, settings.url, settings.key = config, url, key


for _command in (
    local.serve,
    control.status,
    *control.COMMANDS,
    control.logs,
    control.events,
    control.shutdown,
    local.doctor,
    probe.probe,
    local.config,
    local.init,
    local.pull,
    local.version,
):
    cli.add_command(_command)
