"""What is mounted where, as the kernel says."""

import re
from collections.abc import Collection
from pathlib import Path

_MOUNT_POINT = 4
_OCTAL = re.compile(r"\\([0-7]{3})")


def mounts_below(places: Collection[Path], table: str | None = None) -> list[Path]:
    """Return the mount points strictly below any of some directories, outer ones first.

    Binding a directory does not show what is mounted in it. That hides the GPU's driver where
    NVIDIA's container runtime has mounted each of its files into `/usr`.

    Args:
        places: directories, without links in them.
        table: text of a mountinfo file (None: this process's own).
    """
    text = Path("/proc/self/mountinfo").read_text() if table is None else table
    found = {Path(_unescaped(line.split()[_MOUNT_POINT])) for line in text.splitlines()}
    below = {mount for mount in found if any(up in places for up in mount.parents)}
    return sorted(below, key=lambda mount: (len(mount.parts), mount))


def _unescaped(word: str) -> str:
    """Undo how blanks and the like are written there (proc(5))."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), word)
