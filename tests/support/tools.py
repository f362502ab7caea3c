"""Run a tool in a test and show what it said when it fails."""

import subprocess
from collections.abc import Sequence
from pathlib import Path


def output_of(argv: Sequence[str], *, cwd: Path | None = None, stdin: str = "") -> str:
    """Return standard output and error of a tool that must end with status 0."""
    done = subprocess.run(
        argv,
        cwd=cwd,
        input=stdin,
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout
