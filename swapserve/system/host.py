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
