"""What the daemon remembers across its own death: footprints, costs of swaps, operators' pins.

What there is of each engine is not here: that the keeper knows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swapserve.ids import DeviceName
from swapserve.lifecycle.jsonfile import JsonFile


@dataclass(slots=True)
class _Content:
    footprints: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes by device, by engine."""
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each way to leave and come back has cost, as `swap.mechanisms` writes it."""
    pins: dict[str, bool] = field(default_factory=dict)


class Journal:
    """One small JSON file."""

    def __init__(self, path: Path) -> None:
        self._file = JsonFile(path, "journal")
        self._content = _Content()

    def open(self) -> None:
        """Read what is there; a file that cannot be understood is set aside, not lost.

        Raises:
            OSError: the directory cannot be made.
        """
        if (found := self._file.read()) is None:
            return
        try:
            self._content = _Content(**found)  # type: ignore[arg-type]
        except TypeError as error:
            self._file.set_aside(error)

    def footprint(self, engine: str) -> Mapping[str, int] | None:
        """Return the bytes last measured of an engine, by device."""
        found = self._content.footprints.get(engine)
        # An earlier version wrote one figure for one device.
        return found if isinstance(found, dict) else None

    def measured(self, engine: str, footprint: Mapping[DeviceName, int]) -> None:
        """Remember a measurement that differs by more than a tenth from the last one."""
        old = self.footprint(engine) or {}
        if set(old) == set(footprint) and all(
            abs(size - old[name]) * 10 < old[name] for name, size in footprint.items()
        ):
            return
        self._content.footprints[engine] = {str(name): size for name, size in footprint.items()}
        self._save()

    def costs(self, engine: str) -> dict[str, Any]:
        """Return what was learnt of the engine's swaps; empty if nothing was."""
        return self._content.costs.get(engine, {})

    def set_costs(self, engine: str, costs: dict[str, Any]) -> None:
        """Remember what was learnt of the engine's swaps."""
        self._content.costs[engine] = costs
        self._save()

    def pinned(self, engine: str) -> bool | None:
        """Return an operator's last word on pinning the engine, None if there was none."""
        return self._content.pins.get(engine)

    def pin(self, engine: str, pinned: bool) -> None:
        """Remember an operator's word."""
        self._content.pins[engine] = pinned
        self._save()

    def _save(self) -> None:
        self._file.write(asdict(self._content))
