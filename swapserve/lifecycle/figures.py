"""What is known of one engine by measuring it: its footprint, its cache's worth, costs of swaps.

Its actor writes here; footprints and costs outlive the daemon in the journal.
"""

from collections.abc import Mapping

from swapserve.config.recipes import Mechanism
from swapserve.config.schema import ModelConfig
from swapserve.errors import QuiesceFailed, SwapError, SwapServeError
from swapserve.events import RequestEnded
from swapserve.ids import DeviceName
from swapserve.keeper.protocol import Holding, Measured
from swapserve.lifecycle.journal import Journal
from swapserve.messages import Footprint
from swapserve.states import Tier
from swapserve.swap.cache import CacheValue
from swapserve.swap.mechanisms import Choice
from swapserve.swap.plan import RESTING_WAYS, WayIn, WayOut, to_disk

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
_LOSES_CACHE = frozenset({"lean", "sleep", "deep_sleep", "discard", "kill"})


class Figures:
    """Readings of one engine."""

    def __init__(
        self, model: ModelConfig, journal: Journal, mechanisms: frozenset[Mechanism]
    ) -> None:
        self._model = model
        self._journal = journal
        self._mechanisms = mechanisms
        self._cache = CacheValue()
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

    def served(self, event: RequestEnded) -> None:
        """Learn from a finished request what its cache is worth.

        Only a stream's first byte tells the time of the prefill.
        """
        prefill_s = None
        if event.stream and event.ttft_s is not None and not event.suspensions:
            prefill_s = max(0.0, event.ttft_s - event.queue_s)
        self._cache.served(
            bytes_in=event.bytes_in,
            bytes_out=event.bytes_out,
            stream=event.stream,
            prefix=event.prefix,
            prefill_s=prefill_s,
        )

    def keeps_cache(self) -> bool:
        """Whether its cache is worth the dump of a live image."""
        if self._model.keep_cache == "never" or not self._cache.tokens:
            return False
        if self._model.keep_cache == "always":
            return True
        return self._cache.worth_keeping(self.footprint_bytes or 0)

    # ------------------------------------------------------------ mechanism

    def mechanism(self, holding: Holding, *, in_flight: int, rests: bool) -> Mechanism | None:
        """Return how it goes to the host tier; None if it cannot (or has no GPU).

        What an engine that `rests` there by itself has kept on its devices only the driver moves.
        """
        if not self._model.gpus or Tier.HOST not in self._model.tiers:
            return None
        if rests:
            can = holding.can_suspend and "checkpoint" in self._mechanisms
            return "checkpoint" if can else None
        keep = self._model.keep_cache == "always" and bool(self._cache.tokens)
        found = self._pick(holding, in_flight=in_flight, keep_cache=keep)
        if found is None and keep and not in_flight and not to_disk(self._model, holding):
            # Nothing saves its cache; a sleep is better than an end, which is all that is left.
            found = self._pick(holding, in_flight=0, keep_cache=False)
        return found

    def _pick(self, holding: Holding, *, in_flight: int, keep_cache: bool) -> Mechanism | None:
        return self._choice.pick(
            self._mechanisms,
            wanted=self._model.mechanism,
            can_suspend=holding.can_suspend,
            owned=holding.owned,
            in_flight=in_flight,
            keep_cache=keep_cache,
            cache_s=0.0 if self._model.keep_cache == "never" else self._cache.worth_s,
        )

    def left(self, way: WayOut, seconds: float, *, rested: bool) -> None:
        """Take in that it has left its devices; where it `rested` already, no swap is measured."""
        self._left_by = None if rested else _MECHANISM_OF.get(way)
        if way not in RESTING_WAYS and not (rested and way == "checkpoint"):
            self.kept_bytes = 0
        if way == "live":
            self._cache.dumped(seconds)
        if way in _LOSES_CACHE:
            self._cache.emptied()
        if self._left_by is not None:
            self._choice.left(self._left_by, seconds)
            self._save()

    def came(self, way: WayIn, seconds: float) -> None:
        """Take in that it is back."""
        if way in {"cold", "golden"}:
            self._cache.emptied()
        if self._left_by is not None and way in _WAYS_BACK[self._left_by]:
            self._choice.came(self._left_by, seconds)
        elif way in {"cold", "golden"}:
            self._choice.started(seconds)
        self._left_by = None
        self.kept_bytes = 0
        self._save()

    def lost(self, way: WayIn) -> None:
        """Take in that it did not come back that way, so that its state is lost."""
        if self._left_by is not None and self._left_by != "restart":
            if way in _WAYS_BACK[self._left_by]:
                self._choice.failed(self._left_by)
            self._left_by = None
        self._cache.emptied()
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
        self._cache.emptied()
        self._left_by = None
        self.kept_bytes = 0
