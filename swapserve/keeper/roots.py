"""Which process is an engine's first one, and may it be frozen? From the kernel's own tables.

When only a port is known, it is the topmost of those that hold the listening socket (workers
inherit it), and from there up to a parent only where it certainly belongs to the same engine
(`_belongs`). Too low a root shows: GPU state is missing below it, and `attach: pid:N` names the
right one. Too high a one would freeze somebody's shell or notebook.
"""

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

from swapserve.system import listeners, process
from swapserve.system.cgroup import group_of
from swapserve.system.listeners import Listener
from swapserve.system.process import ProcessRef

_KERNEL_THREAD = 0x00200000
"""PF_KTHREAD of the flags in /proc/PID/stat (kernel include/linux/sched.h)."""
_NO_ENGINES = frozenset(
    (
        *("systemd", "init", "supervisord", "runsv", "s6-supervise", "s6-svscan", "monit"),
        *("circusd", "pm2", "containerd", "containerd-shim", "conmon", "dockerd", "podman"),
        *("tini", "dumb-init", "catatonit", "docker-init", "appinit"),
        *("sh", "bash", "dash", "zsh", "fish", "ksh", "csh", "tcsh", "busybox"),
        *("login", "sshd", "su", "sudo", "doas", "screen", "tmux: server", "script"),
        *("timeout", "nohup", "xargs", "make"),
        *("mpirun", "mpiexec", "orted", "slurmstepd", "srun", "torchrun"),
    )
)
"""Names of programs that start engines and are none: shells, supervisors, launchers."""
_FORWARDERS = frozenset(
    ("docker-proxy", "conmon", "rootlessport", "slirp4netns", "pasta", "pasta.avx2")
)
"""Names of programs that hold the published port of a container."""
_INTERPRETERS = ("python", "node", "java", "ruby", "perl", "php")
"""The same program in parent and child says nothing if it is one of these."""


class RefusedError(Exception):
    """Why an engine cannot be attached to, in words for its operator."""


def listening_on(port: int) -> tuple[int, Listener]:
    """Return the first process of the engine that listens on a port, and its socket."""
    found = [one for one in listeners.listeners() if one.port == port]
    if not found:
        raise RefusedError("nobody listens there, in this network namespace")
    owners = listeners.holders({one.inode for one in found})
    if not owners:
        raise RefusedError(
            "who listens there cannot be seen: it is in another PID namespace, or of another user"
        )
    if forwarders := {_name(pid) for pid in owners} & _FORWARDERS:
        raise RefusedError(
            f"{forwarders.pop()} listens there, for a container: use `attach: container:NAME`"
        )
    # Socket activation and shells may hold the socket, too.
    engines = {pid for pid in owners if pid > 1 and _name(pid) not in _NO_ENGINES} or set(owners)
    tops = {pid for pid in engines if not engines & set(_above(pid))}
    roots = {_climb(pid) for pid in tops}
    if len(roots) > 1:
        numbers = ", ".join(str(pid) for pid in sorted(roots))
        raise RefusedError(f"several processes listen there ({numbers}): use `attach: pid:N`")
    root = roots.pop()
    theirs = {inode for pid in tops for inode in owners[pid]}
    return root, next(one for one in found if one.inode in theirs)


def _climb(pid: int) -> int:
    for parent in _above(pid):
        if not _belongs(pid, parent):
            break
        pid = parent
    return pid


def _belongs(child: int, parent: int) -> bool:
    """Whether a parent is part of its child's engine, as far as that is certain.

    Both in a PID namespace of their own (a container), in one systemd service, of one program that
    is no interpreter, or parent and child of Python's multiprocessing; never another user's, never
    the program that starts engines, never above or among ourselves.
    """
    if parent <= 1 or _name(parent) in _NO_ENGINES or parent in _ourselves():
        return False
    namespace = _link(child, "ns/pid")
    if _users(parent) != _users(child) or namespace != _link(parent, "ns/pid"):
        return False
    if namespace != _link(os.getpid(), "ns/pid"):
        return True
    return _session(parent) == _session(child) and (
        _in_one_service(child, parent) or _of_one_program(child, parent)
    )


