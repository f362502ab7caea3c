"""What moving and running an engine costs: tables with a source for each figure, or measured ones.

A table is a YAML file (`costs/`); `measured.py` makes one from results of this package's own runs.
Each figure is a mapping of `is` (the value), `source` (a key of `sources`), and `how`, if it was
worked out from what the source says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evaluation.simulate.server import Speed
from swapserve.states import Tier

GB = 1_000_000_000
TABLES = Path(__file__).parent / "costs"
DEFAULT = "b200-driver"


class BadCosts(Exception):
    """A file of costs cannot be used; says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way off the device and back, in seconds."""

    out_s: float
    in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """One kind of engine: what it holds, what its moves take, how fast it serves."""

    name: str
    bytes: int
    """On each of its GPUs while it serves."""
    lean_bytes: int
    """Of its state without its cache."""
    speed: Speed
    cold_s: float
    """From nothing to serving."""
    kill_s: float
    """To end its process."""
    ways: Mapping[tuple[Tier, bool], Way]
    """By the tier it goes to, and whether requests and cache come along."""
    down_s: float | None = None
    """From the host tier further to disk, with requests and cache."""
    residue_bytes: int = 0
    """What it keeps of its GPU while it is in the host tier."""

    @property
    def preempts(self) -> bool:
        """Whether requests inside outlive a swap out."""
        return any(kept for _, kept in self.ways)

    @property
    def dumps(self) -> bool:
        """Whether they outlive one to disk."""
        return (Tier.DISK, True) in self.ways

    def has(self, tier: Tier) -> bool:
        """Whether it can rest on that tier."""
        return (tier, True) in self.ways or (tier, False) in self.ways

    def cheapest(self, tier: Tier, *, kept: bool) -> Way:
        """Return the way to that tier, without the cache where there is such a way."""
        way = self.ways.get((tier, kept))
        return self.ways[(tier, not kept)] if way is None else way


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Kinds of engines on one kind of machine."""

    name: str
    about: str
    gpu_bytes: int
    ram_bytes: int
    """For engines at rest, for each GPU; 0: no host tier."""
    kinds: tuple[EngineKind, ...]
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read_costs(path: Path) -> Costs:
    """Read a table.

    Raises:
        BadCosts: the file cannot be read, or a figure in it is missing, wrong or without a source.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BadCosts(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise BadCosts(f"{path}: {error}") from error
    return _Table(str(path), data).costs(path.stem)


def named(name: str) -> Costs:
    """Return the table of that name that comes with the package.

    Raises:
        BadCosts: there is none.
    """
    path = TABLES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in TABLES.glob("*.yaml")))
        raise BadCosts(f"'{name}' is none of {known}, nor a file")
    return read_costs(path)


class _Table:
    """Reads one table and says where something is wrong."""

    def __init__(self, where: str, data: Any) -> None:  # noqa: ANN401 - whatever YAML holds
        self._where = where
        self._data = self._mapping(data, "the file")
        self._sources = self._mapping(self._data.get("sources"), "sources")

    def costs(self, name: str) -> Costs:
        machine = self._mapping(self._data.get("machine"), "machine")
        engines = self._data.get("engines")
        if not isinstance(engines, list) or not engines:
            raise self._bad("engines", "is no list of engines")
        return Costs(
            name=name,
            about=str(self._data.get("about", "")).strip(),
            gpu_bytes=self._bytes(machine, "gpu_gb", "machine"),
            ram_bytes=self._bytes(machine, "ram_gb_per_gpu", "machine"),
            kinds=tuple(self._kind(each, f"engines[{i}]") for i, each in enumerate(engines)),
            sources=self._sources,
        )

    def _kind(self, found: Any, at: str) -> EngineKind:  # noqa: ANN401
        row = self._mapping(found, at)
        serving = self._mapping(row.get("serving"), f"{at}.serving")
        ways = {
            (tier, kept): way
            for tier in (Tier.HOST, Tier.DISK)
            for kept in (True, False)
            if (way := self._way(row, tier, "keep" if kept else "drop", at)) is not None
        }
        try:
            return EngineKind(
                name=str(row["name"]),
                bytes=self._bytes(row, "gpu_gb", at),
                lean_bytes=self._bytes(row, "lean_gb", at),
                residue_bytes=self._bytes(row, "residue_gb", at) if "residue_gb" in row else 0,
                cold_s=self._figure(row, "cold_s", at),
                kill_s=self._figure(row, "kill_s", at),
                down_s=self._figure(row, "down_s", at) if "down_s" in row else None,
                ways=ways,
                speed=self._speed(serving, f"{at}.serving"),
            )
        except KeyError as error:
            raise self._bad(at, f"has no {error.args[0]}") from error

    def _speed(self, row: Mapping[str, Any], at: str) -> Speed:
        return Speed(
            prefill_tokens_per_s=self._figure(row, "prefill_tokens_per_s", at),
            itl_s=self._figure(row, "itl_s", at),
            itl_growth=self._figure(row, "itl_growth", at),
            max_seqs=int(self._figure(row, "max_seqs", at)),
            cache_tokens=int(self._figure(row, "cache_tokens", at)),
        )

    def _way(self, row: Mapping[str, Any], tier: Tier, name: str, at: str) -> Way | None:
        ways = self._mapping(row.get(tier.value) or {}, f"{at}.{tier}")
        if name not in ways:
            return None
        inside = f"{at}.{tier}.{name}"
        way = self._mapping(ways[name], inside)
        return Way(out_s=self._figure(way, "out_s", inside), in_s=self._figure(way, "in_s", inside))

    def _bytes(self, row: Mapping[str, Any], key: str, at: str) -> int:
        return round(self._figure(row, key, at) * GB)

    def _figure(self, row: Mapping[str, Any], key: str, at: str) -> float:
        """Return a figure that has a value and a source that the table names."""
        if key not in row:
            raise self._bad(at, f"has no {key}")
        found = self._mapping(row[key], f"{at}.{key}")
        value, source = found.get("is"), found.get("source")
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise self._bad(f"{at}.{key}", f"{value!r} is no figure")
        if source not in self._sources:
            raise self._bad(f"{at}.{key}", f"{source!r} is none of the table's sources")
        return float(value)

    def _mapping(self, found: Any, at: str) -> Mapping[str, Any]:  # noqa: ANN401
        if not isinstance(found, dict):
            raise self._bad(at, "is no mapping")
        return found

    def _bad(self, at: str, why: str) -> BadCosts:
        return BadCosts(f"{self._where}: {at}: {why}")
