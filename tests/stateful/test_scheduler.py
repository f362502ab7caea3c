"""Random worlds around the scheduler core: whatever happens, its promises hold."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from swapserve.ids import DeviceName
from swapserve.messages import Ask, BringIn, DeviceSpec, LeaseBegan, StopEngine, Used, Verb
from swapserve.states import EngineState, LeaseState, Tier
from tests.stateful.draws import asks, policies, queue_limits, seldom, slots, swap_seconds, used
from tests.stateful.world import DEVICE, World, engine

S = EngineState
L = LeaseState
NAMES = ("a", "b", "c", "d", "e")
VERBS: tuple[Verb, ...] = ("swap_in", "swap_out", "start", "stop", "pin", "unpin")
names = st.sampled_from(NAMES)


class Machine(RuleBasedStateMachine):
    """Clients, operators, failures and time around one core."""

    world: World
    unknown = False

    @initialize(
        sizes=st.lists(st.sampled_from([2, 4, 6, 9, 10, 11]), min_size=5, max_size=5),
        unknown=st.sampled_from([False, False, True]),
        policy=policies,
        slots=st.lists(slots, min_size=5, max_size=5),
        limits=st.lists(queue_limits, min_size=5, max_size=5),
        limit=st.sampled_from([3, 1000]),
        min_resident=st.sampled_from([0.0, 0.0, 20.0]),
        can_preempt=st.lists(st.booleans(), min_size=5, max_size=5),
        preload=st.booleans(),
        ttl=st.sampled_from([None, 20.0]),
        quantum=st.sampled_from([None, None, 1.0, 50.0]),
        share=st.sampled_from([0.0, 0.2, 0.9]),
        max_wait=st.sampled_from([0.0, 30.0, 30.0]),
        look_ahead=st.booleans(),
        queue_timeout=st.sampled_from([15.0, 1e6]),
        ready=st.booleans(),
    )
    def begin(
        self,
        *,
        sizes: list[int],
        unknown: bool,
        policy: str,
        slots: list[int | None],
        limits: list[int | None],
        limit: int,
        min_resident: float,
        can_preempt: list[bool],
        preload: bool,
        ttl: float | None,
        quantum: float | None,
        share: float,
        max_wait: float,
        look_ahead: bool,
        queue_timeout: float,
        ready: bool,
    ) -> None:
        self.unknown = unknown
        other = DeviceName("gpu")
        specs = [
            engine(
                name,
                None if unknown and name in "bd" else size,
                preload=preload and name in "ab",
                ttl=ttl if name != "c" else None,
                device=other if name == "e" else DEVICE,
                slots=slot,
                queue_limit=own,
                min_resident=min_resident if name in "cd" else 0.0,
            )
            for name, size, slot, own in zip(NAMES, sizes, slots, limits, strict=True)
        ]
        self.world = World(
            *specs,
            devices=[
                DeviceSpec(name=DEVICE, capacity_bytes=10),
                DeviceSpec(name=other, capacity_bytes=10),
            ],
            policy=policy,
            quantum=quantum,
            share=share,
            max_wait=max_wait,
            look_ahead=look_ahead,
            queue_timeout=queue_timeout,
            queue_limit=4,
            queue_limit_total=limit,
            see=False,
        )
        for spec, able in zip(specs, can_preempt, strict=True):
            resident = ready and spec.name == "a" and (spec.memory_bytes or 0) <= 10
            state, tier = (S.READY, Tier.DEVICE) if resident else (S.STOPPED, Tier.NONE)
            self.world.see(spec.name, state, tier, can_preempt=able)

    # ----------------------------------------------------------------- clients

    @rule(some=st.lists(st.tuples(names, asks), min_size=1, max_size=4))
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
    @rule(data=st.data(), surprise=st.sampled_from([0, 0, 0, 3, 8]), seconds=swap_seconds)
    def a_transition_succeeds(self, data: st.DataObject, surprise: int, seconds: float) -> None:
        world = self.world
        name = data.draw(st.sampled_from(sorted(world.pending)))
        if isinstance(world.pending[name], BringIn):
            if name in world.dead:
                world.fail(name)
            elif self.unknown:
                size = (world.specs[name].memory_bytes or 2) + surprise
                world.ready(name, size, seconds=seconds)
            else:
                world.ready(name, seconds=seconds)
        else:
            tier = data.draw(st.sampled_from([Tier.DISK, Tier.HOST, Tier.NONE]))
            world.left(name, tier, seconds=seconds, cache_kept=data.draw(st.booleans()))

    @rule(seconds=st.sampled_from([0.0, 11.0, 60.0]))
    def everything_succeeds_for_a_while(self, seconds: float) -> None:
        for _ in range(4):
            for name in sorted(self.world.pending):
                if name in self.world.dead:
                    self.world.fail(name)
                elif name in self.world.pending:
                    self.world.succeed(name)
            self.world.advance(seconds)

    @rule(seconds=st.sampled_from([1.0, 60.0]), used=used)
    def all_is_quiet_for_a_while(self, seconds: float, used: Used | None) -> None:
        self.world.calm_down(seconds, used)

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data(), lost=st.booleans(), happens=seldom)
    def a_transition_fails(self, data: st.DataObject, lost: bool, happens: bool) -> None:
        world = self.world
        if not happens:
            return
        name = data.draw(st.sampled_from(sorted(world.pending)))
        what = world.pending[name]
        outcomes = [(S.FAILED, Tier.NONE)]
        if world.occupies(name):
            outcomes.append((S.FAILED, Tier.DEVICE))
        if isinstance(what, BringIn):
            outcomes.append((S.SWAPPED_OUT, Tier.DISK))
        elif not isinstance(what, StopEngine) and name not in world.dead:
            outcomes.append((S.READY, Tier.DEVICE))
        state, tier = data.draw(st.sampled_from(outcomes))
        world.fail(name, state, tier, lost=lost)

    @precondition(lambda self: self._leaving_alive())
    @rule(data=st.data())
    def a_swap_out_is_given_up(self, data: st.DataObject) -> None:
        self.world.ready(data.draw(st.sampled_from(self._leaving_alive())))

    @rule(name=names, happens=seldom)
    def an_engine_crashes(self, name: str, happens: bool) -> None:
        if not happens:
            return
        state = self.world.states[self.world.specs[name].name]  # type: ignore[index]
        if state not in {S.STOPPED, S.SWAPPED_OUT, S.FAILED}:
            self.world.crash(name)

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
        for _ in range(20):
            world.calm_down(30.0)
        left = {lease: world.leases[lease] for lease in world.live}
        assert not left, f"still there when all is quiet: {left}"
        assert not world.asked, f"commands never answered: {world.asked}"

    def _leaving_alive(self) -> list[str]:
        world = self.world
        return sorted(
            name
            for name in world.pending
            if world.states[name] is S.SWAPPING_OUT and name not in world.dead
        )


def test_promises_hold_in_random_worlds() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=int(os.environ.get("SWAPSERVE_EXAMPLES", "400")),
            stateful_step_count=60,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
