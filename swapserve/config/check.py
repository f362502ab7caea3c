"""Checks that need more than one key at a time, and the trust in the files themselves."""

import ipaddress
import os
import pwd
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from swapserve.config.machine import find_binary, resolve_profile
from swapserve.config.models import Read
from swapserve.config.nodes import Problems, near
from swapserve.config.reader import Section
from swapserve.config.recipe_files import shipped_recipes
from swapserve.config.schema import (
    POLICIES,
    Config,
    DeviceConfig,
    KeeperConfig,
    PathsConfig,
    SchedulingConfig,
    ServerConfig,
)
from swapserve.errors import ConfigError
from swapserve.ids import DeviceName
from swapserve.states import Tier

PLUGINS = "swapserve.policies"
"""Entry points that add scheduling policies."""
_SOCKET_PATH_BYTES = 107
"""What fits into a Unix socket's address on Linux (unix(7))."""
_SMALLEST_PREFIX = 30
"""A sandbox's own network is a /30."""


def check_server(server: ServerConfig, section: Section, problems: Problems) -> None:
    """Refuse an open door: another address than loopback without API keys."""
    if not is_loopback(server.host) and not server.api_keys and "api_keys" not in section.bad:
        expected = "a loopback address such as 127.0.0.1, or server.api_keys"
        line = section.line_of("host")
        problems.add(line, "server.host", f"{server.host!r} without API keys", expected)


def check_policy(scheduling: SchedulingConfig, section: Section, problems: Problems) -> None:
    """Check that the policy is one of ours or of an installed plugin, without loading that."""
    known = [*POLICIES, *sorted(entry_points(group=PLUGINS).names - set(POLICIES))]
    if scheduling.policy not in known:
        expected = f"one of {', '.join(known)}{near(scheduling.policy, known)}"
        line = section.line_of("policy")
        problems.add(line, "scheduling.policy", f"the policy {scheduling.policy!r}", expected)


def check_programs(
    server: ServerConfig, keeper: KeeperConfig, sections: Mapping[str, Section], problems: Problems
) -> None:
    """Check what server and keeper need from this machine: an account, CRIU."""
    if server.user is not None and not _has_user(server.user):
        line = sections["server"].line_of("user")
        found = f"the unknown account {server.user!r}"
        problems.add(line, "server.user", found, "an account of this machine")
    if keeper.criu is not None and find_binary(str(keeper.criu)) is None:
        line = sections["keeper"].line_of("criu")
        found = f"{keeper.criu}, which is not there"
        problems.add(line, "keeper.criu", found, "an executable file")


def check_subnet(keeper: KeeperConfig, section: Section, models: int, problems: Problems) -> None:
    """Check that the subnet is one, is private and has room for every model."""
    expected = "a private IPv4 network such as 10.231.0.0/16"
    try:
        network = ipaddress.IPv4Network(keeper.subnet)
    except ValueError:
        found = f"the text {keeper.subnet!r}"
        problems.add(section.line_of("subnet"), "keeper.subnet", found, expected)
        return
    if not network.is_private or network.prefixlen > _SMALLEST_PREFIX:
        found = f"the network {network}"
        problems.add(section.line_of("subnet"), "keeper.subnet", found, expected)
    elif models > 2 ** (_SMALLEST_PREFIX - network.prefixlen):
        found = f"{network}, which has no room for {models} models"
        problems.add(section.line_of("subnet"), "keeper.subnet", found, "a larger network")


def check_socket(paths: PathsConfig, section: Section, problems: Problems) -> None:
    """Check that the keeper's socket can be made below `paths.run`."""
    longest = _SOCKET_PATH_BYTES - len("/keeper.sock")
    found = len(os.fsencode(paths.run_dir.absolute()))
    if found > longest:
        expected = f"at most {longest}, the kernel's limit for a socket in it"
        line = section.line_of("run_dir")
        problems.add(line, "paths.run_dir", f"a path of {found} bytes", expected)


