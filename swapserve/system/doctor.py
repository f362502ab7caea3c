"""What works on this machine, what does not, why, and how to mend it.

Leaves nothing behind but the cache in /run that every call of CRIU writes.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from swapserve.config.load import load, resolve_profile
from swapserve.config.schema import Config
from swapserve.errors import ConfigError, SwapServeError
from swapserve.system import checks_gpu, checks_kernel, checks_setup
from swapserve.system.check import Check, Scope

_CHECKS: tuple[Callable[[Scope], Check | Iterable[Check]], ...] = (
    *checks_kernel.CHECKS,
    *checks_setup.CHECKS,
    *checks_gpu.CHECKS,
)


def examine(config_path: Path | None = None) -> list[Check]:
    """Look at everything; never raises for what it finds.

    Args:
        config_path: a configuration whose needs count; without, the defaults are taken.
    """
    config, first = _configuration(config_path)
    profile = resolve_profile(config.keeper.profile if config else "auto")
    scope = Scope(profile=profile, config=config)
    checks = [*first, _profile(scope)]
    for check in _CHECKS:
        checks += run_check(check, scope)
    return checks


def run_check(check: Callable[[Scope], Check | Iterable[Check]], scope: Scope) -> list[Check]:
    """Return a check's findings; one that cannot look says so, which is neither yes nor no."""
    try:
        found = check(scope)
        return [found] if isinstance(found, Check) else list(found)
    except (OSError, ValueError, LookupError, SwapServeError) as error:
        return [
            Check(
                name=check.__name__.replace("_", " "),
                status="warn",
                found=f"unknown: {error}",
                why="It could not be looked at.",
                mend="Try again as root; if that does not help, look at it by hand.",
            )
        ]


def _configuration(path: Path | None) -> tuple[Config | None, list[Check]]:
    if path is None:
        return None, []
    why = "It says what this machine is asked to do."
    try:
        config = load(path)
    except ConfigError as error:
        failed = Check(
            name="configuration",
            status="fail",
            found=str(error),
            why=why,
            mend=f"Correct it and look again with 'swapserve config check {path}'.",
        )
        return _usable(path), [failed]
    found = f"{path}: {len(config.models)} models on {', '.join(config.devices)}"
    return config, [Check(name="configuration", status="ok", found=found, why=why)]


def _usable(path: Path) -> Config | None:
    """Return what a configuration asks for, even if programs, models or secrets are missing."""
    try:
        return load(path, check_binaries=False, secrets=False)
    except ConfigError:
        return None


def _profile(scope: Scope) -> Check:
    why = "'root' can do everything; 'unprivileged' has no disk tier and no sandboxes."
    if scope.profile == "unprivileged":
        mend = "Start 'swapserve serve' as root to have engines checkpointed to disk."
        return Check(name="profile", status="off", found="unprivileged", why=why, mend=mend)
    if os.geteuid() != 0:
        mend = "Run as root, or set keeper.profile: unprivileged."
        found = f"root is configured, but this is uid {os.geteuid()}"
        return Check(name="profile", status="fail", found=found, why=why, mend=mend)
    return Check(name="profile", status="ok", found="root", why=why)
