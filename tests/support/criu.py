"""The real CRIU, whose restores do as they are told."""

from pathlib import Path
from typing import Literal

from swapserve.system.tools import find_tool
from tests.support.keeper import script

WRAPPER = """#!/bin/bash
# The real CRIU, but for what the file `mode` says of restores, and of whose images.
read -r mode engine < {mode}
if [ "$1" = restore ] && [[ "$*" == *"/images/$engine"* ]]; then
  case $mode in
    fails) exit 1 ;;
    waits)
      touch {waits}
      while [ "$mode" = waits ]; do sleep 0.02; read -r mode engine < {mode}; done
      [ "$mode" = fails ] && exit 1
      ;;
  esac
fi
exec {criu} "$@"
"""


class Restores:
    """A program in place of `criu`, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._mode = directory / "mode"
        self._waits = directory / "waits"
        self.go("whole")
        text = WRAPPER.format(criu=find_tool("criu"), mode=self._mode, waits=self._waits)
        self.program = script(directory / "criu", text)

    def go(self, how: Literal["whole", "fails", "waits"], engine: str = "") -> None:
        """Say how restores (of one engine) go from now on, and the one that waits."""
        self._waits.unlink(missing_ok=True)
        new = self._mode.with_suffix(".new")
        new.write_text(f"{how} {engine}\n")
        new.replace(self._mode)

    def waiting(self) -> bool:
        """Whether one waits now."""
        return self._waits.exists()
