"""What is known of one engine by measuring it: its footprint, the costs of its swaps.

Its actor writes here; footprints and costs outlive the daemon in the journal.
"""

from collections.abc import Mapping

from swapserve.config.recipes import Mechanism
from swapserve.config.schema import ModelConfig
from swapserve.errors import QuiesceFailed, SwapError, SwapServeError
from swapserve.ids import DeviceName
from swapserve.keeper.protocol import Holding, Measured
from swapserve.lifecycle.journal import Journal
from swapserve.messages import Footprint
from swapserve.states import Tier
from swapserve.swap.mechanisms import Average, Choice
from swapserve.swap.plan import KEEPS_CACHE, RESTING_WAYS, WayIn, WayOut, to_disk

_MECHANISM_OF: Mapping[WayOut, Mechanism] = {
    "checkpoint": "checkpoint",
    "lean": "lean",
    "sleep": "sleep",
    "deep_sleep": "deep_sleep",
    "discard": "restart",
    "kill": "restart",
}
_WAYS_BACK: Mapping[Mechanism, frozenset[WayIn]] = {
    "checkpoint": frozenset({"resume"}),
    "lean": frozenset({"resume"}),
    "sleep": frozenset({"wake"}),
    "deep_sleep": frozenset({"wake"}),
    "restart": frozenset({"golden", "cold"}),
}
FIRST_DUMP_BYTES_PER_S = 1e9
"""Guess for the first live dump, before one was measured."""


