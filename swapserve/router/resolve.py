"""Model names and aliases → engines."""

from collections.abc import Iterable
from difflib import get_close_matches

from swapserve.config.schema import ModelConfig
from swapserve.errors import ModelNotFound
from swapserve.ids import EngineName

NEAR = 3
LONGEST_NAME = 256


class Directory:
    """Every name a client may use for a model."""

    def __init__(self, models: Iterable[ModelConfig]) -> None:
        self._models: dict[EngineName, ModelConfig] = {model.name: model for model in models}
        self._names: dict[str, EngineName] = {}
        for model in self._models.values():
            for name in (model.name, *model.aliases):
                self._names[name] = model.name
        self._folded = {name.casefold(): name for name in self._names}

    def resolve(self, name: str) -> EngineName:
        """Return the engine that serves `name`.

        Raises:
            ModelNotFound: nothing has that name; it carries the closest ones.
        """
        engine = self._names.get(name)
        if engine is None:
            raise ModelNotFound(name[:LONGEST_NAME], self._near(name[:LONGEST_NAME]))
        return engine

    def model(self, engine: EngineName) -> ModelConfig:
        """Return the configuration of an engine that `resolve` returned."""
        return self._models[engine]

    def _near(self, name: str) -> tuple[str, ...]:
        found = get_close_matches(name.casefold(), self._folded, n=NEAR, cutoff=0.5)
        return tuple(self._folded[match] for match in found)
