"""Which versions of everything were measured."""

import platform
from collections.abc import Sequence
from pathlib import Path

import swapserve
from evaluation.engines import EngineKind, vllm_python
from swapserve.config.machine import find_binary
from swapserve.errors import CommandError
from swapserve.system.command import run_sync
from swapserve.system.tools import find_criu

TIMEOUT_S = 60.0
_ROOT = Path(__file__).parent.parent


def commit() -> str:
    """Return the commit of this checkout, marked if files differ from it."""
    try:
        head = _said(["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"])
        changed = _said(["git", "-C", str(_ROOT), "status", "--porcelain", "-uno"])
    except CommandError:
        return "unknown"
    return f"{head} with changes" if changed else head


def versions(kinds: Sequence[EngineKind]) -> dict[str, str]:
    """Return versions by program."""
    found = {
        "swapserve": swapserve.__version__,
        "python": platform.python_version(),
        "criu": _first_line([str(find_criu()), "--version"]),
    }
    for kind in kinds:
        if kind.name == "vllm":
            complete = vllm_python().parent.parent / "complete"
            found[kind.name] = complete.read_text().strip()
        else:
            binary = find_binary("llama-server")
            found[kind.name] = _first_line([str(binary), "--version"])
    return found


def _first_line(argv: list[str]) -> str:
    try:
        return _said(argv).splitlines()[0].removeprefix("Version: ").removeprefix("version: ")
    except (CommandError, IndexError):
        return "unknown"


def _said(argv: list[str]) -> str:
    done = run_sync(argv, timeout_s=TIMEOUT_S)
    return done.stdout.strip() or done.stderr.strip()
