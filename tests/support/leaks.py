"""What a keeper and its engines leave on a machine; nothing, when they have ended.

Names carry the tag of the keeper's directory, so other keepers on the machine do not matter. Of
what has no owner's name on it (host's firewall rules, /dev/shm) only what is new counts.
"""

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from swapserve.system.cgroup import mount_point
from swapserve.system.tools import find_tool

SETTLE_S = 15.0
Traces = dict[str, tuple[str, ...]]


def wait_for(
    description: str,
    probe: Callable[[], object],
    timeout_s: float = 60.0,
    detail: Callable[[], object] = lambda: "",
) -> None:
    """Poll until `probe` says something true; when it never does, say what was seen instead."""
    deadline = time.monotonic() + timeout_s
    while not probe():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s:g} s not yet: {description}\n{detail()}")
        time.sleep(0.02)


def tag_of(run_dir: Path) -> str:
    return hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:5]


def traces(directory: Path) -> Traces:
    """Return what exists now of the keeper whose files are below a directory."""
    tag = tag_of(directory / "run")
    found = {
        "processes": _processes(directory, tag),
        "network namespaces": _named(Path("/run/netns"), f"ss{tag}-"),
        "network interfaces": _named(Path("/sys/class/net"), f"ss{tag}-"),
        "cgroups": _named(mount_point(), f"swapserve-{tag}"),
        "mounts": tuple(
            line
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if str(directory) in line or f"ss{tag}-" in line
        ),
        "images under way": tuple(str(path) for path in directory.glob("images/*/.*")),
    }
    return {kind: what for kind, what in found.items() if what}


def host_state() -> Traces:
    """Return what belongs to the whole host and that no engine may change."""
    rules = (_said(str(find_tool("nft")), "list", "ruleset"), _said("iptables-save"))
    shared = Path("/dev/shm")
    return {
        "firewall rules": tuple(
            line for text in rules for line in text.splitlines() if not line.startswith("#")
        ),
        "/dev/shm": tuple(sorted(str(path) for path in shared.iterdir())),
    }


@contextmanager
def no_leak(directory: Path) -> Iterator[None]:
    """Fail when the block leaves anything behind, after removing it."""
    before = host_state()
    try:
        yield
    except BaseException:
        remove(directory)
        raise
    try:
        wait_for(
            f"nothing is left of {directory}",
            lambda: not traces(directory),
            SETTLE_S,
            lambda: traces(directory),
        )
    finally:
        remove(directory)
    now = host_state()
    new = {kind: sorted(set(now[kind]) - set(before[kind])) for kind in now}
    # A file that somebody else's living process maps is that process's own business.
    new["/dev/shm"] = [path for path in new["/dev/shm"] if not _mapped(path)]
    assert not any(new.values()), f"left on the host: {new}"


def remove(directory: Path) -> None:
    """Take away what a failed test left, so that the next one starts clean."""
    tag = tag_of(directory / "run")
    for line in _processes(directory, tag):
        with suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    for name in _named(Path("/sys/class/net"), f"ss{tag}-"):
        _said("ip", "link", "del", name)
    for name in _named(Path("/run/netns"), f"ss{tag}-"):
        _said("ip", "netns", "del", name)
    root = mount_point()
    group = root / f"swapserve-{tag}" if root else None
    if group is not None and group.is_dir():
        for child in [path for path in group.iterdir() if path.is_dir()] + [group]:
            with suppress(OSError):
                child.rmdir()


def _processes(directory: Path, tag: str) -> tuple[str, ...]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            groups = (entry / "cgroup").read_text()
            ended = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        ours = str(directory) in command + _cwd(entry) or f"/swapserve-{tag}/" in groups
        if ours and not (ended and _is_of_init(entry)):
            found.append(f"{entry.name} {command}{' (zombie)' if ended else ''}")
    return tuple(found)


def _cwd(process: Path) -> str:
    try:
        return str((process / "cwd").readlink())
    except OSError:
        return ""


def _is_of_init(process: Path) -> bool:
    """Whether a zombie waits for the machine's first process, which is none of ours."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[1] == "1"
    except OSError:
        return True


def _named(directory: Path | None, prefix: str) -> tuple[str, ...]:
    if directory is None or not directory.is_dir():
        return ()
    return tuple(sorted(path.name for path in directory.iterdir() if path.name.startswith(prefix)))


def _mapped(path: str) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if path in maps.read_text():
                return True
    return False


def _said(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
