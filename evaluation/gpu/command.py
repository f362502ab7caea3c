"""The command line of `python -m evaluation gpu`."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from evaluation.gpu import bandwidth, calls, facts, product, sheet, table
from evaluation.gpu.engines import ENGINES, Means, packages_of, python_path
from evaluation.gpu.sheet import Budget, Impossible, Page, Part, Sheet
from evaluation.gpu.trial import Times
from evaluation.gpu.weights import SHAPES
from evaluation.versions import commit
from swapserve.config.values import parse_size
from swapserve.system.gpu import Nvml, NvmlUnavailable

GIB = 1 << 30
PARTS = {"facts": 20.0, "bandwidth": 30.0, "calls": 110.0, "engines": 290.0}
"""Usual seconds of each part; what one leaves over is the later ones'."""
MARGIN_PART = 64
"""So small a part of the GPU is left free: contexts, fragments."""
LIBRARY_PATH = "LD_LIBRARY_PATH"

Parse = Callable[[click.Context, click.Parameter, str], Any]


def words(allowed: Sequence[str]) -> Parse:
    """Return what reads words with commas between them."""

    def parse(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(word.strip() for word in value.split(",")))
        for word in found:
            if word not in allowed:
                raise click.BadParameter(f"{word!r} is none of {', '.join(allowed)}")
        return found

    return parse


def size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Read a size."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no size such as 8GB") from error


def sizes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Read sizes with commas between them."""
    return tuple(size(ctx, param, word.strip()) or 0 for word in value.split(","))


@click.command()
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Result.")
@click.option("--parts", callback=words(list(PARTS)), default=",".join(PARTS), show_default=True)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=7.5,
    show_default=True,
    help="For everything together.",
)
@click.option(
    "--sizes",
    "of_targets",
    callback=sizes,
    default="1GB,8GB,40GB",
    show_default=True,
    help="GPU memory of the processes on which the driver is called.",
)
@click.option(
    "--engines",
    callback=words(list(ENGINES)),
    default="torch,transformers,vllm,llamacpp",
    show_default=True,
    help="Those that are not at hand are left out, with the reason.",
)
@click.option(
    "--shape", type=click.Choice(list(SHAPES)), default="3b", show_default=True, help="Of models."
)
@click.option(
    "--python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=sys.executable,
    help="That has PyTorch and engines  [default: the one that runs this]",
)
@click.option("--gpu", "uuid", help="UUID  [default: the first]")
@click.option("--ram", callback=size, help="RAM that may be used  [default: what is available now]")
@click.option("--block", callback=size, default="1GB", show_default=True, help="Of one copy.")
@click.option(
    "--pass-env", multiple=True, metavar="NAME", help="A variable that engines get as well."
)
@click.option(
    "--gpu-path",
    "gpu_paths",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Something that engines must see, beside /dev/nvidia*.",
)
@click.option("--vram-mb", type=int, default=2048, show_default=True, help="Of the engine `cuda`.")
@click.option("--quantum", default="3s", show_default=True, help="Of two engines under load.")
@click.option("--away", type=float, default=2.0, show_default=True, help="Of a preempted engine.")
@click.option("--load", type=float, default=25.0, show_default=True, help="Seconds of load.")
def gpu(*, out: Path | None, parts: tuple[str, ...], minutes: float, **options: Any) -> None:  # noqa: ANN401
    """Driver calls and real engines on an NVIDIA GPU, in one short run.

    Needs root, a driver of branch 570 or newer, and for the engines a Python with PyTorch and
    transformers. Each part says by itself why it cannot be done. Progress goes to standard error, a
    summary to standard output; the result file is written after each measurement.
    """
    if out is not None and not out.absolute().parent.is_dir():
        raise click.ClickException(f"{out.parent} is no directory to write {out.name} in")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # also where a shell had it ignored
    begun = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - begun:6.1f} s] {text}", err=True)

    head = {
        "experiment": "gpu",
        "options": {"parts": parts, "minutes": minutes, **_plain(options)},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }
    results = Sheet(out.absolute() if out else None, head, say)
    # Programs of this checkout are started from other directories.
    os.environ["PYTHONPATH"] = os.pathsep.join(python_path())
    with tempfile.TemporaryDirectory(
        prefix="swapserve-gpu-", ignore_cleanup_errors=True
    ) as directory:
        work = Work(Path(directory), options)
        chosen = [
            Part(name=name, seconds=seconds * minutes * 60 / sum(PARTS.values()), work=work[name])
            for name, seconds in PARTS.items()
            if name in parts
        ]
        sheet.run(results, chosen, total_s=minutes * 60)
    click.echo(table.render(results.result))
    if found := table.wrong(results.result):
        raise click.ClickException("not what it was before: " + "; ".join(found))


class Work:
    """What each part does, with the options of the command."""

    def __init__(self, directory: Path, options: dict[str, Any]) -> None:
        self._directory = directory
        self._options = options

    def __getitem__(self, name: str) -> Callable[[Page, Budget], None]:
        options = self._options
        found: dict[str, Callable[[Page, Budget], None]] = {
            "facts": partial(facts.part, uuid=options["uuid"]),
            "bandwidth": partial(bandwidth.part, size=options["block"]),
            "calls": self._calls,
            "engines": self._engines,
        }
        return found[name]

    def _calls(self, page: Page, budget: Budget) -> None:
        room = self._room(page)
        calls.part(page, budget, sizes=self._options["of_targets"], room=room)

    def _engines(self, page: Page, budget: Budget) -> None:
        options = self._options
        room = self._room(page)
        try:
            packages = packages_of(options["python"])
        except Impossible as error:
            page.failed("the engines' Python", str(error))
            packages = {}
        page.note(packages=packages)
        means = Means(
            directory=self._directory,
            python=options["python"],
            packages=packages,
            shape=options["shape"],
            gpu_bytes=room.vram,
            env=self._env(),
            vram_mb=options["vram_mb"],
        )
        whole = product.Product(
            means,
            room,
            times=Times(away_s=options["away"], load_s=options["load"]),
            quantum=options["quantum"],
            gpu_paths=options["gpu_paths"],
        )
        product.part(page, budget, whole, options["engines"])

    def _room(self, page: Page) -> calls.Room:
        """Choose the GPU for everything that runs from now on, and see what it has free."""
        uuid = self._options["uuid"] or facts.first_gpu()
        os.environ["CUDA_VISIBLE_DEVICES"] = uuid
        nvml = Nvml()
        try:
            total = next(one.memory_bytes for one in nvml.gpus() if one.uuid == uuid)
            free = nvml.free(uuid)
        except (NvmlUnavailable, StopIteration) as error:
            raise Impossible(f"NVML and the GPU {uuid}: {error}") from error
        ram = self._options["ram"] or facts.memory()["MemAvailable"]
        margin = total // MARGIN_PART
        page.note(room={"uuid": uuid, "vram": free, "ram": ram, "margin": margin})
        return calls.Room(uuid=uuid, vram=free, ram=ram, margin=margin)

    def _env(self) -> dict[str, str]:
        """Return what engines must have to find the driver that this process found."""
        names = (LIBRARY_PATH, *self._options["pass_env"])
        env = {name: os.environ[name] for name in names if name in os.environ}
        if LIBRARY_PATH not in env and (directory := facts.library_directory()) is not None:
            env[LIBRARY_PATH] = directory
        return env


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [str(each) for each in value] if name == "gpu_paths" else _text(value)
        for name, value in options.items()
    }


def _text(value: Any) -> Any:  # noqa: ANN401
    return str(value) if isinstance(value, Path) else value
