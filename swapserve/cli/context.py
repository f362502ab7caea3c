"""What every command shares: where the daemon and the configuration are, and how to answer."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from swapserve.client.control import DEFAULT_URL, ControlClient, DaemonUnreachable
from swapserve.config.load import load
from swapserve.config.schema import Config
from swapserve.errors import ConfigError, InvalidRequest, SwapServeError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3

EXIT_STATUS: tuple[tuple[type[SwapServeError], int], ...] = (
    (DaemonUnreachable, EXIT_UNREACHABLE),
    (ConfigError, EXIT_USAGE),
    (InvalidRequest, EXIT_USAGE),
    (SwapServeError, EXIT_FAILED),
)
"""Error class → exit status; the first that matches counts. This is the only such table."""

SYSTEM_CONFIG = Path("/etc/swapserve/swapserve.yaml")
LOCAL_CONFIG = Path("swapserve.yaml")

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Settings:
    """The global options."""

    config: Path | None = None
    url: str | None = None
    key: str | None = None
    as_json: bool = False

    def config_path(self) -> Path | None:
        """Return the configuration file: as given, else the local one, else the system's."""
        if self.config is not None:
            return self.config
        return next((path for path in (LOCAL_CONFIG, SYSTEM_CONFIG) if path.is_file()), None)

    def need_config_path(self) -> Path:
        """Return the configuration file.

        Raises:
            InvalidRequest: none was given and none is where we look.
        """
        path = self.config_path()
        if path is None:
            raise InvalidRequest(
                f"No configuration: neither ./{LOCAL_CONFIG} nor {SYSTEM_CONFIG} exists. Name one"
                " with --config or SWAPSERVE_CONFIG, or write one with 'swapserve init'."
            )
        return path

    def client(self) -> ControlClient:
        """Return a client of the daemon: by --url, else where the configuration puts it."""
        if self.url is not None:
            return ControlClient(self.url, self.key)
        config = self._readable_config()
        if config is None:
            return ControlClient(DEFAULT_URL, self.key)
        keys = config.server.admin_keys
        return ControlClient(_url_of(config), self.key or (keys[0] if keys else None))

    def _readable_config(self) -> Config | None:
        """Return the configuration; None without one, or if it was only found, not readable."""
        path = self.config_path()
        if path is None or (self.config is None and not os.access(path, os.R_OK)):
            return None
        return load(path, check_binaries=False, secrets=self.key is None)


def _url_of(config: Config) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(  # noqa: S104
        config.server.host, config.server.host
    )
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{config.server.port}"


def exit_status(error: SwapServeError) -> int:
    """Return the exit status that tells a script what kind of failure it was."""
    return next(status for kind, status in EXIT_STATUS if isinstance(error, kind))


def _show(error: SwapServeError, *, as_json: bool) -> None:
    if as_json:
        body = {"error": {"code": error.code, "message": str(error)}}
        click.echo(json.dumps(body, indent=2), err=True)
    else:
        click.echo(f"Error: {error}", err=True)


class Program(click.Group):
    """The border at which errors of ours become exit statuses."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SwapServeError as error:
            settings = ctx.find_object(Settings)
            _show(error, as_json=bool(settings and settings.as_json))
            raise click.exceptions.Exit(exit_status(error)) from error


def json_option(command: Command) -> Command:
    """Add `--json`, which may stand before or after the command's name."""

    def remember(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Settings).as_json = True

    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Print JSON instead of text.",
    )(command)


def echo_json(data: Any, *, one_line: bool = False) -> None:  # noqa: ANN401
    """Print data for programs."""
    click.echo(json.dumps(data, indent=None if one_line else 2))


pass_settings = click.make_pass_decorator(Settings, ensure=True)