def check_names(sections: Iterable[Section], problems: Problems) -> None:
    """Check that no name or alias is used twice."""
    first: dict[str, str] = {}
    for section in sections:
        values = section.values
        entries = [("name", "name", values["name"])] if "name" in values else []
        aliases = values.get("aliases", ())
        entries += [("aliases", f"aliases[{i}]", alias) for i, alias in enumerate(aliases)]
        for name, at, text in entries:
            key = f"{section.key}.{at}"
            if text in first:
                found = f"{text!r}, which is already at {first[text]}"
                problems.add(section.line_of(name), key, found, "a name of its own")
            first.setdefault(text, f"{key} (line {section.line_of(name)})")


def check_memory(
    reads: Sequence[Read], devices: Mapping[DeviceName, DeviceConfig], problems: Problems
) -> None:
    """Check that every engine, and all pinned ones together, fit on their device."""
    pinned = dict.fromkeys(devices, 0)
    for read in reads:
        model, section = read.model, read.section
        if model.memory_bytes is None:
            continue
        for name in model.devices:
            room = devices[name].memory_bytes
            if model.memory_bytes > room:
                found = f"{model.memory_bytes} bytes"
                expected = f"at most the {room} bytes of device {name!r}"
                line = section.line_of("memory_bytes")
                problems.add(line, f"{section.key}.memory", found, expected)
            elif model.pin:
                pinned[name] += model.memory_bytes
                if pinned[name] > room:
                    found = f"{pinned[name]} bytes pinned on device {name!r}"
                    expected = f"at most its {room} bytes"
                    problems.add(section.line_of("pin"), f"{section.key}.pin", found, expected)


def check_tiers(
    reads: Sequence[Read], devices: Mapping[DeviceName, DeviceConfig], problems: Problems
) -> None:
    """Check that engines can leave their devices the way they are told to."""
    for read in reads:
        model, section = read.model, read.section
        kinds = {devices[name].kind for name in model.devices}
        if len(kinds) > 1 or (len(model.devices) > 1 and "gpu" not in kinds):
            found = f"{', '.join(model.devices)}"
            expected = "one device, or several GPUs"
            problems.add(section.line_of("devices"), f"{section.key}.device", found, expected)
        elif "gpu" not in kinds and Tier.HOST in model.tiers:
            expected = "disk or none: only GPU state has a host tier; in RAM it is already"
            problems.add(section.line_of("tiers"), f"{section.key}.tiers", "host", expected)


def check_ports(
    reads: Sequence[Read], server: ServerConfig, keeper: KeeperConfig, problems: Problems
) -> None:
    """Check the ports of engines that share the host's network with the front door."""
    taken = {server.port: "server.port"}
    sandboxes = resolve_profile(keeper.profile) == "root"
    for read in reads:
        port = read.model.port
        if port is None or (read.model.sandbox and sandboxes):
            continue
        key = f"{read.section.key}.port"
        if port in taken:
            found = f"{port}, which {taken[port]} has too"
            problems.add(read.section.line_of("port"), key, found, "a port of its own, or none")
        taken.setdefault(port, key)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def config_files(config: Config) -> tuple[Path, ...]:
    """Return the files that decide what engines run: the configuration and its recipes.

    Shipped recipes are left out: whoever can change them can change the program beside them.
    """
    recipes = {model.recipe.source for model in config.models.values()} - shipped_recipes()
    return (config.source, *sorted(path for path in recipes if path is not None))


def check_ownership(*paths: Path) -> None:
    """Refuse files that somebody else could change: root and this process's account may.

    Looks at each file, at what it links to, and at every directory above both.

    Raises:
        ConfigError: with each file or directory that others can write.
    """
    places = dict.fromkeys(place for path in paths for place in _chain(path))
    found = [(place, _weakness(place)) for place in places]
    problems = Problems(paths[0] if paths else Path())
    for place, weakness in found:
        if weakness is not None:
            expected = "only root or the account of this process to be able to change it"
            problems.add(None, str(place), weakness, expected)
    if problems.found:
        raise ConfigError(problems.found)


def _chain(path: Path) -> Iterator[Path]:
    for place in (path.absolute(), path.resolve()):
        yield place
        yield from place.parents


def _weakness(place: Path) -> str | None:
    try:
        status = place.stat()
    except OSError as error:
        return f"{error.strerror}"
    if status.st_uid not in {0, os.geteuid()}:
        return f"the owner {status.st_uid}"
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    # In a sticky directory such as /tmp nobody can replace another's file.
    if others and not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        return f"the mode {stat.filemode(status.st_mode)}, which lets others write"
    return None


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
