"""`python -m swapserve.quickstart`, which scripts/quickstart runs once everything is set up."""

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from swapserve.client.chat import ChatClient
from swapserve.config.load import load
from swapserve.errors import SwapServeError
from swapserve.quickstart import daemon, times
from swapserve.quickstart.acts import Acts
from swapserve.quickstart.daemon import Place
from swapserve.quickstart.models import NAMES, Model, Recipe, prepare, write_config
from swapserve.quickstart.screen import Screen
from swapserve.system.host import free_port

DEFAULT_PORT = 8080
INTERRUPTED = 130
NOT_ROOT = """\
This needs root: CRIU moves processes to disk and back, and each engine gets namespaces of its own.
  sudo ./scripts/quickstart              everything, a preempted stream included
  ./scripts/quickstart --unprivileged    what works without: every swap is a kill and a cold start,
                                         and a request in flight is waited for
"""


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    options = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Two models, room for one: see them swapped, and a stream go on after it.",
    )
    options.add_argument(
        "--smoke", action="store_true", help="stop everything at the end; exit 1 if anything failed"
    )
    options.add_argument(
        "--engines", default="llamacpp,llamacpp", help="engine of each model: llamacpp or vllm"
    )
    options.add_argument(
        "--models",
        choices=["auto", "hub", "generated"],
        help="from the hub, or with random weights (default: the hub's if it can be reached;"
        " with --smoke generated ones)",
    )
    options.add_argument("--dir", type=Path, help="where state and images go")
    options.add_argument("--port", type=int, help="of the endpoint (default: 8080, or a free one)")
    options.add_argument("--subnet", default="10.231.0.0/16", help="private range for sandboxes")
    options.add_argument("--unprivileged", action="store_true", help="do without root")
    return options


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    options = parser().parse_args(arguments)
    options.engines = tuple(options.engines.split(","))
    if len(options.engines) == 1:
        options.engines *= 2
    if len(options.engines) != len(NAMES) or set(options.engines) - {"llamacpp", "vllm"}:
        parser().error("--engines takes one or two of llamacpp, vllm, with a comma between them")
    return options


def place_for(options: argparse.Namespace) -> Place:
    """Return the directory to work in; a smoke test gets a fresh one."""
    if options.dir is not None:
        root = options.dir.absolute()
    elif options.smoke:
        return Place(Path(tempfile.mkdtemp(prefix="swapserve-quickstart-", dir="/var/tmp")))
    elif os.geteuid() == 0:
        # Not below a directory that others may write to: the keeper trusts its configuration.
        root = Path("/var/lib/swapserve/quickstart")
    else:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        root = Path(state) / "swapserve-quickstart"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Place(root)


async def main(options: argparse.Namespace, screen: Screen) -> int:
    """Show everything; return the exit status."""
    place = place_for(options)
    finished = False
    try:
        if place.keeper_pid() is not None:
            async with screen.watching(lambda: "stopping what an earlier run left"):
                await daemon.stop(place)
        await _show(options, place, screen)
        finished = True
    finally:
        if options.smoke or not finished:
            async with screen.watching(lambda: "stopping engines, keeper and daemon"):
                await daemon.stop(place)
    _say_failures(screen)
    if options.smoke and options.dir is None:
        if screen.failures:
            screen.line(f"  logs and state are kept in {place.root}")
        else:
            shutil.rmtree(place.root, ignore_errors=True)
    return 1 if screen.failures else 0


def _say_failures(screen: Screen) -> None:
    if screen.failures:
        screen.head("Something was wrong")
        for failure in screen.failures:
            screen.line(f"  {failure}")


async def _show(options: argparse.Namespace, place: Place, screen: Screen) -> None:
    screen.head("Models")
    source = options.models or ("generated" if options.smoke else "auto")
    recipes = cast("tuple[Recipe, Recipe]", options.engines)
    models = await prepare(recipes, source, screen)
    profile = "unprivileged" if options.unprivileged else "auto"
    write_config(place, models, port=_port(options.port), subnet=options.subnet, profile=profile)
    config = load(place.config)
    memory = ", ".join(f"{model.name} {model.memory_bytes >> 20} MiB" for model in models)
    (device,) = config.devices.values()
    screen.line(f"  {memory}; budget of the device: {device.memory_bytes >> 20} MiB")
    url = await daemon.start(place, screen)
    screen.line(f"  serving on {url} (configuration: {place.config})")
    async with ChatClient(url) as chat, Acts(models, url, chat, screen).open() as acts:
        await acts.first_answers(images=not options.unprivileged)
        if options.unprivileged:
            screen.head("4. Without root no stream can be moved, so that part is left out")
        else:
            await acts.preemption()
        screen.head("Times")
        moves = times.moves_of(await acts.events())
    times.show(moves, place, screen)
    screen.failures += times.failed(moves)
    if not options.smoke:
        _say_how_to_go_on(url, models[0], place, screen)


def _port(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", DEFAULT_PORT))
        return DEFAULT_PORT
    return free_port()


def _say_how_to_go_on(url: str, model: Model, place: Place, screen: Screen) -> None:
    program = Path(sys.executable).with_name("swapserve")
    command = f"{program} --config {place.config}"
    screen.head(f"The endpoint stays up: {url}/v1")
    screen.line(f"""\
  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{model.name}", "max_tokens": 50,
         "messages": [{{"role": "user", "content": "Hello"}}]}}'

  Python, with the package openai:
    from openai import OpenAI
    client = OpenAI(base_url="{url}/v1", api_key="none")
    chat = client.chat.completions.create(
        model="{model.name}", messages=[{{"role": "user", "content": "Hello"}}], max_tokens=50)
    print(chat.choices[0].message.content)

  {command} status --watch
  {command} swap-out {model.name}
  {command} swap-in {model.name}

  Stop everything:
  {command} shutdown""")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; 0 well, 1 something failed, 2 wrong usage, 130 interrupted."""
    options = parse(arguments)
    screen = Screen()
    if os.geteuid() != 0 and not options.unprivileged:
        sys.stderr.write(NOT_ROOT)
        return 2
    # Each ends it as an interrupt from the keyboard does: cleanly. asyncio looks at INT alone.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return _run(options, screen)
    except KeyboardInterrupt:
        screen.line("\nInterrupted; everything is stopped.")
        return INTERRUPTED


def _run(options: argparse.Namespace, screen: Screen) -> int:
    status = 1
    try:
        status = asyncio.run(main(options, screen))
    except* (SwapServeError, OSError) as group:
        for leaf in leaves(group):
            sys.stderr.write(f"\nscripts/quickstart: {leaf}\n")
    return status


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """Return the exceptions in a group of groups."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


if __name__ == "__main__":
    sys.exit(run())