class Figures:
    """Readings of one engine."""

    def __init__(
        self, model: ModelConfig, journal: Journal, mechanisms: frozenset[Mechanism]
    ) -> None:
        self._model = model
        self._journal = journal
        self._mechanisms = mechanisms
        self._cached = False
        """A request was answered since its cache was empty."""
        self._dump = Average()
        self._choice = Choice.from_json(journal.costs(model.name))
        self._left_by: Mechanism | None = None
        self.kept_bytes = 0
        """GPU state that an engine asleep has moved to host memory by itself."""

    # ------------------------------------------------------------ footprint

    @property
    def footprint(self) -> Footprint | None:
        """Bytes it takes on each of its devices: configured, else measured, None if unknown."""
        if self._model.memory_bytes is not None:
            return dict.fromkeys(self._model.devices, self._model.memory_bytes)
        known = self._journal.footprint(self._model.name)
        if known is None or set(known) != set(self._model.devices):
            return None  # never measured, or on other devices
        return {DeviceName(name): size for name, size in known.items()}

    @property
    def footprint_bytes(self) -> int | None:
        """The same, of all its devices together."""
        footprint = self.footprint
        return None if footprint is None else sum(footprint.values())

    def by_device(self, measured: Measured) -> Footprint:
        """Return a reading by the names of its devices."""
        if not self._model.gpus:
            return {self._model.device: measured.host_bytes}
        names = zip(self._model.devices, self._model.gpus, strict=True)
        return {name: measured.device_bytes.get(uuid, 0) for name, uuid in names}

    def measured(self, measured: Measured) -> Footprint | None:
        """Take in a reading while it serves; return it by device.

        None if it is no reading: from inside a container NVML may list none of an engine's
        processes, and one that serves from a GPU never takes nothing of it.
        """
        footprint = self.by_device(measured)
        if not any(footprint.values()):
            return None
        self._journal.measured(self._model.name, footprint)
        return footprint

    def rested(self, way: WayOut, measured: Measured) -> Footprint:
        """Return what an engine that sleeps by itself keeps of its devices.

        Raises:
            QuiesceFailed: nobody can tell, since NVML has never listed its processes.
        """
        residue = self.by_device(measured)
        if not any(residue.values()) and not self._journal.footprint(self._model.name):
            message = "NVML lists none of its processes, so nobody knows what it has given back"
            raise QuiesceFailed(self._model.name, "measure", message, left_awake=False)
        freed = max(0, (self.footprint_bytes or 0) - sum(residue.values()))
        self.kept_bytes = freed if way == "sleep" else 0
        return residue

    def found_asleep(self, measured: Measured) -> Footprint:
        """Return the same of one that an earlier daemon has put to sleep, who knows how.

        Raises:
            QuiesceFailed: as `rested`.
        """
        wanted = self._model.mechanism
        may_keep = wanted == "sleep" or (wanted == "auto" and "sleep" in self._mechanisms)
        return self.rested("sleep" if may_keep else "deep_sleep", measured)

    # ---------------------------------------------------------------- cache

    def served(self) -> None:
        """Take in that a request was answered to its end."""
        self._cached = True

    def keeps_cache(self, cache_s: float) -> bool:
        """Whether its cache is worth the dump of a live image.

        Args:
            cache_s: seconds of prefill that the cache is expected to save.
        """
        match self._model.keep_cache:
            case "never":
                return False
            case "always":
                return self._cached
            case "auto":
                return cache_s > self._dump_cost_s

    @property
    def _dump_cost_s(self) -> float:
        """Seconds of a live dump, which a discard does not take; a guess before the first."""
        measured = self._dump.value
        guess = (self.footprint_bytes or 0) / FIRST_DUMP_BYTES_PER_S
        return guess if measured is None else measured

    # ------------------------------------------------------------ mechanism

    def mechanism(
        self, holding: Holding, *, in_flight: int, rests: bool, cache_s: float = 0.0
    ) -> Mechanism | None:
        """Return how it goes to the host tier; None if it cannot (or has no GPU).

        Args:
            holding: what there is of it.
            in_flight: requests that its state has to outlive.
            rests: it is there already, by itself; what it has kept on its devices only the driver
                moves.
            cache_s: seconds of prefill that its cache is expected to save, if it is kept.
        """
        if not self._model.gpus or Tier.HOST not in self._model.tiers:
            return None
        if rests:
            can = holding.can_suspend and "checkpoint" in self._mechanisms
            return "checkpoint" if can else None
        keep = self._model.keep_cache == "always" and self._cached
        found = self._pick(holding, in_flight=in_flight, keep_cache=keep, cache_s=cache_s)
        if found is None and keep and not in_flight and not to_disk(self._model, holding):
            # Nothing saves its cache; a sleep is better than an end, which is all that is left.
            found = self._pick(holding, in_flight=0, keep_cache=False, cache_s=cache_s)
        return found

    def _pick(
        self, holding: Holding, *, in_flight: int, keep_cache: bool, cache_s: float
    ) -> Mechanism | None:
        return self._choice.pick(
            self._mechanisms,
            wanted=self._model.mechanism,
            can_suspend=holding.can_suspend,
            owned=holding.owned,
            in_flight=in_flight,
            keep_cache=keep_cache,
            cache_s=0.0 if self._model.keep_cache == "never" else cache_s,
        )

    def left(self, way: WayOut, seconds: float, *, rested: bool) -> None:
        """Take in that it has left its devices; where it `rested` already, no swap is measured."""
        self._left_by = None if rested else _MECHANISM_OF.get(way)
        if way not in RESTING_WAYS and not (rested and way == "checkpoint"):
            self.kept_bytes = 0
        if way == "live":
            self._dump.add(seconds)
        if way not in KEEPS_CACHE:
            self._cached = False
        if self._left_by is not None:
            self._choice.left(self._left_by, seconds)
            self._save()

    def came(self, way: WayIn, seconds: float) -> None:
        """Take in that it is back."""
        if way in {"cold", "golden"}:
            self._cached = False
        if self._left_by is not None and way in _WAYS_BACK[self._left_by]:
            self._choice.came(self._left_by, seconds)
        elif way in {"cold", "golden"}:
            self._choice.started(seconds)
        self._left_by = None
        self.kept_bytes = 0
        self._save()

    def promoted(self) -> None:
        """Take in that an image was brought to host memory: what comes back is not measured."""
        self._left_by = None
        self.kept_bytes = 0

    def lost(self, way: WayIn) -> None:
        """Take in that it did not come back that way, so that its state is lost."""
        if self._left_by is not None and self._left_by != "restart":
            if way in _WAYS_BACK[self._left_by]:
                self._choice.failed(self._left_by)
            self._left_by = None
        self._cached = False
        self.kept_bytes = 0

    def failed(self, way: WayOut, error: SwapServeError) -> None:
        """Take in that it could not leave that way (had it ended, that would tell nothing)."""
        mechanism = _MECHANISM_OF.get(way)
        if mechanism is not None and isinstance(error, SwapError):
            unsupported = isinstance(error, QuiesceFailed) and error.unsupported
            self._choice.failed(mechanism, unsupported=unsupported)
            self._save()

    def _save(self) -> None:
        if self._model.gpus:
            self._journal.set_costs(self._model.name, self._choice.as_json())

    def gone(self) -> None:
        """Take in that its process has ended."""
        self._cached = False
        self._left_by = None
        self.kept_bytes = 0
