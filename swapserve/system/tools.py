"""Where the programs are that we call: PATH, then the private prefix of scripts/host-setup."""

import re
from pathlib import Path

from swapserve.config.machine import find_binary, prefix_dir

MIN_CRIU = (4, 0)
_DEFAULT_PREFIX = Path("/var/lib/swapserve/prefix")


def prefix_dirs() -> tuple[Path, ...]:
    """Return the private prefixes, the preferred one first."""
    return tuple(dict.fromkeys((prefix_dir(), _DEFAULT_PREFIX)))


def find_tool(name: str, configured: Path | None = None) -> Path | None:
    """Return the program: the configured one and no other, else from PATH or a prefix."""
    if configured is not None:
        return find_binary(str(configured.absolute()))
    for place in (name, *(str(prefix / "bin" / name) for prefix in prefix_dirs())):
        found = find_binary(place)
        if found is not None:
            return found
    return None


def find_criu(configured: Path | None = None) -> Path | None:
    """Return the CRIU to use, of whatever version."""
    return find_tool("criu", configured)


def criu_version(text: str) -> tuple[int, ...] | None:
    """Return the version in what `criu --version` says, None if there is none in it."""
    found = re.search(r"^Version:\s*(\d+(?:\.\d+)*)", text, re.MULTILINE)
    return tuple(int(part) for part in found[1].split(".")) if found else None
