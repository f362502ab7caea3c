"""What has been shown of engines on several GPUs: whether the CUDA driver can move their state.

The keeper's directory has one file of it. An entry holds for one driver version, one recipe, one
number of GPUs and one command line: change any of these, and it must be shown anew.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swapserve.config.recipes import launch_argv, launch_env
from swapserve.config.schema import ModelConfig

_VERSION = 1
_MODULE_VERSION = Path("/sys/module/nvidia/version")
# They say where an engine runs, not what it is.
_PLACES = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One engine that was suspended and resumed, and what came of it."""

    driver: str
    """NVIDIA's driver, as `580.95.05`."""
    recipe: str
    gpus: int
    argv: str
    """Hash of command line and environment: `launch_hash`."""
    works: bool
    """Whether the same answer came after the state had been away."""
    found: str = ""
    """What was seen, in a sentence."""
    at: str = ""
    """When, UTC."""

    def is_of(self, other: "Probe") -> bool:
        """Whether both are of the same engine, GPUs and driver."""
        mine = (self.driver, self.recipe, self.gpus, self.argv)
        return mine == (other.driver, other.recipe, other.gpus, other.argv)


def probes_path(state_dir: Path) -> Path:
    """Return the file of all probes; `*.json` beside it are the keeper's records of engines."""
    return state_dir / "keeper" / "probes"


def launch_hash(model: ModelConfig) -> str:
    """Return a hash of what decides how an engine uses its GPUs; ports and places are left out."""
    env = launch_env(model, host="", port=0)
    kept = {name: text for name, text in sorted(env.items()) if name not in _PLACES}
    text = json.dumps([launch_argv(model, host="", port=0), kept])
    return hashlib.sha256(text.encode()).hexdigest()


def driver_version(path: Path = _MODULE_VERSION) -> str | None:
    """Return the version of NVIDIA's kernel module; None if none is loaded."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def read_probes(path: Path) -> tuple[Probe, ...]:
    """Return what is in the file; nothing if there is none.

    Raises:
        ValueError: it is not such a file; the message says what is wrong with it.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("version") != _VERSION:
        raise ValueError(f"it is not of version {_VERSION}")
    try:
        return tuple(Probe(**entry) for entry in data["probes"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"an entry has other fields: {error}") from error


def add_probe(path: Path, probe: Probe) -> None:
    """Write a probe in the place of an older one of the same engine, GPUs and driver.

    Raises:
        ValueError: what is there is not such a file.
        OSError: it cannot be read or written.
    """
    kept = [one for one in read_probes(path) if not one.is_of(probe)]
    entries = [dataclasses.asdict(one) for one in (*kept, probe)]
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps({"version": _VERSION, "probes": entries}, indent=2) + "\n")
    staged.replace(path)


def shown(probes: Sequence[Probe], model: ModelConfig, driver: str | None) -> Probe | None:
    """Return the last probe of an engine on as many GPUs, with this command line.

    Args:
        probes: as read.
        model: the engine.
        driver: only probes with this driver count; None, without a kernel module: any.
    """
    argv = launch_hash(model)
    fits = (
        probe
        for probe in reversed(probes)
        if (probe.recipe, probe.gpus, probe.argv) == (model.recipe.name, len(model.gpus), argv)
        and driver in {None, probe.driver}
    )
    return next(fits, None)
