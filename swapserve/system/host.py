"""Facts of this host: addresses in use, free ports."""

import socket

import psutil


def addresses() -> set[str]:
    """Return every IPv4 address of this network namespace's interfaces."""
    return {
        address.address
        for entries in psutil.net_if_addrs().values()
        for address in entries
        if address.family == socket.AF_INET
    }


def free_port() -> int:
    """Return a loopback TCP port that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this loopback TCP port now."""
    with socket.socket() as probe:
        # As servers do: connections of an earlier one that still linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
