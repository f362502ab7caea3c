"""The program that becomes an engine: builds its namespaces and mounts, then execs it.

Run by the keeper as `python -m swapserve.keeper.sandbox_init`, a `SandboxSpec` as JSON on stdin,
with the keeper's pid as `parent`.
It prints one JSON line: `{"pid": host pid}` once the engine has been executed, or `{"error"}`.
The engine is the child of a process that has ended, so it becomes the keeper's own child (the
keeper is a subreaper). Why each part is there: `swapserve/keeper/sandbox.py`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from swapserve.system import linux

_STEP = "start"


def _step(name: str) -> None:
    global _STEP  # noqa: PLW0603 - one short program; names the step in the error
    _STEP = name


def main() -> int:
    """Fork the engine into its namespaces; report its pid or what went wrong."""
    spec = json.load(sys.stdin)
    # Nobody would know of an engine that a killed keeper has begun to start. One that is in its
    # cgroup already is found there by the next keeper.
    linux.die_with(spec["parent"])
    read_end, write_end = os.pipe()  # close-on-exec: end of file means that exec succeeded
    try:
        _enter(spec)
        child = os.fork()
    except OSError as error:
        _say({"error": f"{_STEP}: {error}"})
        return 1
    if child == 0:
        os.close(read_end)
        _become_engine(spec, write_end)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        failure = pipe.read()
    if failure:
        os.waitpid(child, 0)
        _say({"error": failure})
        return 1
    _say({"pid": child})
    return 0


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _enter(spec: dict[str, Any]) -> None:
    _step("join cgroups")
    for path in spec["cgroups"]:
        Path(path, "cgroup.procs").write_text("0")
    if spec["netns"]:
        _step("join network namespace")
        netns = os.open(spec["netns"], os.O_RDONLY | os.O_CLOEXEC)
        linux.setns(netns, linux.CLONE_NEWNET)
        os.close(netns)
    if spec["root"]:
        _step("unshare")
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID)


def _become_engine(spec: dict[str, Any], failures: int) -> None:
    try:
        os.setsid()
        if spec["root"]:
            _build_root(spec)
        _redirect(spec["log"])
        _step("drop privileges")
        os.umask(0o077)
        if not spec["keeps_rights"]:
            linux.set_no_new_privs()
            linux.deny_syscalls(linux.IO_URING_SYSCALLS)
            if os.geteuid() == 0:
                linux.drop_all_capabilities()
        _step(f"execute {spec['argv'][0]}")
        os.chdir(spec["cwd"])
        os.execvpe(spec["argv"][0], spec["argv"], spec["env"])  # noqa: S606 - an argv list
    except BaseException as error:  # noqa: BLE001 - the last frame of a forked child
        os.write(failures, f"{_STEP}: {error}".encode())
    os._exit(127)


def _build_root(spec: dict[str, Any]) -> None:
    root = spec["root"]
    _step("build mount tree")
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.bind(root, root, read_only=False)
    quiet = linux.MS_NOSUID | linux.MS_NODEV
    for target, options in spec["tmpfs"].items():  # first: what is bound may lie below /tmp
        Path(root + target).mkdir(parents=True, exist_ok=True)
        linux.mount("tmpfs", root + target, "tmpfs", quiet, options)
    for bound in spec["binds"]:
        target = Path(root + bound["target"])
        if Path(bound["source"]).is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif not target.exists():  # it may be there, and read-only
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        linux.bind(bound["source"], str(target), read_only=bound["read_only"])
    Path(root, "proc").mkdir(exist_ok=True)
    linux.mount("proc", root + "/proc", "proc", quiet)
    linux.pivot_root(root)


def _redirect(log: str) -> None:
    """Stdin from /dev/null, output appended to the log; opened inside the new mount tree."""
    _step("open log")
    null = os.open("/dev/null", os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for fd in (null, out):
        if fd > 2:  # noqa: PLR2004
            os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
