"""What the configuration needs to know of the machine: memory, places, programs."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from swapserve.config.schema import PathsConfig, Profile

DEFAULT_SHARE = 0.8
"""Part of RAM that engines may use when no device is configured."""

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def resolve_profile(profile: Profile) -> Literal["root", "unprivileged"]:
    """Return the profile in force; `auto` is `root` for the superuser."""
    if profile == "auto":
        return "root" if os.geteuid() == 0 else "unprivileged"
    return profile


def default_paths(profile: Profile) -> PathsConfig:
    """Return where things are kept unless configured: system places, or the user's own (XDG)."""
    if resolve_profile(profile) == "root":
        state = Path("/var/lib/swapserve")
        return PathsConfig(
            state_dir=state, image_dir=state / "images", run_dir=Path("/run/swapserve")
        )
    home = Path.home()
    # Without a login session there is no XDG_RUNTIME_DIR; the cache then holds the sockets.
    cache = _xdg("XDG_CACHE_HOME", home / ".cache") / "swapserve"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return PathsConfig(
        state_dir=_xdg("XDG_STATE_HOME", home / ".local" / "state") / "swapserve",
        image_dir=cache / "images",
        run_dir=Path(runtime) / "swapserve" if runtime else cache / "run",
    )


def prefix_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the private prefix that scripts/host-setup fills with CRIU and engines."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("SWAPSERVE_PREFIX") or "/var/lib/swapserve/prefix")


def find_binary(name: str) -> Path | None:
    """Return the executable of that name on PATH, else in the private prefix, else None.

    A name with a slash must be an executable itself. Links are not resolved: a virtual
    environment's `python` finds its packages by the path it is called with.
    """
    if "/" in name:
        path = Path(name)
        # In this order: where we may not look, `access` says no and `is_file` raises.
        return path.absolute() if os.access(path, os.X_OK) and path.is_file() else None
    found = shutil.which(name) or shutil.which(name, path=str(prefix_dir() / "bin"))
    return Path(found).absolute() if found else None


def total_memory() -> int:
    """Return the bytes of RAM this machine (or the cgroup that holds us) has."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(_CGROUP_LIMIT.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such cgroup, or "max"
        return installed
    return min(installed, limit)


def default_budget() -> int:
    """Return the host device's memory when none is configured, in whole MiB."""
    return int(total_memory() * DEFAULT_SHARE) >> 20 << 20


def _xdg(name: str, fallback: Path) -> Path:
    value = os.environ.get(name, "")
    return Path(value) if value.startswith("/") else fallback
