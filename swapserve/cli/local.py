"""Commands that work on this machine, with or without a daemon."""

import sys
from collections.abc import Callable
from pathlib import Path

import click

from swapserve import __version__
from swapserve.cli import render
from swapserve.cli.context import (
    EXIT_FAILED,
    EXIT_USAGE,
    Settings,
    echo_json,
    json_option,
    pass_settings,
)
from swapserve.config.init import Gpu, look, starter
from swapserve.config.jsonschema import json_schema
from swapserve.config.load import default_paths, load
from swapserve.config.models import hub_dir
from swapserve.config.schema import Config
from swapserve.errors import ConfigError, InvalidRequest
from swapserve.system import doctor as doctors
from swapserve.system import gpu
from swapserve.system.hub import pull as pull_model

_MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL", "off": "off "}
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "off": "cyan"}


@click.command()
@pass_settings
def serve(settings: Settings) -> None:
    """Run the daemon in the foreground, and a keeper if none runs."""
    path = settings.need_config_path()
    # Here, because only this command needs the server, and the others should start at once.
    from swapserve import daemon  # noqa: PLC0415

    sys.exit(daemon.main(path))


@click.command()
@json_option
@pass_settings
def doctor(settings: Settings) -> None:
    """Say what works on this machine, what does not, why, and how to mend it.

    Looks at CRIU, the kernel, privileges, cgroups, namespaces, huge pages, disk, memory, engines
    and GPUs, with the configuration's settings if there is one. Changes nothing. The exit status
    is 1 if something that the configuration needs does not work.
    """
    checks = doctors.examine(settings.config_path())
    if settings.as_json:
        echo_json({"checks": [check.as_json() for check in checks]})
    else:
        for check in checks:
            mark = click.style(_MARKS[check.status], fg=_COLOURS[check.status])
            click.echo(f"[{mark}] {_indented(f'{check.name}: {check.found}').lstrip()}")
            if check.status != "ok":
                click.echo(_indented(f"why: {check.why}"))
                click.echo(_indented(f"mend: {check.mend}"))
    if any(check.status == "fail" for check in checks):
        sys.exit(EXIT_FAILED)


def _indented(text: str) -> str:
    indent = " " * 7
    return click.wrap_text(text, render.WIDTH, initial_indent=indent, subsequent_indent=indent)


@click.group()
def config() -> None:
    """Check a configuration, or describe what it may hold."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@json_option
@pass_settings
def check(settings: Settings, *, file: Path | None) -> None:
    """Check FILE (default: the configuration in force) and print every problem.

    The exit status is 2 if there is one.
    """
    path = file or settings.need_config_path()
    try:
        loaded = load(path)
    except ConfigError as error:
        if not settings.as_json:
            raise
        problems = [
            {key: getattr(problem, key) for key in ("path", "line", "key", "found", "expected")}
            for problem in error.problems
        ]
        echo_json({"ok": False, "problems": problems})
        sys.exit(EXIT_USAGE)
    if settings.as_json:
        echo_json({"ok": True, "problems": [], "models": list(loaded.models)})
    else:
        click.echo(_good(path, loaded))


@config.command()
def schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    echo_json(json_schema())


def _good(path: Path, loaded: Config) -> str:
    devices = ", ".join(
        f"{device.name} ({render.human_bytes(device.memory_bytes)})"
        for device in loaded.devices.values()
    )
    return f"{path} is good. Models: {', '.join(loaded.models)}. Devices: {devices}."


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write, which must not exist  [default: standard output]",
)
@click.option(
    "--venv",
    "venvs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Virtual environment that may have vLLM; can be repeated.",
)
@click.option(
    "--models",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Directory to search for models; can be repeated.",
)
@json_option
@pass_settings
def init(
    settings: Settings, *, output: Path | None, venvs: tuple[Path, ...], models: tuple[Path, ...]
) -> None:
    """Write a commented configuration from what this machine has."""
    gpus = [
        Gpu(uuid=one.uuid, name=one.name, memory_bytes=one.memory_bytes, mig=one.mig)
        for one in gpu.look().gpus
    ]
    text = starter(look(gpus=gpus, venvs=venvs, models=models))
    if output is not None:
        try:
            with output.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InvalidRequest(f"{output} cannot be written: {error.strerror}.") from error
    if settings.as_json:
        echo_json({"path": None if output is None else str(output), "text": text})
    elif output is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"{output} is written. Look through it, then: swapserve --config {output} serve")


@click.command()
@click.argument("repo")
@click.option(
    "--dest",
    type=click.Path(path_type=Path),
    help="Folder to make  [default: where the configuration looks for REPO]",
)
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Only such files, as '*Q4_K_M.gguf'."
)
@click.option("--revision", help="Branch, tag or commit.")
@json_option
@pass_settings
def pull(
    settings: Settings,
    *,
    repo: str,
    dest: Path | None,
    include: tuple[str, ...],
    revision: str | None,
) -> None:
    """Fetch the model REPO from the hub, since engines have no way out to a network."""
    path = pull_model(
        repo,
        dest or _hub_dest(settings, repo),
        progress=_progress(repo),
        include=include,
        revision=revision,
    )
    if settings.as_json:
        echo_json({"path": str(path)})
    else:
        click.echo(path)


def _progress(repo: str) -> Callable[[int, int], None]:
    """Return a reporter: one line that changes on a terminal, else a line for each percent."""
    shown = -1

    def report(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // total if total else 100
        if percent == shown:
            return
        shown = percent
        line = f"{repo}: {render.human_bytes(done)} of {render.human_bytes(total)}, {percent} %"
        if sys.stderr.isatty():
            click.echo(f"\r\033[K{line}", err=True, nl=percent >= 100)  # noqa: PLR2004
        else:
            click.echo(line, err=True)

    return report


def _hub_dest(settings: Settings, repo: str) -> Path:
    path = settings.config_path()
    if path is None:
        return hub_dir(default_paths("auto").state_dir, repo)
    # Programs and models may well be missing now: this command is there to fetch them.
    return hub_dir(load(path, check_binaries=False, secrets=False).paths.state_dir, repo)


@click.command()
@json_option
@pass_settings
def version(settings: Settings) -> None:
    """Print the version."""
    if settings.as_json:
        echo_json({"version": __version__})
    else:
        click.echo(f"swapserve {__version__}")
