"""A world around the scheduler core that believes nothing: every effect is checked as it comes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swapserve.errors import DeviceBusy, EngineCrashed, StartFailed, SwapError, SwapServeError
from swapserve.ids import CommandId, DeviceName, EngineName, LeaseId
from swapserve.messages import (
    BringIn,
    CommandDone,
    CommandGiven,
    DeviceSpec,
    Drain,
    Effect,
    EngineExited,
    EngineLeft,
    EngineReady,
    EngineSeen,
    EngineSpec,
    Event,
    FootprintMeasured,
    GrantLease,
    LeaseEnded,
    LeaseRequested,
    LoseLease,
    PolicySpec,
    RefuseLease,
    ResumeLease,
    SetTimer,
    ShutdownAsked,
    StopEngine,
    SuspendLease,
    SwapOut,
    Tick,
    TransitionFailed,
    Verb,
)
from swapserve.scheduler.core import Core
from swapserve.states import TRANSITIONS, EngineState, LeaseState, Tier

S = EngineState
L = LeaseState
DEVICE = DeviceName("ram")
Transition = BringIn | SwapOut | StopEngine


def engine(
    name: str,
    memory: int | None = 6,
    *,
    device: str | Sequence[str] = DEVICE,
    ram: str | None = None,
    pin: bool = False,
    preload: bool = False,
    ttl: float | None = None,
) -> EngineSpec:
    return EngineSpec(
        name=EngineName(name),
        devices=tuple(map(DeviceName, [device] if isinstance(device, str) else device)),
        memory_bytes=memory,
        pin=pin,
        preload=preload,
        ttl_s=ttl,
        ram=None if ram is None else DeviceName(ram),
    )


def gpu(name: str, capacity: int = 10) -> DeviceSpec:
    return DeviceSpec(name=DeviceName(name), capacity_bytes=capacity, exclusive=True)


def host(capacity: int = 10) -> DeviceSpec:
    return DeviceSpec(name=DEVICE, capacity_bytes=capacity)


@dataclass
class LeaseRecord:
    engine: EngineName
    state: LeaseState
    since: float
    error: SwapServeError | None = None


class World:
    """The machine, its clients and its clock; answers nothing unless told to."""

    def __init__(
        self,
        *specs: EngineSpec,
        capacity: int = 10,
        devices: Sequence[DeviceSpec] = (),
        busy: str = "preempt",
        quantum: float = 10.0,
        max_wait: float = 30.0,
        queue_limit: int = 100,
        queue_timeout: float = 600.0,
        backoff: float = 2.0,
        can_preempt: bool = True,
        see: bool = True,
    ) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.devices = tuple(devices) or (DeviceSpec(name=DEVICE, capacity_bytes=capacity),)
        self.policy = PolicySpec(
            busy="drain" if busy == "drain" else "preempt",
            quantum_s=quantum,
            max_wait_s=max_wait,
            queue_limit=queue_limit,
            queue_timeout_s=queue_timeout,
            retry_backoff_s=backoff,
        )
        self.core = Core(self.devices, specs, self.policy)
        self.now = 1000.0
        self.timer: float | None = None
        self.states = dict.fromkeys(self.specs, S.STOPPED)
        self.tiers = dict.fromkeys(self.specs, Tier.NONE)
        self.pinned = {spec.name: spec.pin for spec in specs}
        self.can_preempt = dict.fromkeys(self.specs, can_preempt)
        self.can_dump = dict.fromkeys(self.specs, True)
        self.residue: dict[EngineName, dict[DeviceName, int]] = {name: {} for name in self.specs}
        self.unseen = set(self.specs)
        self.in_ram = dict.fromkeys(self.specs, 0)
        """Bytes of RAM that an engine in the host tier holds."""
        self.most_in_ram = dict.fromkeys(self.specs, 0)
        self.exclusive = {device.name for device in self.devices if device.exclusive}
        self.pending: dict[EngineName, Transition] = {}
        self.touching: dict[EngineName, set[DeviceName]] = {}
        """GPUs that the transitions under way touch."""
        self.leases: dict[LeaseId, LeaseRecord] = {}
        self.live: dict[LeaseId, None] = {}
        self.outcomes: dict[CommandId, SwapServeError | None] = {}
        self.asked: set[CommandId] = set()
        self.log: list[Effect] = []
        self.exact = all(spec.memory_bytes is not None for spec in specs)
        """Every footprint was known and none was exceeded, so use can be checked from outside."""
        self.dead: set[EngineName] = set()
        """Engines whose process exited during the transition under way."""
        self.numbers = itertools.count(1)
        if see:
            for spec in specs:
                self.see(spec.name, can_preempt=can_preempt)

    # ------------------------------------------------------------------ events

    def send(self, event: Event) -> list[Effect]:
        effects = self.core.handle(event, self.now)
        for effect in effects:
            self._take(effect)
            if isinstance(effect, LoseLease):
                self._check_loss(self.leases[effect.lease].engine, event, effects)
        self.log += effects
        self._check()
        return effects

    def see(
        self,
        name: str,
        state: EngineState = S.STOPPED,
        tier: Tier = Tier.NONE,
        footprint: int | None = None,
        *,
        can_preempt: bool = True,
        can_dump: bool = True,
        in_ram: int = 0,
        residue: Mapping[str, int] | None = None,
    ) -> list[Effect]:
        key = EngineName(name)
        self.unseen.discard(key)
        self.states[key], self.tiers[key] = state, tier
        self.can_preempt[key], self.can_dump[key] = can_preempt, can_dump
        self.exact = self.exact and footprint in {None, self.specs[key].memory_bytes}
        self._rests(key, in_ram, residue)
        return self.send(
            EngineSeen(
                engine=key,
                state=state,
                tier=tier,
                footprint=None if footprint is None else self._spread(key, footprint),
                can_preempt=can_preempt,
                can_dump=can_dump,
                host_bytes=in_ram,
                residue=self.residue[key],
            )
        )

    def request(self, name: str) -> LeaseId:
        lease = LeaseId(f"{name}-{next(self.numbers)}")
        self.request_as(lease, name)
        return lease

    def request_as(self, lease: LeaseId, name: str) -> None:
        self.leases[lease] = LeaseRecord(EngineName(name), L.WAITING, self.now)
        self.live[lease] = None
        self.send(LeaseRequested(lease=lease, engine=EngineName(name)))

    def end(self, lease: LeaseId) -> list[Effect]:
        self.leases[lease].state = L.ENDED
        del self.live[lease]
        return self.send(LeaseEnded(lease=lease))

    def ready(self, name: str, footprint: int | None = None) -> list[Effect]:
        key = EngineName(name)
        was = self.pending.pop(key)
        assert not isinstance(was, StopEngine)
        size = self.specs[key].memory_bytes if footprint is None else footprint
        self.exact = self.exact and footprint is None and size is not None
        self.states[key], self.tiers[key] = S.READY, Tier.DEVICE
        self._rests(key)
        self.dead.discard(key)
        footprint_of = self._spread(key, size or 0)
        return self.send(EngineReady(engine=key, footprint=footprint_of, seconds=1.0))

    def left(
        self,
        name: str,
        tier: Tier | None = None,
        *,
        lost: bool = False,
        in_ram: int | None = None,
        residue: Mapping[str, int] | None = None,
    ) -> list[Effect]:
        """Let it leave, by default to the highest tier that it may go to, in full size."""
        key = EngineName(name)
        was = self.pending[key]
        assert not isinstance(was, BringIn)
        lost = lost or key in self.dead
        if isinstance(was, StopEngine) or key in self.dead:
            tier = Tier.NONE
        elif tier is None:
            tier = was.to
        size = self.bound(key) if in_ram is None else in_ram
        size = size if tier is Tier.HOST and self.specs[key].ram is not None else 0
        self.exact = self.exact and size <= self.bound(key)
        del self.pending[key]
        self.states[key] = S.STOPPED if isinstance(was, StopEngine) else S.SWAPPED_OUT
        self.tiers[key] = tier
        self._rests(key, size, None if tier is Tier.NONE else residue)
        self.dead.discard(key)
        return self.send(
            EngineLeft(
                engine=key,
                tier=tier,
                seconds=1.0,
                leases_lost=lost,
                host_bytes=size,
                residue=self.residue[key],
            )
        )

    def fail(
        self,
        name: str,
        state: EngineState = S.FAILED,
        tier: Tier = Tier.NONE,
        *,
        lost: bool = False,
        error: SwapServeError | None = None,
    ) -> list[Effect]:
        key = EngineName(name)
        bound = self.bound(key)
        was = self.pending.pop(key)
        if state is S.FAILED and tier is Tier.DEVICE:
            self._rests(key, bound)  # wherever its state may be, nothing was seen free
        elif tier is not self.tiers[key] or state is S.READY:
            self._rests(key, bound if tier is Tier.HOST else 0)
        self.states[key], self.tiers[key] = state, tier
        lost = lost or key in self.dead
        self.dead.discard(key)
        if error is None:
            error = SwapError(key, "dump", "no space left")
            if isinstance(was, BringIn):
                error = StartFailed(key, "unhealthy")
        return self.send(
            TransitionFailed(engine=key, error=error, state=state, tier=tier, leases_lost=lost)
        )

    def refuse(self, name: str) -> list[Effect]:
        """Refuse a bring-in: a GPU has less free memory than planned, and nothing was tried."""
        key = EngineName(name)
        assert isinstance(self.pending[key], BringIn)
        tier = self.tiers[key]
        state = S.FAILED if self.states[key] is S.STARTING else S.SWAPPED_OUT
        return self.fail(name, state, tier, error=DeviceBusy(key, "GPU-0", 6, 5))

    def crash(self, name: str) -> list[Effect]:
        key = EngineName(name)
        if key in self.pending:
            self.dead.add(key)
        else:
            self.states[key], self.tiers[key] = S.FAILED, Tier.NONE
            self._rests(key)
        return self.send(EngineExited(engine=key, error=EngineCrashed(key, "SIGSEGV")))

    def measure(self, name: str, footprint: int) -> list[Effect]:
        self.exact = False
        key = EngineName(name)
        return self.send(FootprintMeasured(engine=key, footprint=self._spread(key, footprint)))

    def command(self, verb: Verb, name: str) -> CommandId:
        command = CommandId(f"c{next(self.numbers)}")
        self.asked.add(command)
        if verb in {"pin", "unpin"}:
            self.pinned[EngineName(name)] = verb == "pin"
        self.send(CommandGiven(command=command, verb=verb, engine=EngineName(name)))
        return command

    def shut_down(self) -> list[Effect]:
        return self.send(ShutdownAsked())

    def advance(self, seconds: float) -> None:
        """Let time pass; the timer rings when it is due."""
        until = self.now + seconds
        for _ in range(10_000):
            if self.timer is None or self.timer > until:
                break
            self.now = max(self.now, self.timer)
            self.timer = None
            self.send(Tick())
        else:
            raise AssertionError("the timer rings without end")
        self.now = until

    def settle(self) -> None:
        """Let every transition succeed until none is under way."""
        for _ in range(1000):
            if not self.pending:
                return
            name, what = next(iter(self.pending.items()))
            if isinstance(what, BringIn):
                self.ready(name)
            else:
                self.left(name)
        raise AssertionError("engines come and go without end")

    # --------------------------------------------------------------- questions

    def of(self, kind: type[Effect]) -> list[str]:
        """Return the engines of all effects of this kind so far, in order."""
        return [str(effect.engine) for effect in self.log if isinstance(effect, kind)]  # type: ignore[union-attr]

    def state(self, lease: LeaseId) -> LeaseState:
        return self.leases[lease].state

    def error(self, lease: LeaseId) -> SwapServeError | None:
        return self.leases[lease].error

    def on(self, name: str, *states: LeaseState) -> list[LeaseId]:
        found = [i for i in self.live if self.leases[i].engine == name]
        return sorted(i for i in found if self.leases[i].state in states)

    def transitions(self) -> list[str]:
        """Return what was asked of engines so far, such as `out a`, `in b`."""
        words = {BringIn: "in", SwapOut: "out", StopEngine: "stop"}
        return [
            f"{words[type(effect)]} {effect.engine}"
            for effect in self.log
            if isinstance(effect, Transition)
        ]

    # ------------------------------------------------------------------ checks

    def _take(self, effect: Effect) -> None:
        match effect:
            case SetTimer():
                self.timer = effect.at
            case CommandDone():
                assert effect.command in self.asked, "answered twice or never asked"
                self.asked.remove(effect.command)
                self.outcomes[effect.command] = effect.error
            case BringIn() | SwapOut() | StopEngine() | Drain():
                self._move(effect)
            case _:
                self._take_lease(effect)

    def _take_lease(
        self, effect: GrantLease | RefuseLease | SuspendLease | ResumeLease | LoseLease
    ) -> None:
        lease = self.leases[effect.lease]
        where = self.states.get(lease.engine)
        legal, after = {
            GrantLease: ({L.WAITING}, L.ACTIVE),
            RefuseLease: ({L.WAITING}, L.ENDED),
            SuspendLease: ({L.ACTIVE}, L.SUSPENDED),
            ResumeLease: ({L.SUSPENDED}, L.ACTIVE),
            LoseLease: ({L.ACTIVE, L.SUSPENDED}, L.ENDED),
        }[type(effect)]
        assert lease.state in legal, f"{effect} but the lease is {lease.state}"
        if after is L.ACTIVE:
            assert where is S.READY, f"{effect} while the engine is {where}"
        if isinstance(effect, RefuseLease | LoseLease):
            lease.error = effect.error
            del self.live[effect.lease]
        lease.state = after
        lease.since = self.now

    def _move(self, effect: Transition | Drain) -> None:
        name = effect.engine
        old = self.states[name]
        match effect:
            case BringIn():
                new = S.STARTING if self.tiers[name] is Tier.NONE else S.SWAPPING_IN
            case SwapOut():
                new = S.SWAPPING_OUT
                self._check_survivors(effect)
            case StopEngine():
                new = S.STOPPING
                assert not self.on(name, L.ACTIVE, L.SUSPENDED), "stopped under its requests"
            case _:
                new = S.DRAINING if effect.on else S.READY
        assert new in TRANSITIONS[old], f"{effect} while the engine is {old}"
        assert name not in self.pending, f"{effect} during {self.pending[name]}"
        if not isinstance(effect, Drain):
            self._check_turn(effect)
            self.pending[name] = effect
            self._check_room(name)
        self.states[name] = new

    def _check_survivors(self, effect: SwapOut) -> None:
        name = effect.engine
        assert not self.on(name, L.ACTIVE), "swapped out under requests that were not suspended"
        assert effect.in_flight == len(self.on(name, L.SUSPENDED))
        if effect.in_flight:
            assert self.can_preempt[name]
            assert self.can_dump[name] or effect.to is Tier.HOST, "they do not survive on disk"
        if effect.to is Tier.HOST:
            assert self.specs[name].ram is not None

    def _check_turn(self, effect: Transition) -> None:
        """At most one transition at a time touches a GPU."""
        name = effect.engine
        for other in set(self.touching) - set(self.pending):
            del self.touching[other]
        touched = {
            device
            for device in self.exclusive.intersection(self.specs[name].devices)
            if isinstance(effect, BringIn)
            or self.tiers[name] is Tier.DEVICE
            or self.residue[name].get(device)
        }
        for other, busy in self.touching.items():
            assert not busy & touched, f"{effect} during {self.pending[other]}"
        self.touching[name] = touched

    def _check_room(self, name: EngineName) -> None:
        """Whatever begins to move has its place on every device, whoever else is there."""
        if not self.exact:
            return
        for device in self.devices:
            used = sum(self.use(other, device.name) for other in self.specs)
            assert used <= device.capacity_bytes, f"{name} moves, {used} used of {device}"

    def _check_loss(self, name: EngineName, event: Event, effects: list[Effect]) -> None:
        """A granted lease is lost with its process, or to an operator's stop, and never else."""
        told = isinstance(event, EngineLeft | TransitionFailed) and event.leases_lost
        gone = (told or isinstance(event, EngineExited)) and getattr(event, "engine", None) == name
        stopped = any(isinstance(e, StopEngine) and e.engine == name for e in effects)
        assert gone or stopped, f"a lease lost after {event}"

    # ------------------------------------------------------------------- bytes

    def _spread(self, name: EngineName, size: int) -> dict[DeviceName, int]:
        return dict.fromkeys(self.specs[name].devices, size)

    def _rests(
        self, name: EngineName, in_ram: int = 0, residue: Mapping[str, int] | None = None
    ) -> None:
        self.in_ram[name] = in_ram if self.specs[name].ram is not None else 0
        self.most_in_ram[name] = max(self.most_in_ram[name], self.in_ram[name])
        self.residue[name] = {DeviceName(d): size for d, size in (residue or {}).items() if size}

    def bound(self, name: EngineName) -> int:
        """Return the bytes of RAM that are its own at the end of the transition under way."""
        was = self.pending.get(name)
        if not isinstance(was, SwapOut) or was.to is not Tier.HOST:
            return self.in_ram[name]
        held = sum(self.on_device(name, device) for device in self.specs[name].devices)
        return max(held + self.in_ram[name], self.most_in_ram[name])

    def on_device(self, name: EngineName, device: DeviceName) -> int:
        """Return the bytes that are in use on one of its own devices."""
        if self.tiers[name] is Tier.DEVICE:
            return self.specs[name].memory_bytes or 0
        return self.residue[name].get(device, 0)

    def use(self, name: EngineName, device: DeviceName) -> int:
        """Return the bytes of the device that the engine holds or has been promised."""
        spec = self.specs[name]
        size = self.bound(name) if device == spec.ram else 0
        if device not in spec.devices:
            return size
        if self.occupies(name):
            return size + (spec.memory_bytes or 0)
        return size + self.on_device(name, device)

    def occupies(self, name: EngineName) -> bool:
        bringing_in = isinstance(self.pending.get(name), BringIn)
        return bringing_in or self.tiers[name] is Tier.DEVICE

    def _check_books(self) -> None:
        """The ledger's figures are those of the machine, on every device."""
        accounts = self.core.devices()
        for device in (device.name for device in self.devices):
            in_use = promised = 0
            for name, spec in self.specs.items():
                mine = self.in_ram[name] if device == spec.ram else 0
                mine += self.on_device(name, device) if device in spec.devices else 0
                in_use += mine
                promised += self.use(name, device) - mine
            account = accounts[device]
            assert account.committed_bytes == in_use, f"{device}: {account}, in use {in_use}"
            assert account.reserved_bytes >= promised, f"{device}: {account}, {promised} promised"

    def _check(self) -> None:
        for account in self.core.devices().values():
            assert account.reserved_bytes >= 0
            assert account.committed_bytes >= 0
            assert account.excess_bytes >= 0
            used = account.reserved_bytes + account.committed_bytes
            assert used <= account.capacity_bytes
            assert not (self.exact and account.excess_bytes)
        if self.exact and not self.unseen:
            self._check_books()
        for name, state in self.states.items():
            assert self.core.state(name) is state
            assert self.core.pinned(name) == self.pinned[name]
            by_state = [len(self.on(name, s)) for s in (L.ACTIVE, L.WAITING, L.SUSPENDED)]
            assert list(self.core.counts(name)) == by_state
            if state in {S.READY, S.DRAINING}:
                assert not self.on(name, L.SUSPENDED), "an engine that serves, and a lease frozen"
            if state is S.READY:
                assert not self.on(name, L.WAITING), "an engine that serves, and a lease waiting"
