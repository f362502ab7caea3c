"""A world around the scheduler core that believes nothing: every effect is checked as it comes."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swapserve.errors import (
    DeadlineUnmeetable,
    DeviceBusy,
    EngineCrashed,
    QueueFull,
    QueueTimeout,
    StartFailed,
    SwapError,
    SwapServeError,
)
from swapserve.ids import CommandId, DeviceName, EngineName, LeaseId
from swapserve.messages import (
    Ask,
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
    RefuseLease,
    ResumeLease,
    Rules,
    SetTimer,
    ShutdownAsked,
    StopEngine,
    SuspendLease,
    SwapOut,
    Tick,
    TransitionFailed,
    Used,
    Verb,
)
from swapserve.scheduler.core import Core
from swapserve.scheduler.door import LOOK_AGAIN_S
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.policies.base import Policy
from swapserve.scheduler.policies.registry import POLICIES
from swapserve.states import TRANSITIONS, EngineState, LeaseState, Priority, Tier

S = EngineState
L = LeaseState
DEVICE = DeviceName("ram")
Transition = BringIn | SwapOut | StopEngine
IDLE_RINGS = 3
"""So many rings of the timer in a row at one moment may change nothing, for want of precision."""


def engine(
    name: str,
    memory: int | None = 6,
    *,
    device: str | Sequence[str] = DEVICE,
    ram: str | None = None,
    pin: bool = False,
    preload: bool = False,
    ttl: float | None = None,
    slots: int | None = None,
    queue_limit: int | None = None,
    min_resident: float = 0.0,
) -> EngineSpec:
    return EngineSpec(
        name=EngineName(name),
        devices=tuple(map(DeviceName, [device] if isinstance(device, str) else device)),
        memory_bytes=memory,
        pin=pin,
        preload=preload,
        ttl_s=ttl,
        ram=None if ram is None else DeviceName(ram),
        slots=slots,
        queue_limit=queue_limit,
        min_resident_s=min_resident,
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
    ask: Ask
    error: SwapServeError | None = None


class World:
    """The machine, its clients and its clock; answers nothing unless told to."""

    def __init__(
        self,
        *specs: EngineSpec,
        capacity: int = 10,
        devices: Sequence[DeviceSpec] = (),
        policy: str | Policy = "lru",
        quantum: float | None = 10.0,
        max_wait: float = 30.0,
        queue_limit: int = 100,
        queue_limit_total: int = 10**6,
        queue_timeout: float = 600.0,
        backoff: float = 2.0,
        share: float = 0.2,
        look_ahead: bool = False,
        knowledge: Knowledge | None = None,
        can_preempt: bool = True,
        see: bool = True,
    ) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.devices = tuple(devices) or (DeviceSpec(name=DEVICE, capacity_bytes=capacity),)
        self.rules = Rules(
            quantum_s=quantum,
            max_wait_s=max_wait,
            queue_limit=queue_limit,
            queue_limit_total=queue_limit_total,
            queue_timeout_s=queue_timeout,
            retry_backoff_s=backoff,
            overhead_share=share,
            look_ahead=look_ahead,
        )
        self.policy = POLICIES[policy]() if isinstance(policy, str) else policy
        self.core = Core(self.devices, specs, self.rules, self.policy, knowledge)
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
        self.asked: dict[CommandId, tuple[Verb, EngineName]] = {}
        """Commands that are not answered yet."""
        self.log: list[Effect] = []
        self.exact = all(spec.memory_bytes is not None for spec in specs)
        """Every footprint was known and none was exceeded, so use can be checked from outside."""
        self.dead: set[EngineName] = set()
        """Engines whose process exited during the transition under way."""
        self.idle_rings = 0
        """Rings of the timer in a row that did nothing but ask for the next one at once."""
        self.numbers = itertools.count(1)
        if see:
            for spec in specs:
                self.see(spec.name, can_preempt=can_preempt)

    # ------------------------------------------------------------------ events

    def send(self, event: Event) -> list[Effect]:
        effects = self.core.handle(event, self.now)
        for effect in effects:
            self._take(effect)
            if isinstance(effect, SwapOut):
                self._check_cause(effect)
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

    def request(
        self,
        name: str,
        priority: Priority = Priority.INTERACTIVE,
        *,
        deadline: float | None = None,
        ask: Ask | None = None,
    ) -> LeaseId:
        lease = LeaseId(f"{name}-{next(self.numbers)}")
        self.request_as(lease, name, ask or Ask(priority=priority, deadline_s=deadline))
        return lease

    def request_as(self, lease: LeaseId, name: str, ask: Ask | None = None) -> None:
        ask = ask or Ask()
        self.leases[lease] = LeaseRecord(EngineName(name), L.WAITING, self.now, ask)
        self.live[lease] = None
        self.send(LeaseRequested(lease=lease, engine=EngineName(name), ask=ask))

    def end(self, lease: LeaseId, used: Used | None = None) -> list[Effect]:
        """Let it be over: answered to its end if `used` says what it took, else its client left."""
        self.leases[lease].state = L.ENDED
        del self.live[lease]
        return self.send(LeaseEnded(lease=lease, used=used))

    def ready(
        self, name: str, footprint: int | None = None, *, seconds: float = 1.0
    ) -> list[Effect]:
        key = EngineName(name)
        was = self.pending.pop(key)
        assert not isinstance(was, StopEngine)
        assert not self.promotes(was)
        size = self.specs[key].memory_bytes if footprint is None else footprint
        self.exact = self.exact and footprint is None and size is not None
        self.states[key], self.tiers[key] = S.READY, Tier.DEVICE
        self._rests(key)
        self.dead.discard(key)
        footprint_of = self._spread(key, size or 0)
        return self.send(EngineReady(engine=key, footprint=footprint_of, seconds=seconds))

    def left(
        self,
        name: str,
        tier: Tier | None = None,
        *,
        lost: bool = False,
        in_ram: int | None = None,
        residue: Mapping[str, int] | None = None,
        seconds: float = 1.0,
        cache_kept: bool = False,
    ) -> list[Effect]:
        """Let it leave, by default to the highest tier that it may go to, in full size.

        Or let it arrive in host memory, if that is where it was to be brought.
        """
        key = EngineName(name)
        was = self.pending[key]
        assert self.promotes(was) or not isinstance(was, BringIn)
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
                seconds=seconds,
                leases_lost=lost,
                cache_kept=cache_kept,
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
        self.asked[command] = (verb, EngineName(name))
        if verb in {"pin", "unpin"}:
            self.pinned[EngineName(name)] = verb == "pin"
        self.send(CommandGiven(command=command, verb=verb, engine=EngineName(name)))
        return command

    def make_way(self) -> None:
        """Do as an operator must where nobody leaves for another: swap out who is idle."""
        if self.policy.swaps:
            return
        for name, state in tuple(self.states.items()):
            if state is S.READY and not self.on(name, L.ACTIVE):
                self.command("swap_out", name)

    def shut_down(self) -> list[Effect]:
        return self.send(ShutdownAsked())

    def advance(self, seconds: float) -> None:
        """Let time pass; the timer rings when it is due."""
        until = self.now + seconds
        for _ in range(10_000):
            if self.timer is None or self.timer > until:
                break
            self.ring()
        else:
            raise AssertionError("the timer rings without end")
        self.now = until
        self._check_deadlines()

    def ring(self) -> None:
        """Let the time come for which the timer is set."""
        assert self.timer is not None
        self.now, self.timer = max(self.now, self.timer), None
        effects = self.send(Tick())
        vain = self._due() and all(isinstance(effect, SetTimer) for effect in effects)
        self.idle_rings = self.idle_rings + 1 if vain else 0
        assert self.idle_rings <= IDLE_RINGS, "the timer rings at once, and nothing changes"

    def _due(self) -> bool:
        return self.timer is not None and self.timer <= self.now

    def settle(self) -> None:
        """Let every transition succeed until none is under way."""
        for _ in range(1000):
            if not self.pending:
                return
            self.succeed(next(iter(self.pending)))
        raise AssertionError("engines come and go without end")

    def calm_down(self, seconds: float, used: Used | None = None) -> None:
        """Let requests be answered and engines come and go as they should, for a while."""
        for _ in range(4):
            for name in sorted(self.pending):
                if name in self.dead and isinstance(self.pending[name], BringIn):
                    self.fail(name)
                elif name in self.pending:
                    self.succeed(name)
            self.make_way()
            for lease in sorted(self.live):
                if self.leases[lease].state is L.ACTIVE:
                    self.end(lease, used)
            self.advance(seconds)

    def succeed(self, name: str, *, seconds: float = 1.0) -> None:
        """Let the transition under way end as it should."""
        key = EngineName(name)
        what = self.pending[key]
        if isinstance(what, BringIn) and not self.promotes(what):
            size = 2 if self.specs[key].memory_bytes is None else None
            self.ready(name, size, seconds=seconds)
        else:
            self.left(name, seconds=seconds)

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
                del self.asked[effect.command]
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
        if isinstance(effect, GrantLease):
            self._check_precedence(effect.lease, lease)
        if isinstance(effect, RefuseLease):
            self._check_refusal(effect, lease)
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
                if self.promotes(effect):
                    self._check_promotion(name)
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

    def _check_refusal(self, effect: RefuseLease, record: LeaseRecord) -> None:
        """Who is refused for want of room or time in the queue has found none."""
        match effect.error:
            case QueueFull():
                here, everywhere = self.on(record.engine, L.WAITING), self._waiting()
                full = len(here) - 1 >= self._queue_limit(record.engine)
                assert full or everywhere - 1 >= self.rules.queue_limit_total
            case QueueTimeout():
                assert record.since + self.rules.queue_timeout_s <= self.now
            case DeadlineUnmeetable():
                assert record.ask.deadline_s is not None
            case _:
                pass

    def _check_deadlines(self) -> None:
        """Nobody waits on for an answer that comes too late."""
        for lease, record in ((lease, self.leases[lease]) for lease in self.live):
            if record.state is L.WAITING and record.ask.deadline_s is not None:
                late = self.now - record.since - record.ask.deadline_s
                assert late <= LOOK_AGAIN_S, f"{lease} should have been told"

    def _queue_limit(self, name: EngineName) -> int:
        own = self.specs[name].queue_limit
        return self.rules.queue_limit if own is None else own

    def _waiting(self) -> int:
        return sum(self.leases[lease].state is L.WAITING for lease in self.live)

    def _check_precedence(self, lease: LeaseId, record: LeaseRecord) -> None:
        """In one engine's queue a higher priority goes first, but for the oldest over age."""
        others = [self.leases[i] for i in self.on(record.engine, L.WAITING) if i != lease]
        if record.since <= self.now - self.rules.max_wait_s:
            assert all(record.since <= other.since for other in others), f"{lease} goes first"
            return
        over_age = any(other.since <= self.now - self.rules.max_wait_s for other in others)
        assert not over_age, f"{lease} goes before one that is over age"
        order = (record.ask.priority, record.since)
        assert all(order <= (other.ask.priority, other.since) for other in others), (
            f"{lease} goes before one that is more urgent"
        )

    def _check_cause(self, effect: SwapOut) -> None:
        """Nobody leaves for an engine that nobody wants."""
        _, ours, name = effect.cause.partition("room for ")
        if not ours:
            return
        wanted = self.on(name, L.WAITING, L.SUSPENDED)
        asked = any(
            verb in {"swap_in", "start"} and one == name for verb, one in self.asked.values()
        )
        assert wanted or asked, f"{effect.engine} leaves for {name}, which nobody wants"

    def _check_promotion(self, name: EngineName) -> None:
        """What comes nearer before it is asked for takes memory that nobody waits for."""
        assert self.rules.look_ahead
        assert self.tiers[name] is Tier.DISK
        ram = self.specs[name].ram
        assert ram is not None
        for other, spec in self.specs.items():
            away = self.states[other] in {S.SWAPPED_OUT, S.STOPPED}
            if away and other not in self.pending and ram in spec.devices:
                assert not self.on(other, L.WAITING), f"{name} takes the place of {other}"

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
            if (isinstance(effect, BringIn) and not self.promotes(effect))
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
        if not isinstance(was, SwapOut | BringIn) or was.to is not Tier.HOST:
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
        was = self.pending.get(name)
        bringing_in = isinstance(was, BringIn) and not self.promotes(was)
        return bringing_in or self.tiers[name] is Tier.DEVICE

    @staticmethod
    def promotes(what: Transition | None) -> bool:
        """Return whether it brings an engine nearer, but not onto its devices."""
        return isinstance(what, BringIn) and what.to is Tier.HOST

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
        assert self._waiting() <= self.rules.queue_limit_total
        for name, state in self.states.items():
            assert self.core.state(name) is state
            assert self.core.pinned(name) == self.pinned[name]
            active, waiting, suspended = self.core.counts(name)
            by_state = [len(self.on(name, s)) for s in (L.ACTIVE, L.WAITING, L.SUSPENDED)]
            assert [active, waiting, suspended] == by_state
            assert sum(self.core.queued(name).values()) == waiting
            assert waiting <= self._queue_limit(name)
            slots = self.specs[name].slots
            assert slots is None or active <= slots
            if state in {S.READY, S.DRAINING}:
                assert not suspended, "an engine that serves, and a lease frozen"
            if state is S.READY and waiting:
                assert active == slots, "an engine that serves with a free slot, a lease waiting"
            wait = self.core.predicted_wait(name)
            assert math.isfinite(wait)
            assert wait >= 0.0
