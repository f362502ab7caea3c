"""Who listens on a TCP port of this machine: from the kernel's tables and the open files.

Format of the tables: kernel Documentation/networking/proc_net_tcp.rst. Blocks for a walk over
/proc: call it in a thread.
"""

import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"
_STATE, _LOCAL, _INODE = 3, 1, 9


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening TCP socket of this network namespace."""

    address: str
    port: int
    inode: int

    @property
    def reached_at(self) -> str:
        """`host:port` at which a process of this machine reaches it."""
        address = ipaddress.ip_address(self.address)
        if address.version == 4:  # noqa: PLR2004
            return f"{'127.0.0.1' if address.is_unspecified else address}:{self.port}"
        # A wildcard of IPv6 alone (asyncio's servers set IPV6_V6ONLY) is not at 127.0.0.1.
        return f"[{'::1' if address.is_unspecified else address}]:{self.port}"


def listeners() -> list[Listener]:
    """Return every listening TCP socket of this network namespace, IPv4 before IPv6."""
    return [
        listener
        for table in ("tcp", "tcp6")
        for line in _lines(Path("/proc/self/net") / table)
        if (listener := _parse(line)) is not None
    ]


def holders(inodes: Collection[int]) -> dict[int, set[int]]:
    """Return the processes that have any of these sockets open, with those they have.

    Processes whose open files this one may not read are left out.
    """
    found: dict[int, set[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (theirs := sockets_of(int(entry.name)) & set(inodes)):
            found[int(entry.name)] = theirs
    return found


def sockets_of(pid: int) -> set[int]:
    """Return the inodes of a process's sockets; none if it is gone or may not be looked into."""
    found: set[int] = set()
    try:
        descriptors = list(os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return found
    for descriptor in descriptors:
        try:
            target = os.readlink(descriptor.path)  # noqa: PTH115 - one of thousands
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(int(target[len("socket:[") : -1]))
    return found


def listening(pids: Iterable[int]) -> list[Listener]:
    """Return where these processes listen, in this network namespace."""
    theirs = {inode for pid in pids for inode in sockets_of(pid)}
    return [listener for listener in listeners() if listener.inode in theirs]


def _lines(table: Path) -> list[str]:
    try:
        return table.read_text().splitlines()[1:]
    except OSError:  # no IPv6
        return []


def _parse(line: str) -> Listener | None:
    fields = line.split()
    if fields[_STATE] != _LISTEN:
        return None
    address, _, port = fields[_LOCAL].partition(":")
    return Listener(_address(address), int(port, 16), int(fields[_INODE]))


def _address(text: str) -> str:
    """Return an address from words of 32 bits in the machine's byte order."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)
