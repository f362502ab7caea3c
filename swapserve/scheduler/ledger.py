"""Bytes per device: promised, in use, and how far the machine's readings exceed the plan. Pure.

Every engine has an account on each device that it holds bytes of, with four figures:

- `claimed`: free bytes set aside for an engine that waits for more. Soft: laid anew with each
  plan, so what a leaving victim frees goes to whoever waits longest, never to a later arrival.
- `reserved`: promised to a transition that is under way. Hard.
- `committed`: in use, until the bytes were seen free.
- `excess`: use that was measured but has no room in the plan. `committed` is clamped so that
  the books always balance, and the rest is kept here. It is a debt of the device: freed bytes
  pay it before anyone else gets them, and the plan evicts until it is paid.

`claimed + reserved + committed <= capacity` holds for each device after each call. What names
several devices is done on all of them or, if one refuses, on none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from swapserve.errors import SwapServeError
from swapserve.ids import DeviceName, EngineName
from swapserve.messages import Footprint


class LedgerViolation(SwapServeError):
    """More was promised than there is: a bug of ours, never swallowed."""

    def __init__(self, device: str, wanted_bytes: int, free_bytes: int) -> None:
        self.device = device
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes
        super().__init__(f"{wanted_bytes} bytes asked of '{device}', which has {free_bytes} free")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One device's totals; reserved + committed never exceed the capacity."""

    capacity_bytes: int
    reserved_bytes: int
    committed_bytes: int
    excess_bytes: int


@dataclass(slots=True)
class _Entry:
    claimed: int = 0
    reserved: int = 0
    committed: int = 0
    excess: int = 0


class _Device:
    __slots__ = ("capacity", "debtors", "entries", "excess", "used")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.excess = 0
        self.entries: dict[EngineName, _Entry] = {}
        self.debtors: dict[EngineName, None] = {}


class Ledger:
    """The only place where bytes are promised, used and given back."""

    def __init__(self, capacities: Mapping[DeviceName, int]) -> None:
        self._devices = {name: _Device(capacity) for name, capacity in capacities.items()}

    @property
    def devices(self) -> tuple[DeviceName, ...]:
        """The devices it keeps books for, in the order given."""
        return tuple(self._devices)

    def account(self, device: DeviceName) -> Account:
        """Return the device's totals; claims count as reserved."""
        books = self._devices[device]
        committed = sum(entry.committed for entry in books.entries.values())
        return Account(
            capacity_bytes=books.capacity,
            reserved_bytes=books.used - committed,
            committed_bytes=committed,
            excess_bytes=books.excess,
        )

    def capacity(self, device: DeviceName) -> int:
        """Return the device's size."""
        return self._devices[device].capacity

    def room(self, device: DeviceName) -> int:
        """Return what is free, less the debt: negative while the device is overcommitted."""
        books = self._devices[device]
        return books.capacity - books.used - books.excess

    def held(self, device: DeviceName, engine: EngineName) -> int:
        """Return what leaves the device's books when this engine goes (claims not counted)."""
        entry = self._devices[device].entries.get(engine)
        return 0 if entry is None else entry.reserved + entry.committed + entry.excess

    def committed(self, device: DeviceName, engine: EngineName) -> int:
        """Return what this engine uses of the device, its excess included."""
        entry = self._devices[device].entries.get(engine)
        return 0 if entry is None else entry.committed + entry.excess

    def excess(self, device: DeviceName, engine: EngineName) -> int:
        """Return how far this engine is beyond what there was room for."""
        entry = self._devices[device].entries.get(engine)
        return 0 if entry is None else entry.excess

    def claim(self, engine: EngineName, sizes: Footprint) -> None:
        """Set free bytes aside for an engine that waits for more.

        Raises:
            LedgerViolation: they are not free; nothing was set aside.
        """
        self._take(sizes)
        for device, size in sizes.items():
            self._entry(device, engine).claimed += size

    def drop_claims(self, device: DeviceName) -> None:
        """Take back every claim on the device."""
        books = self._devices[device]
        for name, entry in list(books.entries.items()):
            if entry.claimed:
                books.used -= entry.claimed
                entry.claimed = 0
                self._forget_if_empty(books, name, entry)
        self._settle(books)

    def reserve(self, engine: EngineName, sizes: Footprint) -> None:
        """Promise so many bytes in all to a transition that starts now; what it holds counts.

        Raises:
            LedgerViolation: they are not free; nothing was promised.
        """
        more = {
            device: max(0, size - entry.reserved - entry.committed)
            for device, size in sizes.items()
            for entry in (self._devices[device].entries.get(engine, _Entry()),)
        }
        self._take(more)
        for device, size in more.items():
            self._entry(device, engine).reserved += size

    def cancel(self, engine: EngineName, devices: Iterable[DeviceName]) -> None:
        """Take promises back that were not used; what the engine uses stays."""
        for device in devices:
            books = self._devices[device]
            entry = books.entries.get(engine)
            if entry is not None:
                books.used -= entry.reserved
                entry.reserved = 0
                self._forget_if_empty(books, engine, entry)
                self._settle(books)

    def commit(self, engine: EngineName, sizes: Footprint) -> int:
        """Record that the engine uses so many bytes; all its promises there end.

        Claims on these devices are dropped first: use that is real outranks them.

        Returns:
            How much of it has no room (the engine's excess).
        """
        return sum(self._commit(device, engine, size) for device, size in sizes.items())

    def _commit(self, device: DeviceName, engine: EngineName, size: int) -> int:
        self.drop_claims(device)
        books = self._devices[device]
        entry = self._entry(device, engine)
        books.used -= entry.reserved + entry.committed
        books.excess -= entry.excess
        entry.reserved = 0
        entry.committed = min(size, max(0, books.capacity - books.used))
        entry.excess = size - entry.committed
        books.used += entry.committed
        books.excess += entry.excess
        if entry.excess:
            books.debtors[engine] = None
        else:
            books.debtors.pop(engine, None)
        self._forget_if_empty(books, engine, entry)
        self._settle(books)
        return entry.excess

    def release(self, engine: EngineName, devices: Iterable[DeviceName]) -> None:
        """Record that the engine's bytes were seen free."""
        for device in devices:
            books = self._devices[device]
            entry = books.entries.pop(engine, None)
            if entry is not None:
                books.used -= entry.claimed + entry.reserved + entry.committed
                books.excess -= entry.excess
                books.debtors.pop(engine, None)
                self._settle(books)

    def _take(self, sizes: Footprint) -> None:
        for device, size in sizes.items():
            books = self._devices[device]
            free = books.capacity - books.used
            if size > free or size < 0:
                raise LedgerViolation(device, size, free)
        for device, size in sizes.items():
            self._devices[device].used += size

    def _entry(self, device: DeviceName, engine: EngineName) -> _Entry:
        return self._devices[device].entries.setdefault(engine, _Entry())

    @staticmethod
    def _settle(books: _Device) -> None:
        for name in list(books.debtors):
            entry = books.entries[name]
            paid = min(entry.excess, books.capacity - books.used)
            entry.excess -= paid
            entry.committed += paid
            books.excess -= paid
            books.used += paid
            if not entry.excess:
                del books.debtors[name]

    @staticmethod
    def _forget_if_empty(books: _Device, name: EngineName, entry: _Entry) -> None:
        if not (entry.claimed or entry.reserved or entry.committed or entry.excess):
            del books.entries[name]
