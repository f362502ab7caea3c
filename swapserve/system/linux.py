"""The few Linux calls that Python's library lacks: namespaces, mounts, prctl, seccomp.

Constants are from the kernel's uapi headers (linux/sched.h, linux/mount.h, linux/prctl.h,
linux/seccomp.h, linux/bpf_common.h); they are part of the kernel's stable ABI.
"""

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Sequence

CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2
_SECCOMP_RET_ALLOW = 0x7FFF0000
_SECCOMP_RET_ERRNO = 0x00050000
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_LAST_POSSIBLE_CAP = 63

IO_URING_SYSCALLS = (425, 426, 427)
"""io_uring_setup, _enter, _register: the same numbers on every 64-bit architecture."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Move the caller (for CLONE_NEWPID: its next child) into new namespaces."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """Move the caller into the namespace that `fd` refers to."""
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str = "") -> None:
    """Mount a file system.

    Raises:
        OSError: with the target in its message.
    """
    _check(
        _libc.mount(
            source.encode() if source else None,
            target.encode(),
            fstype.encode() if fstype else None,
            ctypes.c_ulong(flags),
            data.encode() or None,
        ),
        f"mount {source or fstype} on {target}",
    )


def bind(source: str, target: str, *, read_only: bool) -> None:
    """Bind-mount `source` (not what is mounted below it) on `target`."""
    mount(source, target, None, MS_BIND)
    if read_only:
        mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def umount(target: str, *, detach: bool = False) -> None:
    """Call umount2(2); with `detach`, out of sight at once and gone when unused."""
    _check(_libc.umount2(target.encode(), MNT_DETACH if detach else 0), f"umount {target}")


def pivot_root(new_root: str) -> None:
    """Make `new_root` (a mount point) the root and drop the old one entirely."""
    os.chdir(new_root)
    # pivot_root(".", ".") stacks the old root on the new one (pivot_root(2), NOTES).
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    umount(".", detach=True)
    os.chdir("/")


def _prctl(option: int, *args: int) -> None:
    padded = [ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *padded), f"prctl {option}")


def become_subreaper() -> None:
    """Adopt the orphans among all descendants."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """Let the kernel kill the caller when its parent ends, or end it now if that is over already.

    Children of the caller do not inherit this.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def set_no_new_privs() -> None:
    """Give up gaining privileges by exec, for good."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_all_capabilities() -> None:
    """Empty every capability set of the calling thread; uid 0 then is an ordinary user.

    Raises:
        OSError: the sets could not be emptied.
    """
    for cap in range(_LAST_POSSIBLE_CAP + 1):
        try:
            _prctl(_PR_CAPBSET_DROP, cap)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EPERM}:
                raise
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, struct.pack("6I", *[0] * 6)), "capset")


def deny_syscalls(numbers: Sequence[int]) -> None:
    """Make the system calls fail with ENOSYS from now on, across exec and for all children.

    The caller must have set no_new_privs or hold CAP_SYS_ADMIN. CRIU saves and restores the
    filter with the process.
    """
    load, jump_equal, ret = 0x20, 0x15, 0x06
    program = [(load, 0, 0, 0)]  # seccomp_data.nr is at offset 0
    for position, number in enumerate(numbers):
        program.append((jump_equal, len(numbers) - position, 0, number))
    program.append((ret, 0, 0, _SECCOMP_RET_ALLOW))
    program.append((ret, 0, 0, _SECCOMP_RET_ERRNO | errno.ENOSYS))
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    filter_program = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(filter_program)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(holder))
