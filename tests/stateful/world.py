"""A world around the scheduler core that believes nothing: every effect is checked as it comes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from swapserve.errors import EngineCrashed, StartFailed, SwapError, SwapServeError
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


def engine(
    name: str,
    memory: int | None = 6,
    *,
    device: str = DEVICE,
    pin: bool = False,
    preload: bool = False,
    ttl: float | None = None,
) -> EngineSpec:
    return EngineSpec(
        name=EngineName(name),
        device=DeviceName(device),
        memory_bytes=memory,
        pin=pin,
        preload=preload,
        ttl_s=ttl,
    )


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
        self.pending: dict[EngineName, BringIn | SwapOut | StopEngine] = {}
        self.leases: dict[LeaseId, LeaseRecord] = {}
        self.live: dict[LeaseId, None] = {}
        self.outcomes: dict[CommandId, SwapServeError | None] = {}
        self.asked: set[CommandId] = set()
        self.log: list[Effect] = []
        self.exact = True
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
    ) -> list[Effect]:
        key = EngineName(name)
        self.states[key], self.tiers[key] = state, tier
        return self.send(
            EngineSeen(
                engine=key,
                state=state,
                tier=tier,
                footprint_bytes=footprint,
                can_preempt=can_preempt,
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
        self.dead.discard(key)
        return self.send(EngineReady(engine=key, footprint_bytes=size or 0, seconds=1.0))

    def left(self, name: str, tier: Tier = Tier.DISK, *, lost: bool = False) -> list[Effect]:
        key = EngineName(name)
        was = self.pending.pop(key)
        assert not isinstance(was, BringIn)
        stopped = isinstance(was, StopEngine)
        self.states[key] = S.STOPPED if stopped else S.SWAPPED_OUT
        self.tiers[key] = Tier.NONE if stopped else tier
        lost = lost or key in self.dead
        self.dead.discard(key)
        return self.send(
            EngineLeft(engine=key, tier=self.tiers[key], seconds=1.0, leases_lost=lost)
        )

    def fail(
        self,
        name: str,
        state: EngineState = S.FAILED,
        tier: Tier = Tier.NONE,
        *,
        lost: bool = False,
    ) -> list[Effect]:
        key = EngineName(name)
        was = self.pending.pop(key)
        self.states[key], self.tiers[key] = state, tier
        lost = lost or key in self.dead
        self.dead.discard(key)
        error: SwapServeError = SwapError(key, "dump", "no space left")
        if isinstance(was, BringIn):
            error = StartFailed(key, "unhealthy")
        return self.send(
            TransitionFailed(engine=key, error=error, state=state, tier=tier, leases_lost=lost)
        )

    def crash(self, name: str) -> list[Effect]:
        key = EngineName(name)
        if key in self.pending:
            self.dead.add(key)
        else:
            self.states[key], self.tiers[key] = S.FAILED, Tier.NONE
        return self.send(EngineExited(engine=key, error=EngineCrashed(key, "SIGSEGV")))

    def measure(self, name: str, footprint: int) -> list[Effect]:
        self.exact = False
        return self.send(FootprintMeasured(engine=EngineName(name), footprint_bytes=footprint))

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
            if isinstance(effect, BringIn | SwapOut | StopEngine)
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

    def _move(self, effect: BringIn | SwapOut | StopEngine | Drain) -> None:
        name = effect.engine
        old = self.states[name]
        running = self.on(name, L.ACTIVE)
        match effect:
            case BringIn():
                new = S.STARTING if self.tiers[name] is Tier.NONE else S.SWAPPING_IN
                self._check_room(name)
            case SwapOut():
                new = S.SWAPPING_OUT
                assert not running, "swapped out under requests that were not suspended"
                assert effect.in_flight == len(self.on(name, L.SUSPENDED))
            case StopEngine():
                new = S.STOPPING
                assert not self.on(name, L.ACTIVE, L.SUSPENDED), "stopped under its requests"
            case _:
                new = S.DRAINING if effect.on else S.READY
        assert new in TRANSITIONS[old], f"{effect} while the engine is {old}"
        assert name not in self.pending, f"{effect} during {self.pending[name]}"
        self.states[name] = new
        if not isinstance(effect, Drain):
            self.pending[name] = effect

    def _check_room(self, name: EngineName) -> None:
        spec = self.specs[name]
        if not self.exact or spec.memory_bytes is None:
            return
        capacity = next(d.capacity_bytes for d in self.devices if d.name == spec.device)
        used = sum(
            other.memory_bytes or 0
            for other in self.specs.values()
            if other.name != name and other.device == spec.device and self.occupies(other.name)
        )
        assert used + spec.memory_bytes <= capacity, f"{name} comes in over {used} of {capacity}"

    def occupies(self, name: EngineName) -> bool:
        bringing_in = isinstance(self.pending.get(name), BringIn)
        return bringing_in or self.tiers[name] is Tier.DEVICE

    def _check(self) -> None:
        for account in self.core.devices().values():
            assert account.reserved_bytes >= 0
            assert account.committed_bytes >= 0
            assert account.excess_bytes >= 0
            used = account.reserved_bytes + account.committed_bytes
            assert used <= account.capacity_bytes
            assert not (self.exact and account.excess_bytes)
        for name, state in self.states.items():
            assert self.core.state(name) is state
            assert self.core.pinned(name) == self.pinned[name]
            by_state = [len(self.on(name, s)) for s in (L.ACTIVE, L.WAITING, L.SUSPENDED)]
            assert list(self.core.counts(name)) == by_state
            if state in {S.READY, S.DRAINING}:
                assert not self.on(name, L.SUSPENDED), "an engine that serves, and a lease frozen"
            if state is S.READY:
                assert not self.on(name, L.WAITING), "an engine that serves, and a lease waiting"