def _in_one_service(child: int, parent: int) -> bool:
    theirs, above = group_of(child), group_of(parent)
    if theirs is None or above is None or theirs.path != above.path:
        return False
    # A user's own manager is a service, too: everything that the user runs.
    return theirs.path.suffix == ".service" and not theirs.path.name.startswith("user@")


def _of_one_program(child: int, parent: int) -> bool:
    program = _link(child, "exe")
    if program is None or program != _link(parent, "exe"):
        return False
    return not Path(program).name.startswith(_INTERPRETERS) or _is_worker(child)


def _is_worker(pid: int) -> bool:
    """Whether a process was started by Python's multiprocessing, whose parent is its program."""
    return b"from multiprocessing." in _read(pid, "cmdline")


# ------------------------------------------------------------- what is refused


def identify(pid: int) -> ProcessRef:
    """Return a running process; refuse what is none, or only a thread of one."""
    try:
        root = ProcessRef.of(pid)
    except ProcessLookupError:
        raise RefusedError("there is no such process (in our PID namespace)") from None
    leader = _status(pid).get("Tgid", "")
    if leader != str(pid):
        raise RefusedError(f"that is a thread of process {leader}")
    return root


def check(root: ProcessRef, held: Mapping[str, ProcessRef]) -> None:
    """Refuse what must not be frozen, and what we have no rights over."""
    pid = root.pid
    if pid == 1:
        raise RefusedError("that is the machine's first process")
    if _is_kernel_thread(pid):
        raise RefusedError("that is a thread of the kernel")
    if pid in _ourselves():
        raise RefusedError("that is SwapServe itself, or runs it")
    tree = set(process.tree(pid))
    for name, other in held.items():
        if other.pid in tree or pid in process.tree(other.pid):
            raise RefusedError(f"that is the engine of '{name}'")
    if os.getpid() in _above(pid):
        raise RefusedError("that was started by SwapServe")
    for each in sorted(tree):
        _check_rights(each)


def _check_rights(pid: int) -> None:
    uid = os.geteuid()
    users = _users(pid)
    if uid != 0 and users - {uid}:
        whose = ", ".join(sorted(_user_name(one) for one in users - {uid}))
        raise RefusedError(
            f"process {pid} is of user {whose}, and this keeper runs as {_user_name(uid)}"
        )
    try:
        os.kill(pid, 0)
        os.listdir(f"/proc/{pid}/fd")  # noqa: PTH208 - the right to look is what counts
    except ProcessLookupError:
        return  # just ended
    except FileNotFoundError:
        return
    except PermissionError as error:
        raise RefusedError(
            f"no right to process {pid} ({error.strerror}); it takes CAP_KILL and CAP_SYS_PTRACE"
        ) from error


# --------------------------------------------------------------- /proc


def _above(pid: int) -> list[int]:
    """Return the parents of a process, the nearest first."""
    found: list[int] = []
    while pid > 1:
        pid = int(_status(pid).get("PPid", "0"))
        if pid > 0:
            found.append(pid)
    return found


def _ourselves() -> set[int]:
    return {os.getpid(), *_above(os.getpid())}


def _is_kernel_thread(pid: int) -> bool:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return len(fields) > 6 and bool(int(fields[6]) & _KERNEL_THREAD)  # noqa: PLR2004


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _users(pid: int) -> set[int]:
    return {int(uid) for uid in _status(pid).get("Uid", "").split()}


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _name(pid: int) -> str:
    """Return a process's name (15 bytes at most, as the kernel keeps it)."""
    return _read(pid, "comm").decode(errors="replace").strip()


def _status(pid: int) -> dict[str, str]:
    lines = _read(pid, "status").decode(errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _link(pid: int, name: str) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/{name}").readlink())
    except OSError:
        return None


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
