"""A network namespace per engine: loopback inside, one veth pair to the host, no way out.

Ports never collide, other programs do not reach an engine by accident, and CRIU's network lock
lives inside the namespace and goes with it. Made with iproute2's `ip netns`, so that an operator
sees what is there (`ip netns list`). Names start with the keeper's tag, so that a later keeper
recognises what belongs to nobody.
"""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from swapserve.system.command import run

COMMAND_TIMEOUT_S = 10.0
NETNS_DIR = Path("/run/netns")


@dataclass(frozen=True, slots=True)
class Network:
    """One engine's namespace; `index` picks its /30 of the subnet."""

    tag: str
    index: int
    subnet: ipaddress.IPv4Network

    @property
    def name(self) -> str:
        """Name of the namespace and of the host side's interface (at most 15 characters)."""
        return f"ss{self.tag}-{self.index}"

    @property
    def path(self) -> Path:
        """File that refers to the namespace."""
        return NETNS_DIR / self.name

    @property
    def host_ip(self) -> str:
        """Address of the keeper's side."""
        return str(self.subnet[self.index * 4 + 1])

    @property
    def engine_ip(self) -> str:
        """Address at which the engine is reached."""
        return str(self.subnet[self.index * 4 + 2])

    @property
    def inode(self) -> int:
        """Number by which CRIU names the namespace."""
        return self.path.stat().st_ino

    async def make(self) -> None:
        """Create it if it is not there.

        Raises:
            CommandError: with what `ip` said; nothing is left behind.
        """
        if self.path.exists() and Path("/sys/class/net", self.name).exists():
            return
        await self.remove()
        # IPv6 stays off inside: duplicate address detection would delay the first packets.
        batch = (
            f"netns add {self.name}\n"
            f"link add {self.name} type veth peer name eth0 netns {self.name}\n"
            f"addr add {self.host_ip}/30 dev {self.name}\n"
            f"link set {self.name} up\n"
        )
        inside = f"addr add {self.engine_ip}/30 dev eth0\nlink set eth0 up\nlink set lo up\n"
        try:
            await self._ip(batch)
            await self._ip(inside, "-n", self.name)
        except BaseException:
            await self.remove()
            raise

    async def remove(self) -> None:
        """Delete it and its interface; nothing happens if there is none."""
        await self._ip(f"link del {self.name}\n", check=False)
        if self.path.exists():
            await self._ip(f"netns del {self.name}\n", check=False)

    async def unlock(self, nft: Path | None) -> int:
        """Remove network locks that a killed CRIU left inside; return how many there were."""
        if nft is None or not self.path.exists():
            return 0
        inside = ("ip", "netns", "exec", self.name, str(nft))
        listed = await run([*inside, "list", "tables"], timeout_s=COMMAND_TIMEOUT_S, check=False)
        locks = [line for line in listed.stdout.splitlines() if " CRIU-" in line]
        for table in locks:
            await run([*inside, "delete", *table.split()], timeout_s=COMMAND_TIMEOUT_S, check=False)
        return len(locks)

    async def _ip(self, batch: str, *options: str, check: bool = True) -> None:
        argv = ["ip", *options, "-batch", "-"]
        await run(argv, timeout_s=COMMAND_TIMEOUT_S, stdin=batch.encode(), check=check)


async def sweep(tag: str, keep: set[str]) -> list[str]:
    """Delete the namespaces of this tag that are not in `keep`; return their names."""
    names = os.listdir(NETNS_DIR) if NETNS_DIR.is_dir() else []  # noqa: PTH208
    orphans = [name for name in names if name.startswith(f"ss{tag}-") and name not in keep]
    for name in orphans:
        for argv in (["ip", "link", "del", name], ["ip", "netns", "del", name]):
            await run(argv, timeout_s=COMMAND_TIMEOUT_S, check=False)
    return orphans
