"""Read the list of models: recipe, device, model files and program of each."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swapserve.config.fields import keys_of
from swapserve.config.machine import find_binary
from swapserve.config.nodes import Items, Node, Scalar, describe, near, one_of
from swapserve.config.reader import Reader, Section, absolute
from swapserve.config.recipe_files import RecipeBook
from swapserve.config.recipes import Recipe, launch_argv, placeholders
from swapserve.config.schema import DeviceConfig, ModelConfig
from swapserve.ids import DeviceName
from swapserve.states import Tier

# org/name, or org/name/file of a model on a hub.
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)((?:/[\w.-]+)*)")


@dataclass(frozen=True, slots=True)
class Read:
    """A model and where in the file it stands."""

    section: Section
    model: ModelConfig


@dataclass(slots=True)
class ModelReader:
    """Reads models one by one, noting every problem of each."""

    reader: Reader
    book: RecipeBook
    devices: Mapping[DeviceName, DeviceConfig]
    state_dir: Path
    check_binaries: bool
    sections: list[Section] = field(default_factory=list)
    """What was read of every model, also of those that cannot be built."""

    def read_all(self, node: Node | None) -> list[Read]:
        """Return every model without a problem that prevents building it."""
        if node is None or (isinstance(node, Scalar) and node.kind == "null"):
            return []
        if not isinstance(node, Items):
            self.reader.problems.add(node.line, "models", describe(node), "a list of models")
            return []
        found = (self._read(entry, f"models[{i}]") for i, entry in enumerate(node.nodes))
        return [read for read in found if read is not None]

    def _read(self, node: Node, key: str) -> Read | None:
        section = self.reader.section(node, key, keys_of(ModelConfig))
        self.sections.append(section)
        values = section.values
        recipe = self._recipe(section)
        devices = self._devices(section)
        attached = "attach" in values or "attach" in section.bad
        if recipe is not None and not attached:
            self._check_params(section, recipe)
            self._resolve_model(section, recipe)
        if recipe is None or not devices or {"name", "attach", "image"} & section.bad:
            return None
        values |= {"recipe": recipe, "devices": devices, **self._placement(devices)}
        if attached or "image" in values or recipe.image is not None:
            # What we did not build around it, CRIU cannot bring back.
            values |= {"sandbox": False, "golden": False}
        values["tiers"] = _tiers(values)
        model = ModelConfig(**values)
        if attached:
            return Read(section, model)
        self._check_placeholders(section, model)
        return Read(section, dataclasses.replace(model, executable=self._program(section, model)))

    def _note(self, section: Section, name: str, found: str, expected: str, at: str = "") -> None:
        line = section.line_of(name)
        self.reader.problems.add(line, f"{section.key}.{at or name}", found, expected)

    def _recipe(self, section: Section) -> Recipe | None:
        name = section.values.get("recipe")
        if name is None:
            return None
        return self.book.get(name, section.line_of("recipe"), f"{section.key}.recipe")

    def _devices(self, section: Section) -> tuple[DeviceName, ...]:
        """Return the devices of a model; none, after noting why, if they cannot be told."""
        names: tuple[str, ...] | None = section.values.get("devices")
        if names is None:
            gpus = [name for name, device in self.devices.items() if device.kind == "gpu"]
            for only in (gpus, list(self.devices)):
                if len(only) == 1:
                    return (only[0],)
            if self.devices and "devices" not in section.bad:
                self._note(section, "devices", "nothing", one_of(self.devices), at="device")
            return ()
        unknown = [name for name in names if name not in self.devices]
        for name in unknown:
            expected = one_of(self.devices) + near(name, self.devices)
            self._note(section, "devices", f"the unknown device {name!r}", expected, at="device")
        return () if unknown else tuple(DeviceName(name) for name in names)

    def _placement(self, devices: Sequence[DeviceName]) -> dict[str, object]:
        """Return what follows from a model's devices."""
        uuids = tuple(self.devices[name].uuid or "" for name in devices)
        if self.devices[devices[0]].kind != "gpu":
            return {"gpus": (), "ram": None}
        ram = next((name for name, one in self.devices.items() if one.kind == "host"), None)
        return {"gpus": uuids, "ram": ram}

    def _check_params(self, section: Section, recipe: Recipe) -> None:
        given = section.values.get("params", {})
        for name in given:
            if name not in recipe.params:
                expected = one_of(recipe.params) + near(name, recipe.params)
                self._note(section, "params", "an unknown parameter", expected, f"params.{name}")
        for name, default in recipe.params.items():
            if not given.get(name, default) and "params" not in section.bad:
                expected = f"a value; the recipe {recipe.name!r} needs one"
                self._note(section, "params", "nothing", expected, f"params.{name}")

    def _resolve_model(self, section: Section, recipe: Recipe) -> None:
        """Replace `model` by an absolute path, noting what is not there."""
        text = section.values.get("model")
        if text is None:
            if recipe.needs_model and "model" not in section.bad:
                expected = f"a {_kind(recipe)}; the recipe {recipe.name!r} needs a model"
                self._note(section, "model", "nothing", expected)
            return
        path, hub_id = locate_model(text, self.reader.problems.path.parent, self.state_dir)
        section.values["model"] = str(path)
        if not self.check_binaries:
            return
        if not path.exists():
            expected = f"an existing {_kind(recipe)}"
            if hub_id is not None:
                expected += f", or a model fetched with `swapserve pull {hub_id}`"
            self._note(section, "model", f"{text!r}, but there is no {path}", expected)
        elif (recipe.model_is == "file" and not path.is_file()) or (
            recipe.model_is == "directory" and not path.is_dir()
        ):
            what = "directory" if path.is_dir() else "file"
            self._note(section, "model", f"the {what} {path}", f"a {recipe.model_is}")

    def _check_placeholders(self, section: Section, model: ModelConfig) -> None:
        texts = [(f"args[{i}]", "args", text) for i, text in enumerate(model.args)]
        texts += [(f"env.{name}", "env", text) for name, text in model.env.items()]
        texts += [("model", "model", text) for text in model.recipe.argv if model.model is None]
        for at, name, text in texts:
            if model.model is None and "model" in placeholders(text) and "model" not in section.bad:
                found = "the placeholder {model}, but the model has no `model`"
                if name != "model" or not model.recipe.needs_model:
                    self._note(section, name, found, "`model`, or no such placeholder", at)

    def _program(self, section: Section, model: ModelConfig) -> Path | None:
        """Return the absolute path of the program, noting that there is none."""
        if model.container_image is not None:
            return None  # it is in the image
        word = launch_argv(model, host="", port=0)[0]
        if not word:
            return None
        path = Path(word)
        if "/" in word or word.startswith("~"):
            path = absolute(word, self.reader.problems.path.parent)
        found = find_binary(str(path))
        if found is None and self.check_binaries:
            named = [name for name in placeholders(model.recipe.argv[0]) if name in model.params]
            at = f"params.{named[0]}" if named else "recipe"
            where = "an executable file" if path.is_absolute() else (
                "a program on PATH or in the private prefix (scripts/host-setup)"
            )  # fmt: skip
            self._note(section, at.partition(".")[0], f"{word!r}, which is not there", where, at)
        return found or (path if path.is_absolute() else None)


