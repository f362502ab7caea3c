"""A daemon whose engines run on GPUs that are not there: a stand-in driver, all else real."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import swapserve
from swapserve.keeper.record import Record, load
from tests.support.daemon import Daemon, Model, Site, site
from tests.support.gpu import StandIn, standin
from tests.support.leaks import wait_for

MIB = 1 << 20
SHARE = 0.6
"""Part of a GPU that an engine of `cuda` takes: two never fit together."""


@dataclass(slots=True)
class GpuSite:
    """A site and the GPUs of its machine."""

    site: Site
    gpus: StandIn

    def start(self) -> Daemon:
        return self.site.start()

    def record(self, engine: str) -> Record:
        """Return what the keeper has written down of an engine."""
        found = load(self.site.directory / "state" / "keeper" / f"{engine}.json")
        assert found is not None
        return found

    def check(self) -> None:
        """The keeper made no illegal call and caused no hazard."""
        assert not self.gpus.illegal()
        assert not self.gpus.hazards()


def cuda(
    name: str, gpus: StandIn, *args: str, ranks: int = 1, share: float = SHARE, **extra: Any
) -> Model:
    """Return a model that takes a share of each GPU it is on."""
    size = int(gpus.config.memory[0] * share)
    context = gpus.config.context_bytes
    device = [f"gpu{index}" for index in range(ranks)]
    entry = {
        "name": name,
        "recipe": "cuda",
        "device": device if ranks > 1 else device[0],
        "args": [f"--vram-mb={(size - context) // MIB}", f"--ranks={ranks}", *args],
        "env": gpus.env,
        "memory": size,
        "stop_grace": "2s",
    }
    return {**entry, **extra}


def recipe(directory: Path, **changes: Any) -> Path:
    """Write the recipe `cuda`: the testing engine that keeps its state in GPU memory."""
    package = Path(swapserve.__file__).parents[1]
    said = {
        "name": "cuda",
        "adapter": "generic",
        "argv": [
            *(sys.executable, "-m", "swapserve.testing.cuda_engine"),
            *("--host", "{host}", "--port", "{port}", "--name", "{name}"),
        ],
        "env": {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"},
        "read_only_paths": [str(package)],
        "needs_model": False,
        "takes_seed": True,
        "mechanisms": ["checkpoint", "restart"],
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cuda.yaml").write_text(json.dumps(said))
    return directory


@contextmanager
def gpu_site(
    directory: Path,
    names: Sequence[str] = ("a", "b"),
    *,
    gpus: Sequence[int] = (256 * MIB,),
    standing: dict[str, Any] | None = None,
    recipe_changes: dict[str, Any] | None = None,
    args: Sequence[str] = (),
    share: float = SHARE,
    model: dict[str, Any] | None = None,
    more: Sequence[Model] = (),
    there: StandIn | None = None,
    **sections: Any,
) -> Iterator[GpuSite]:
    """Yield a site with a GPU (or several) and engines of which only one fits.

    Args:
        directory: for everything.
        names: of the models.
        gpus: memory of each GPU.
        standing: further settings of the stand-in.
        recipe_changes: keys of the recipe.
        args: of every engine.
        share: of a GPU that each engine takes.
        model: keys of every model.
        more: further models.
        there: GPUs that exist already.
        sections: of the configuration.
    """
    with ExitStack() as stack:
        if there is None:
            made = standin(directory / "gpu", gpus=gpus, **(standing or {}))
            there = stack.enter_context(made)
        memory = there.config.memory
        devices = {
            f"gpu{index}": {"kind": "gpu", "uuid": uuid, "memory": size}
            for index, (uuid, size) in enumerate(zip(there.uuids, memory, strict=True))
        }
        settings = {
            "recipe_dirs": [str(recipe(directory / "recipes", **(recipe_changes or {})))],
            **sections,
            "devices": {"host": {"memory": "2GiB"}, **devices, **sections.get("devices", {})},
        }
        keeper = {
            "gpu_paths": [str(there.directory), str(there.libs)],
            "gpu_margin": "1MiB",
            "cuda_lock_timeout": "2s",
        }
        settings["keeper"] = {**keeper, **settings.get("keeper", {})}
        models = [cuda(name, there, *args, share=share, **(model or {})) for name in names]
        models += more
        with site(directory, models, env=there.env, **settings) as here:
            yield GpuSite(here, there)


def settled(daemon: Daemon) -> None:
    """Wait until nothing is in flight."""
    wait_for(
        "nothing in flight",
        lambda: all(e.active + e.waiting + e.suspended == 0 for e in daemon.status().engines),
        detail=daemon.status,
    )
