"""The system calls that engines in containers are refused, as a profile for their runtime.

A profile given by name replaces the runtime's own, so this one carries on what matters of that:
what its documentation lists as blocked, but for calls that engines use (NCCL and UCX copy between
processes with process_vm_readv, NUMA libraries set memory policies). On top io_uring, which a
checkpoint cannot hold. Most of the list fails without capabilities anyway; it is the second lock.

Sources: Docker, "Seccomp security profiles for Docker", table of blocked calls; the format is that
of the OCI runtime specification, config-linux.md, "Seccomp".
"""

import errno
import json
from pathlib import Path

_IO_URING = ("io_uring_setup", "io_uring_enter", "io_uring_register")
_BLOCKED = (
    "acct", "add_key", "bpf", "clock_adjtime", "clock_settime", "create_module", "delete_module",
    "finit_module", "fsconfig", "fsmount", "fsopen", "fspick", "get_kernel_syms", "init_module",
    "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie", "mount",
    "mount_setattr", "move_mount", "name_to_handle_at", "nfsservctl", "open_by_handle_at",
    "open_tree", "perf_event_open", "pivot_root", "query_module", "quotactl", "quotactl_fd",
    "reboot", "request_key", "setns", "settimeofday", "stime", "swapoff", "swapon", "sysfs",
    "umount", "umount2", "unshare", "uselib", "userfaultfd", "ustat", "vm86", "vm86old",
)  # fmt: skip
_NEW_NAMESPACES = (
    0x02000000,  # CLONE_NEWCGROUP
    0x04000000,  # CLONE_NEWUTS
    0x08000000,  # CLONE_NEWIPC
    0x10000000,  # CLONE_NEWUSER
    0x20000000,  # CLONE_NEWPID
    0x40000000,  # CLONE_NEWNET
    0x00020000,  # CLONE_NEWNS
)


def profile(*, chooses_errno: bool = True) -> str:
    """Return the profile as JSON.

    Args:
        chooses_errno: whether the runtime takes `errnoRet`. apptainer 1.4.5 does not: what it
            refuses fails with EPERM, and after that the C library gives up on clone3, and so on
            threads. Then clone3 stays allowed.
    """
    # ENOSYS: libraries then do without, as on an older kernel. The arguments of clone3 are in
    # memory, where no filter can look.
    missing = [*_IO_URING, *(["clone3"] if chooses_errno else [])]
    rules = [_refuse(missing, errno.ENOSYS), _refuse(list(_BLOCKED), errno.EPERM)]
    for flag in _NEW_NAMESPACES:
        has_flag = {"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"}
        rules.append(_refuse(["clone"], errno.EPERM) | {"args": [has_flag]})
    return json.dumps(
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": rules,
        },
        indent=1,
    )


def write(path: Path, *, chooses_errno: bool = True) -> None:
    """Write the profile where a runtime reads it; see `profile`.

    Raises:
        OSError: no room or no right.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(profile(chooses_errno=chooses_errno))
    temporary.rename(path)


def _refuse(names: list[str], code: int) -> dict[str, object]:
    return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": code}