def _tiers(values: Mapping[str, Any]) -> tuple[Tier, ...]:
    """Return the tiers of a model: those given, or what is possible on its devices."""
    if "tiers" in values:
        return tuple(Tier(tier) for tier in values["tiers"])
    sandboxed = values.get("sandbox", True)
    if values["gpus"]:
        return (Tier.HOST, Tier.DISK) if sandboxed else (Tier.HOST,)
    if values.get("attach"):
        return ()
    return (Tier.DISK,)


def locate_model(text: str, base: Path, state_dir: Path) -> tuple[Path, str | None]:
    """Return where a model is (or should be), and the hub id if it may be one.

    A path that exists from `base` wins; `org/name` is then where `swapserve pull` puts it.
    """
    path = absolute(text, base)
    match = _HUB_ID.fullmatch(text)
    if match is None or path.exists():
        return path, None
    org, name, rest = match.groups()
    return hub_dir(state_dir, f"{org}/{name}") / rest.lstrip("/"), f"{org}/{name}"


def hub_dir(state_dir: Path, hub_id: str) -> Path:
    """Return the directory that holds a model pulled from a hub."""
    return state_dir / "models" / hub_id.replace("/", "--")


def _kind(recipe: Recipe) -> str:
    return "file or directory" if recipe.model_is == "either" else recipe.model_is
