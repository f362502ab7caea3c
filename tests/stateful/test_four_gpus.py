"""Four GPUs and RAM: engines of one, two and four GPUs, host tier, refusals, crashes, operators."""

import os
from collections.abc import Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from swapserve.ids import EngineName
from swapserve.messages import Ask, BringIn, EngineSpec, LeaseBegan, StopEngine, SwapOut, Used, Verb
from swapserve.states import EngineState, LeaseState, Tier
from tests.stateful.draws import asks, policies, seldom, slots, swap_seconds, used
from tests.stateful.world import DEVICE, World, engine, gpu, host

S = EngineState
L = LeaseState
SPANS: dict[str, Sequence[str]] = {
    "one": ("g0",),
    "two": ("g1",),
    "left": ("g0", "g1"),
    "middle": ("g1", "g2"),
    "right": ("g2", "g3"),
    "last": ("g3",),
    "all": ("g0", "g1", "g2", "g3"),
    "cpu": (DEVICE,),
}
NAMES = tuple(SPANS)
VERBS: tuple[Verb, ...] = ("swap_in", "swap_out", "swap_in", "swap_out", "stop", "pin", "unpin")
names = st.sampled_from(NAMES)


class Machine(RuleBasedStateMachine):
    """Clients, operators, failures and time around one core."""

    world: World
    unknown = False

    @initialize(
        sizes=st.lists(st.sampled_from([2, 4, 6, 9, 10]), min_size=8, max_size=8),
        ram=st.sampled_from([0, 6, 15, 25, 100]),
        unknown=st.sampled_from([False, False, False, True]),
        policy=policies,
        slots=st.lists(slots, min_size=8, max_size=8),
        can_preempt=st.lists(st.booleans(), min_size=8, max_size=8),
        can_dump=st.lists(st.booleans(), min_size=8, max_size=8),
        preload=st.booleans(),
        ttl=st.sampled_from([None, 20.0]),
        quantum=st.sampled_from([None, None, 1.0, 50.0]),
        look_ahead=st.booleans(),
        parked=st.booleans(),
    )
    def begin(
        self,
        *,
        sizes: list[int],
        ram: int,
        unknown: bool,
        policy: str,
        slots: list[int | None],
        can_preempt: list[bool],
        can_dump: list[bool],
        preload: bool,
        ttl: float | None,
        quantum: float | None,
        look_ahead: bool,
        parked: bool,
    ) -> None:
        self.unknown = unknown
        specs = [
            engine(
                name,
                None if unknown and name in {"two", "right"} else size,
                device=SPANS[name],
                ram=DEVICE if name != "cpu" and ram else None,
                preload=preload and name in {"left", "last"},
                ttl=ttl if name in {"two", "all"} else None,
                slots=slot,
            )
            for name, size, slot in zip(NAMES, sizes, slots, strict=True)
        ]
        self.world = World(
            *specs,
            devices=[host(max(ram, 10)), *(gpu(f"g{number}") for number in range(4))],
            policy=policy,
            quantum=quantum,
            look_ahead=look_ahead,
            queue_limit=4,
            see=False,
        )
        for spec, able, dumps in zip(specs, can_preempt, can_dump, strict=True):
            # Without a host tier nothing can survive in flight but by way of disk.
            self._see(spec, parked=parked, able=able, dumps=dumps or spec.ram is None)

    def _see(self, spec: EngineSpec, *, parked: bool, able: bool, dumps: bool) -> None:
        size = spec.memory_bytes or 2
        if parked and spec.ram and spec.name == "one":
            self.world.see("one", S.SWAPPED_OUT, Tier.HOST, in_ram=size, can_preempt=able)
            return
        if parked and spec.ram and spec.name in {"two", "middle"}:
            self.world.see(spec.name, S.SWAPPED_OUT, Tier.DISK, can_preempt=able, can_dump=dumps)
            return
        resident = parked and spec.name == "last"
        state, tier = (S.READY, Tier.DEVICE) if resident else (S.STOPPED, Tier.NONE)
        self.world.see(spec.name, state, tier, can_preempt=able, can_dump=dumps)

    # ----------------------------------------------------------------- clients

    @rule(some=st.lists(st.tuples(names, asks), min_size=1, max_size=3))
    def requests(self, some: list[tuple[str, Ask]]) -> None:
        for name, ask in some:
            self.world.request(name, ask=ask)

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def a_stream_begins(self, data: st.DataObject) -> None:
        """At any time: the word of it may cross with a suspension or the end."""
        lease = data.draw(st.sampled_from(sorted(self.world.live)))
        self.world.send(LeaseBegan(lease=lease))

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def a_lease_ends_or_its_client_leaves(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.world.live)))
        answered = self.world.state(lease) is L.ACTIVE
        self.world.end(lease, data.draw(used) if answered else None)

    # ----------------------------------------------------------------- engines

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data(), surprise=st.sampled_from([0, 0, 0, 3]), seconds=swap_seconds)
    def a_transition_succeeds(self, data: st.DataObject, surprise: int, seconds: float) -> None:
        world = self.world
        name = data.draw(st.sampled_from(sorted(world.pending)))
        what = world.pending[name]
        if isinstance(what, BringIn):
            if name in world.dead:
                world.fail(name)
            elif world.promotes(what):
                self._rest(data, name, what, seconds)
            elif self.unknown:
                size = (world.specs[name].memory_bytes or 2) + surprise
                world.ready(name, size, seconds=seconds)
            else:
                world.ready(name, seconds=seconds)
        elif isinstance(what, SwapOut) and name not in world.dead:
            self._rest(data, name, what, seconds)
        else:
            world.left(name)

    @rule(seconds=st.sampled_from([0.0, 11.0, 60.0]))
    def everything_succeeds_for_a_while(self, seconds: float) -> None:
        for _ in range(4):
            for name in sorted(self.world.pending):
                if name in self.world.dead and isinstance(self.world.pending[name], BringIn):
                    self.world.fail(name)
                elif name in self.world.pending:
                    self.world.succeed(name)
            self.world.advance(seconds)

    @rule(seconds=st.sampled_from([1.0, 60.0]), used=used)
    def all_is_quiet_for_a_while(self, seconds: float, used: Used | None) -> None:
        self.world.calm_down(seconds, used)

    def _rest(
        self, data: st.DataObject, name: EngineName, what: SwapOut | BringIn, seconds: float
    ) -> None:
        """Leave to the tier asked for or to one below, all of it or with contexts left behind.

        One that is brought nearer arrives in host memory, or not at all.
        """
        world = self.world
        tiers = [Tier.HOST, Tier.DISK, Tier.NONE] if what.to is Tier.HOST else [Tier.DISK]
        if isinstance(what, BringIn):
            tiers = [Tier.HOST]
        elif not world.on(name, L.SUSPENDED) and what.to is Tier.DISK:
            tiers.append(Tier.NONE)
        elif world.on(name, L.SUSPENDED) and not world.can_dump[name]:
            tiers = [Tier.HOST]
        tier = data.draw(st.sampled_from(tiers))
        parks = tier is Tier.HOST
        sleeps = parks and world.tiers[name] is Tier.DEVICE and data.draw(st.booleans())
        left = dict.fromkeys(SPANS[name], 1) if sleeps else None
        lost = tier is Tier.NONE and bool(world.on(name, L.SUSPENDED))
        size = max(0, world.bound(name) - data.draw(st.sampled_from([0, 0, 1]))) if parks else None
        kept = data.draw(st.booleans())
        world.left(
            name, tier, in_ram=size, residue=left, lost=lost, seconds=seconds, cache_kept=kept
        )

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data(), lost=seldom, happens=seldom)
    def a_transition_fails(self, data: st.DataObject, lost: bool, happens: bool) -> None:
        world = self.world
        if not happens:
            return
        name = data.draw(st.sampled_from(sorted(world.pending)))
        what = world.pending[name]
        outcomes = [(S.FAILED, Tier.NONE)]
        if world.occupies(name):
            outcomes.append((S.FAILED, Tier.DEVICE))
        elif world.tiers[name] is Tier.HOST and name not in world.dead:
            outcomes.append((S.SWAPPED_OUT, Tier.HOST))
            outcomes.append((S.FAILED, Tier.HOST))
        elif isinstance(what, BringIn):
            outcomes.append((S.SWAPPED_OUT, Tier.DISK))
        if world.tiers[name] is Tier.DEVICE and isinstance(what, SwapOut):
            outcomes = outcomes if name in world.dead else [*outcomes, (S.READY, Tier.DEVICE)]
        state, tier = data.draw(st.sampled_from(outcomes))
        world.fail(name, state, tier, lost=lost)

    @precondition(lambda self: self._coming())
    @rule(data=st.data(), happens=seldom)
    def a_bring_in_is_refused(self, data: st.DataObject, happens: bool) -> None:
        if happens:
            self.world.refuse(data.draw(st.sampled_from(self._coming())))

    @precondition(lambda self: self._leaving_alive())
    @rule(data=st.data(), happens=seldom)
    def a_swap_out_is_given_up(self, data: st.DataObject, happens: bool) -> None:
        if happens:
            self.world.ready(data.draw(st.sampled_from(self._leaving_alive())))

    @rule(name=names, happens=seldom)
    def an_engine_crashes(self, name: str, happens: bool) -> None:
        world = self.world
        key = EngineName(name)
        alive = world.tiers[key] in {Tier.DEVICE, Tier.HOST} or key in world.pending
        if happens and alive and world.states[key] is not S.FAILED:
            world.crash(name)

    @precondition(lambda self: self.unknown)
    @rule(name=names, size=st.sampled_from([1, 3, 7, 12]))
    def an_engine_is_measured(self, name: str, size: int) -> None:
        self.world.measure(name, size)

    # ------------------------------------------------------- operators and time

    @rule(name=names, verb=st.sampled_from(VERBS), happens=seldom)
    def command(self, name: str, verb: Verb, happens: bool) -> None:
        if happens:
            self.world.command(verb, name)

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 11.0, 40.0, 200.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    def teardown(self) -> None:
        """When failures stop and requests end, nobody is left waiting."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for name in NAMES:
            world.command("unpin", name)
        for _ in range(30):
            world.calm_down(30.0)
        left = {lease: world.leases[lease] for lease in world.live}
        assert not left, f"still there when all is quiet: {left}"
        assert not world.asked, f"commands never answered: {world.asked}"

    def _coming(self) -> list[str]:
        pending = self.world.pending.items()
        return sorted(
            name
            for name, what in pending
            if isinstance(what, BringIn)
            and not self.world.promotes(what)
            and name not in self.world.dead
            and self.world.tiers[name] is not Tier.DEVICE
        )

    def _leaving_alive(self) -> list[str]:
        world = self.world
        return sorted(
            name
            for name, what in world.pending.items()
            if not isinstance(what, BringIn | StopEngine)
            and world.tiers[name] is Tier.DEVICE
            and name not in world.dead
        )


def test_promises_hold_on_four_gpus() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=int(os.environ.get("SWAPSERVE_EXAMPLES", "200")),
            stateful_step_count=80,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
