"""Read a configuration file, check it, and report everything wrong with it at once."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swapserve.config import check, check_gpu, check_launch
from swapserve.config.api_keys import read_api_keys
from swapserve.config.fields import Key, keys_of
from swapserve.config.layout import parts, top_keys
from swapserve.config.machine import default_budget, default_paths, resolve_profile
from swapserve.config.models import ModelReader, Read
from swapserve.config.nodes import Node, Problems, Table, parse
from swapserve.config.reader import Reader, Section
from swapserve.config.recipe_files import RecipeBook
from swapserve.config.schema import (
    DEVICE_PATTERN,
    Config,
    DeviceConfig,
    ImagesConfig,
    KeeperConfig,
    PathsConfig,
    SchedulingConfig,
    ServerConfig,
)
from swapserve.ids import DeviceName

__all__ = ["default_paths", "load", "resolve_profile"]


def load(path: Path, *, check_binaries: bool = True, secrets: bool = True) -> Config:
    """Read and check a configuration file.

    Args:
        path: the YAML file; relative paths in it start at its directory.
        check_binaries: whether programs, model files and accounts must be there.
        secrets: whether to look up `${env:NAME}` and `{file: path}`; without, keys stay as
            written (the keeper has no use for them, nor the daemon's environment).

    Raises:
        ConfigError: with every problem found, each with its line.
    """
    path = path.absolute()
    problems = Problems(path)
    root = parse(path, problems)
    config = _Loader(Reader(problems, secrets), root, check_binaries).config()
    problems.check()
    return config


class _Loader:
    """One reading of one file."""

    def __init__(self, reader: Reader, root: Table, check_binaries: bool) -> None:
        self._reader = reader
        self._problems = reader.problems
        self._root = root
        self._check_binaries = check_binaries
        self._keys: dict[str, tuple[Key, ...]] = {part.name: part.keys for part in parts()}
        self._sections: dict[str, Section] = {}
        self._device_sections: dict[DeviceName, Section] = {}

    def config(self) -> Config:
        """Build what can be built; problems are noted."""
        top = self._top()
        server = ServerConfig(**self._server())
        keeper = KeeperConfig(**self._section("keeper"))
        paths = self._paths(keeper)
        images = ImagesConfig(**self._section("images"))
        scheduling = SchedulingConfig(**self._section("scheduling"))
        if self._check_binaries:
            check.check_policy(scheduling, self._sections["scheduling"], self._problems)
        log = self._section("log")
        devices = self._devices()
        reads = self._models(top, devices, paths)
        self._check(server, paths, keeper, devices, reads)
        return Config(
            source=self._problems.path,
            server=server,
            paths=paths,
            keeper=keeper,
            images=images,
            scheduling=scheduling,
            devices=devices,
            models={read.model.name: read.model for read in reads},
            **top,
            **log,
        )

    def _top(self) -> dict[str, Any]:
        """Read top-level values, and note unknown sections."""
        keys = top_keys()
        self._reader.unknown(self._root, "", [*self._keys, *(key.name for key in keys)])
        own = {key.name for key in keys}
        nodes = {name: node for name, node in self._root.nodes.items() if name in own}
        table = Table(self._root.line, nodes, {name: self._root.lines[name] for name in nodes})
        return self._reader.section(table, "", keys).values

    def _section(self, name: str) -> dict[str, Any]:
        node, line = self._root.nodes.get(name), self._root.lines.get(name, 1)
        section = self._reader.section(node, name, self._keys[name], line)
        self._sections[name] = section
        return section.values

    def _server(self) -> dict[str, Any]:
        values = self._section("server")
        if "api_keys" in values:
            section = self._sections["server"]
            values["api_keys"] = read_api_keys(self._reader, section, values["api_keys"])
        return values

    def _paths(self, keeper: KeeperConfig) -> PathsConfig:
        defaults = default_paths(keeper.profile)
        given = self._section("paths")
        return PathsConfig(
            **{key.field: getattr(defaults, key.field) for key in keys_of(PathsConfig)} | given
        )

    def _devices(self) -> dict[DeviceName, DeviceConfig]:
        table = self._reader.table(self._root.nodes.get("devices"), "devices")
        if not table.nodes:
            host = DeviceName("host")
            return {host: DeviceConfig(name=host, memory_bytes=default_budget())}
        devices = {
            device.name: device
            for name, node in table.nodes.items()
            if (device := self._device(name, node, table.lines[name])) is not None
        }
        if not any(device.kind == "host" for device in devices.values()):
            # What leaves a GPU needs RAM to rest in.
            name = DeviceName("host" if "host" not in devices else "ram")
            devices[name] = DeviceConfig(name=name, memory_bytes=default_budget())
        return devices

    def _device(self, name: str, node: Node, line: int) -> DeviceConfig | None:
        key = f"devices.{name}"
        self._reader.check_name(name, DEVICE_PATTERN, line, key)
        section = self._reader.section(node, key, self._keys["devices"], line)
        values, bad = section.values, section.bad
        if values.get("kind") == "gpu":
            for item in ("memory", "uuid"):
                field = "memory_bytes" if item == "memory" else item
                if field not in values and field not in bad:
                    self._problems.add(section.line, f"{key}.{item}", "nothing", "one, for a GPU")
        values.setdefault("memory_bytes", default_budget())
        self._device_sections[DeviceName(name)] = section
        return DeviceConfig(name=DeviceName(name), **values)

    def _models(
        self, top: Mapping[str, Any], devices: Mapping[DeviceName, DeviceConfig], paths: PathsConfig
    ) -> list[Read]:
        dirs: Iterable[Path] = top.get("recipe_dirs", ())
        for directory in dirs:
            if self._check_binaries and not directory.is_dir():
                line = self._root.lines["recipe_dirs"]
                self._problems.add(line, "recipe_dirs", f"{directory}", "an existing directory")
        reader = ModelReader(
            reader=self._reader,
            book=RecipeBook(dirs, self._problems),
            devices=devices,
            state_dir=paths.state_dir,
            check_binaries=self._check_binaries,
        )
        reads = reader.read_all(self._root.nodes.get("models"))
        check.check_names(reader.sections, self._problems)
        return reads

    def _check(
        self,
        server: ServerConfig,
        paths: PathsConfig,
        keeper: KeeperConfig,
        devices: Mapping[DeviceName, DeviceConfig],
        reads: list[Read],
    ) -> None:
        check.check_socket(paths, self._sections["paths"], self._problems)
        check.check_server(server, self._sections["server"], self._problems)
        check.check_subnet(keeper, self._sections["keeper"], len(reads), self._problems)
        if self._check_binaries:
            check.check_programs(server, keeper, self._sections, self._problems)
            check_gpu.check_keeper(keeper, self._sections["keeper"], self._problems)
            check_launch.check_runtime(keeper, self._sections["keeper"], self._problems)
        check.check_memory(reads, devices, self._problems)
        check.check_tiers(reads, devices, self._problems)
        check_gpu.check_devices(devices, self._device_sections, self._problems)
        # The keeper's directory is root's: others read a configuration without asking it.
        probes_in = paths.state_dir if self._check_binaries else None
        check_gpu.check_models(reads, devices, probes_in, self._problems)
        check_launch.check_models(reads, keeper, server, self._problems, look=self._check_binaries)
        check.check_ports(reads, server, keeper, self._problems)
