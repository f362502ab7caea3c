"""The doctor's look at the kernel: version, privileges, namespaces, cgroups, huge pages."""

import os
import re
import tempfile
from pathlib import Path

from swapserve.errors import CommandError
from swapserve.system.cgroup import mount_point
from swapserve.system.check import Check, Scope
from swapserve.system.command import run_sync
from swapserve.system.tools import find_tool

MIN_KERNEL = (5, 9)
"""CAP_CHECKPOINT_RESTORE came with 5.9, pidfds with 5.3, the v2 freezer with 5.2."""
TOOL_TIMEOUT_S = 30.0

CAPABILITIES = {
    12: ("CAP_NET_ADMIN", "networks of sandboxes"),
    19: ("CAP_SYS_PTRACE", "CRIU"),
    21: ("CAP_SYS_ADMIN", "sandboxes, mounts and CRIU"),
    40: ("CAP_CHECKPOINT_RESTORE", "CRIU"),
}
"""Number (linux/capability.h) → name and what the keeper needs it for."""
_SYS_RESOURCE = 24


def kernel(scope: Scope) -> Check:
    """Look at the kernel's version."""
    release = scope.read("proc/sys/kernel/osrelease")
    found = re.match(r"(\d+)\.(\d+)", release)
    new_enough = found is not None and (int(found[1]), int(found[2])) >= MIN_KERNEL
    return Check(
        name="kernel",
        status="ok" if new_enough else scope.without,
        found=f"Linux {release}",
        why="Checkpoints, pidfds and the cgroup v2 freezer need Linux 5.9 or newer.",
        mend="" if new_enough else "Boot Linux 5.9 or newer (Debian 12 has 6.1).",
    )


def privileges(scope: Scope) -> Check:
    """Look at user and capabilities."""
    uid = os.geteuid()
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", scope.read("proc/self/status"), re.MULTILINE)
    if match is None:
        raise OSError("no CapEff line in /proc/self/status")
    held = int(match[1], 16)
    missing = [text for number, text in CAPABILITIES.items() if not held >> number & 1]
    has_resource = bool(held >> _SYS_RESOURCE & 1)
    why = "The keeper builds sandboxes and checkpoints processes; the daemon needs no privilege."
    if missing:
        lacks = ", ".join(f"{name} (for {use})" for name, use in missing)
        return Check(
            name="privileges",
            status=scope.without,
            found=f"uid {uid} without {lacks}",
            why=why,
            mend="Run as root with these capabilities ('sudo swapserve serve'; in a container"
            " --privileged or --cap-add each).",
        )
    if not has_resource:
        return Check(
            name="privileges",
            status="warn",
            found=f"uid {uid}, all but CAP_SYS_RESOURCE",
            why="CRIU needs it for processes of another uid, so engines run as root's uid here,"
            " without any capability, instead of as a user of their own.",
            mend="Grant CAP_SYS_RESOURCE if engines are to have a uid of their own.",
        )
    return Check(name="privileges", status="ok", found=f"uid {uid}, all capabilities", why=why)


def namespaces(scope: Scope) -> Check:
    """Try whether namespaces can be made: they are gone with the process that made them."""
    why = "Each engine has its own processes, mounts and network, so that it can be restored."
    kinds = [
        kind for kind in ("pid", "mnt", "net") if not (scope.root / f"proc/self/ns/{kind}").exists()
    ]
    if kinds:
        return Check(
            name="namespaces",
            status=scope.without,
            found=f"the kernel lacks {', '.join(kinds)} namespaces",
            why=why,
            mend="Boot a kernel with CONFIG_NAMESPACES, CONFIG_PID_NS and CONFIG_NET_NS.",
        )
    unshare = find_tool("unshare")
    if unshare is None:
        return Check(
            name="namespaces",
            status="warn",
            found="pid, mnt and net are there; not tried, since 'unshare' is missing",
            why=why,
            mend="apt-get install util-linux",
        )
    try:
        run_sync(
            [str(unshare), "--mount", "--net", "--pid", "--fork", "true"], timeout_s=TOOL_TIMEOUT_S
        )
    except CommandError as error:
        return Check(
            name="namespaces",
            status=scope.without,
            found=f"they cannot be made: {error.output_tail}",
            why=why,
            mend="Run as root outside a container, or in one with --privileged.",
        )
    return Check(name="namespaces", status="ok", found="pid, mnt and net can be made", why=why)


