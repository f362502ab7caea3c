"""The engines part: for each kind at hand a model, a configuration, a daemon, and a trial."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.engines import Missing
from evaluation.gpu.calls import Room
from evaluation.gpu.engines import ENGINES, GpuEngine, Means, write_recipes
from evaluation.gpu.sheet import Budget, Impossible, OutOfTime, Page
from evaluation.gpu.trial import Times, Trial
from evaluation.session import SUBNET, Session, running
from evaluation.stream import StreamFailed
from swapserve.config.load import load
from swapserve.system.tools import find_criu

END_S = 20.0
"""Kept back for the end of a daemon: engines are suspended before they are killed."""
LEAST_S = 30.0
"""With less than that no further engine is begun."""
LOG_LINES = 150
ROOM = 1.5
"""The device holds so many times one engine: never two."""
RAM_SHARE = 0.7
SHARE = 0.6
"""Part of the time left that an engine gets with others after it."""


MANNERS = {"sandboxes": "root", "no sandboxes": "root", "unprivileged": "unprivileged"}
"""How engines are kept, with the keeper's profile: what this machine allows, the best first.

A machine may lack what a sandbox needs: namespaces, cgroups, veth pairs.
"""


class NothingStarts(Exception):
    """Not even the first engine started, for whatever reason."""


class Product:
    """Configurations and daemons in one directory; a socket's path must be short, so not deep."""

    def __init__(
        self, means: Means, room: Room, *, times: Times, quantum: str, gpu_paths: Sequence[Path]
    ) -> None:
        self._means = means
        self._room = room
        self._times = times
        self._quantum = quantum
        self._gpu_paths = [str(path) for path in gpu_paths]
        self._recipes = write_recipes(means.directory / "recipes")

    def prepare(self, engine: GpuEngine) -> tuple[dict[str, Any], int]:
        """Make what an engine needs; return the keys of its entry and its size on the GPU.

        Raises:
            Impossible: it is not at hand.
        """
        return engine.prepare(self._means)

    def measure(
        self, page: Page, budget: Budget, engine: GpuEngine, prepared: tuple[dict[str, Any], int]
    ) -> None:
        """Start a daemon and carry out the trial.

        Raises:
            Impossible: the engine does not fit, or the daemon does not start.
            OutOfTime: the rest is missing.
        """
        entry, size = prepared
        page.note(estimate_bytes=size, shape=self._means.shape)
        capacity = int(size * ROOM)
        if capacity > self._room.vram:
            raise Impossible(f"{capacity} bytes of the GPU needed, {self._room.vram} free")
        entry = {"device": "gpu0", "memory": size, **entry}
        for manner, profile in MANNERS.items():
            here = Path(tempfile.mkdtemp(prefix=f"{engine.name}-", dir=self._means.directory))
            names, models = self._models(engine, entry, sandbox=manner == "sandboxes")
            config = self._write(here, models, capacity, profile)
            try:
                with running(load(config)) as session:
                    page.note(manner=manner)
                    self._try(page, budget, session, engine, names)
            except (Missing, NothingStarts) as error:
                page.failed(manner, str(error))
            else:
                return
            finally:
                page.content.setdefault("logs", {})[manner] = logs(here / "state" / "logs")
                page.note()
        raise Impossible("no engine starts here")

    def _try(
        self,
        page: Page,
        budget: Budget,
        session: Session,
        engine: GpuEngine,
        names: dict[str, str],
    ) -> None:
        own = Budget(budget.left_s - END_S)
        trial = Trial(page, session, engine, uuid=self._room.uuid, times=self._times)
        try:
            with own.guard():
                trial.run(own, names)
        except StreamFailed as error:
            if page.content.get("cold"):
                raise
            raise NothingStarts(str(error)) from error
        finally:
            with page.attempt("last look"):
                page.note(status=session.control.status().as_json())

    def _models(
        self, engine: GpuEngine, entry: dict[str, Any], *, sandbox: bool
    ) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """Return names by what they are for, and the `models` section."""
        special: dict[str, dict[str, Any]] = {
            "a": {"mechanism": "checkpoint", "tiers": ["host"]},
            "b": {"mechanism": "checkpoint", "tiers": ["host"]},
            "cold": {"mechanism": "restart", "tiers": ["none"], "golden": False},
        }
        special |= {name: {"mechanism": name, "tiers": ["host"]} for name in engine.sleeps}
        if sandbox and find_criu() is not None:
            disk = {"mechanism": "checkpoint", "tiers": ["disk"], "keep_cache": "always"}
            special["disk"] = disk
        names = {what: f"{engine.name}-{what}".replace("_", "-") for what in special}
        common = {**entry, **({} if sandbox else {"sandbox": False})}
        models = [{**common, "name": names[what], **keys} for what, keys in special.items()]
        return names, models

    def _write(self, here: Path, models: list[dict[str, Any]], capacity: int, profile: str) -> Path:
        content = {
            "paths": {
                "state_dir": str(here / "state"),
                "image_dir": str(here / "images"),
                "run_dir": str(here / "run"),
            },
            "server": {"port": 0},
            "keeper": {
                "profile": profile,
                "subnet": SUBNET,
                "gpu_paths": self._gpu_paths,
                "gpu_margin": self._room.margin,
            },
            "recipe_dirs": [str(self._recipes)],
            "devices": {
                "gpu0": {"kind": "gpu", "uuid": self._room.uuid, "memory": capacity},
                "ram": {"kind": "host", "memory": int(self._room.ram * RAM_SHARE)},
            },
            # The swaps are measured, not the choice of whom and when.
            "scheduling": {
                "policy": "lru",
                "quantum": self._quantum,
                "retry_backoff": "1s",
                "look_ahead": False,
            },
            "models": models,
        }
        path = here / "swapserve.yaml"
        path.write_text(json.dumps(content, indent=1))  # JSON is YAML
        return path


def logs(directory: Path) -> dict[str, list[str]]:
    """Return how each log ends: the machine may be gone with the run."""
    return {
        str(path.relative_to(directory)): path.read_text(errors="replace").splitlines()[-LOG_LINES:]
        for path in sorted(directory.rglob("*.log"))
    }


def part(page: Page, budget: Budget, product: Product, engines: Sequence[str]) -> None:
    """Measure one kind after the other, as far as they are at hand.

    Raises:
        Impossible: none of them is at hand.
    """
    ready = []
    for name in engines:
        section = page.section(name)
        with section.attempt("making ready"):
            ready.append((section, ENGINES[name], product.prepare(ENGINES[name])))
    for place, (section, engine, prepared) in enumerate(ready):
        own = budget.share(SHARE if place + 1 < len(ready) else 1.0)
        try:
            with section.attempt("this engine"):
                own.need(LEAST_S, engine.name)
                product.measure(section, own, engine, prepared)
        except OutOfTime as error:
            section.failed("the rest", f"out of time: {error}")
        if section.content.get("failures"):
            page.failed(engine.name, "see there")
    if not any(page.content[name].get("cold") for name in engines):
        why = [f"{name}: {_why(page.content[name])}" for name in engines]
        raise Impossible("no engine could be measured. " + "; ".join(why))


def _why(section: dict[str, Any]) -> str:
    failures = [failure["why"].splitlines()[0] for failure in section.get("failures", ())]
    return failures[0] if failures else "nothing said"
