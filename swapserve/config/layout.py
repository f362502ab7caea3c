"""The top level of a configuration file: its sections and their keys."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from swapserve.config.fields import Key, class_doc, keys_of
from swapserve.config.schema import (
    ApiKey,
    Config,
    DeviceConfig,
    ImagesConfig,
    KeeperConfig,
    ModelConfig,
    PathsConfig,
    SchedulingConfig,
    ServerConfig,
)


@dataclass(frozen=True, slots=True)
class Part:
    """One top-level key that holds further keys: a section, a mapping or a list of them."""

    name: str
    shape: Literal["section", "mapping", "list"]
    doc: str
    keys: tuple[Key, ...]


@cache
def parts() -> tuple[Part, ...]:
    """Return every section of the file, in the order in which people should read them."""
    sections: tuple[tuple[str, type], ...] = (
        ("server", ServerConfig),
        ("paths", PathsConfig),
        ("keeper", KeeperConfig),
        ("images", ImagesConfig),
        ("scheduling", SchedulingConfig),
    )
    log = tuple(key for key in keys_of(Config) if key.section == "log")
    return (
        *(Part(name, "section", class_doc(cls), keys_of(cls)) for name, cls in sections),
        Part("devices", "mapping", class_doc(DeviceConfig), keys_of(DeviceConfig)),
        Part("models", "list", class_doc(ModelConfig), keys_of(ModelConfig)),
        Part("log", "section", "What the daemon writes about itself.", log),
    )


@cache
def nested() -> dict[str, Part]:
    """Return the lists inside sections whose entries are mappings, by their section."""
    key = Part("server.api_keys", "list", class_doc(ApiKey), keys_of(ApiKey))
    return {"server": key}


@cache
def top_keys() -> tuple[Key, ...]:
    """Return the top-level keys that hold a value themselves."""
    return tuple(key for key in keys_of(Config) if key.section is None)