def networks(scope: Scope) -> Check:
    """Look for the tools that wire a sandbox and lock its connections."""
    why = "'ip' wires sandboxes; CRIU locks connections with nft while an engine is away."
    missing = [name for name in ("ip", "nft") if find_tool(name) is None]
    if missing:
        return Check(
            name="networks",
            status=scope.without,
            found=f"without {' and '.join(missing)}",
            why=why,
            mend="Run scripts/host-setup as root, or apt-get install iproute2 nftables.",
        )
    places = ", ".join(str(find_tool(name)) for name in ("ip", "nft"))
    return Check(name="networks", status="ok", found=places, why=why)


def io_uring(scope: Scope) -> Check:
    """Look for the means to keep io_uring from engines."""
    why = "CRIU cannot checkpoint io_uring, which vLLM's server would open; a filter hides it."
    if "errno" in scope.read("proc/sys/kernel/seccomp/actions_avail").split():
        return Check(name="io_uring", status="ok", found="hidden from engines by seccomp", why=why)
    return Check(
        name="io_uring",
        status=scope.without,
        found="seccomp has no errno action",
        why=why,
        mend="Boot a kernel with CONFIG_SECCOMP_FILTER.",
    )


def freezer(scope: Scope) -> Check:
    """Try whether a cgroup can be made and frozen; it is removed again."""
    why = "A frozen cgroup stops all of an engine at once; SIGSTOP, used without, is less exact."
    top = mount_point()
    if top is None:
        return Check(
            name="freezer",
            status="warn",
            found="no cgroup v2 hierarchy is mounted",
            why=why,
            mend="mount -t cgroup2 none /sys/fs/cgroup/unified",
        )
    try:
        child = Path(tempfile.mkdtemp(prefix="swapserve-doctor-", dir=top))
        try:
            can_freeze = (child / "cgroup.freeze").exists()
        finally:
            child.rmdir()  # of a cgroup, takes the kernel's files with it
    except OSError as error:
        return Check(
            name="freezer",
            status="warn" if scope.profile == "root" else "off",
            found=f"no cgroup can be made in {top}: {error.strerror}",
            why=why,
            mend=f"Run as root with {top} writable (in a container: --cgroupns=host -v"
            f" {top}:{top}:rw).",
        )
    return Check(
        name="freezer",
        status="ok" if can_freeze else "warn",
        found=f"cgroup v2 at {top}" + ("" if can_freeze else ", without cgroup.freeze"),
        why=why,
        mend="" if can_freeze else "Boot Linux 5.2 or newer.",
    )


def huge_pages(scope: Scope) -> Check:
    """Look at the switch of transparent huge pages."""
    switch = scope.root / "sys/kernel/mm/transparent_hugepage/enabled"
    why = "Restoring gigabytes is bound by page faults; huge pages make it about twice as fast."
    text = switch.read_text(encoding="ascii").strip()
    chosen = re.search(r"\[(\w+)\]", text)
    if chosen and chosen[1] == "always":
        return Check(name="huge pages", status="ok", found="always on", why=why)
    wanted = scope.config is not None and scope.config.keeper.huge_pages
    if wanted and os.access(switch, os.W_OK):
        found = f"{text}; switched to always during a restore"
        return Check(name="huge pages", status="ok", found=found, why=why)
    if wanted:
        return Check(
            name="huge pages",
            status="fail",
            found=f"{text}; keeper.huge_pages is on, but the switch is not writable",
            why=why,
            mend=f"Run the keeper as root with {switch} writable, or 'echo always > {switch}'.",
        )
    return Check(
        name="huge pages",
        status="warn" if scope.profile == "root" else "off",
        found=f"{text}; keeper.huge_pages is off",
        why=why,
        mend="Set keeper.huge_pages: true (it switches the whole host while a restore runs).",
    )


CHECKS = (kernel, privileges, namespaces, networks, io_uring, freezer, huge_pages)
