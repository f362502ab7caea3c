"""A configuration for one engine of another one, in a directory of its own."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from swapserve.config.fields import keys_of
from swapserve.config.recipes import Recipe, placeholders
from swapserve.config.schema import (
    Config,
    DeviceConfig,
    KeeperConfig,
    ModelConfig,
    PathsConfig,
)
from swapserve.states import Tier


def scratch_config(config: Config, model: ModelConfig, directory: Path) -> Path:
    """Write a configuration with that engine alone, moved by the driver, and return its file.

    Devices, keeper and recipes are those of `config`; images, state and sockets are put below
    `directory`.
    """
    alone = replace(
        model,
        params=_params(model),
        aliases=(),
        mechanism="checkpoint",
        tiers=(Tier.HOST,),
        ttl_s=None,
        preload=False,
        pin=False,
        golden=True,
    )
    paths = PathsConfig(
        state_dir=directory / "state", image_dir=directory / "images", run_dir=directory / "run"
    )
    content: dict[str, object] = {
        "paths": _section(paths),
        "keeper": _section(config.keeper),
        "devices": {name: _section(device) for name, device in config.devices.items()},
        "recipe_dirs": _plain(config.recipe_dirs),
        "models": [_section(alone)],
    }
    file = directory / "swapserve.yaml"
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
    return file


def _params(model: ModelConfig) -> Mapping[str, str]:
    """Return its parameters, with the program as it was found: paths were relative to a file."""
    named = [name for name in placeholders(model.recipe.argv[0]) if name in model.params]
    if model.executable is None or model.recipe.argv[0] not in {f"{{{name}}}" for name in named}:
        return model.params
    return {**model.params, named[0]: str(model.executable)}


def _section(values: PathsConfig | KeeperConfig | DeviceConfig | ModelConfig) -> dict[str, object]:
    kind: type = type(values)
    return {
        key.name: _plain(value)
        for key in keys_of(kind)
        if (value := getattr(values, key.field)) is not None
    }


def _plain(value: object) -> object:
    match value:
        case Recipe(name=name):
            return name
        case Path():
            return str(value)
        case tuple():
            return [_plain(one) for one in value]
        case Mapping():
            return {str(name): str(text) for name, text in value.items()}
        case _:
            return value
