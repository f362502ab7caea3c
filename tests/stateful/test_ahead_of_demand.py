"""A machine with memory to spare: engines are brought nearer before they are asked for.

Nobody ever leaves for that, nobody waits longer for it, and it comes to an end.
"""

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

from swapserve.ids import EngineName
from swapserve.messages import BringIn, SwapOut, Used, Verb
from swapserve.states import EngineState, LeaseState, Tier
from tests.stateful.draws import seldom, used
from tests.stateful.traffic import taught
from tests.stateful.world import DEVICE, World, engine, gpu, host

S = EngineState
L = LeaseState
ON_GPU = ("a", "b", "c", "d")
NAMES = (*ON_GPU, "cpu")
names = st.sampled_from(NAMES)
VERBS: tuple[Verb, ...] = ("swap_in", "swap_out", "stop", "start", "pin", "unpin")


class Machine(RuleBasedStateMachine):
    """Requests that come and go, with quiet in between, for engines whose images are on disk."""

    world: World

    @initialize(
        sizes=st.lists(st.sampled_from([3, 6, 10]), min_size=4, max_size=4),
        ram=st.sampled_from([8, 15, 40]),
        ttl=st.sampled_from([None, 5.0]),
        policy=st.sampled_from(["adaptive", "lru", "fifo-drain"]),
        resident=st.booleans(),
    )
    def begin(
        self, *, sizes: list[int], ram: int, ttl: float | None, policy: str, resident: bool
    ) -> None:
        specs = [
            engine(name, size, device="g0", ram=DEVICE, ttl=ttl)
            for name, size in zip(ON_GPU, sizes, strict=True)
        ]
        self.world = World(
            *specs,
            engine("cpu", 6, ttl=ttl),
            devices=[host(ram), gpu("g0")],
            policy=policy,
            quantum=None,
            look_ahead=True,
            knowledge=taught(NAMES, 1.0),
            see=False,
        )
        # A promotion is worth its while: what is in RAM is back at once.
        for name in ON_GPU:
            self.world.core.knowledge.costs.came(EngineName(name), Tier.HOST, 0.1, busy=False)
        for name in ON_GPU:
            there = resident and name == "a"
            self.world.see(
                name, S.READY if there else S.SWAPPED_OUT, Tier.DEVICE if there else Tier.DISK
            )
        self.world.see("cpu")

    # ---------------------------------------------------------------- requests

    @rule(some=st.lists(names, min_size=1, max_size=2), used=used)
    def somebody_asks_and_is_answered(self, some: list[str], used: Used | None) -> None:
        for name in some:
            self.world.request(name)
        self.world.calm_down(1.0, used)

    @rule(some=st.lists(names, min_size=1, max_size=2))
    def somebody_asks(self, some: list[str]) -> None:
        for name in some:
            self.world.request(name)

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def somebody_is_answered_or_leaves(self, data: st.DataObject) -> None:
        self.world.end(data.draw(st.sampled_from(sorted(self.world.live))))

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    # ----------------------------------------------------------------- engines

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data(), to_disk=st.booleans(), kept=seldom)
    def a_transition_succeeds(self, data: st.DataObject, to_disk: bool, kept: bool) -> None:
        world = self.world
        name = data.draw(st.sampled_from(sorted(world.pending)))
        what = world.pending[name]
        if isinstance(what, BringIn) and name in world.dead:
            world.fail(name)
        elif isinstance(what, SwapOut) and name not in world.dead:
            may = not what.in_flight or what.to is Tier.DISK
            world.left(name, Tier.DISK if to_disk and may else None, cache_kept=kept)
        else:
            world.succeed(name)

    @precondition(lambda self: self._promoted())
    @rule(data=st.data(), outcome=st.sampled_from(["image gone", "stays", "dies", "dies later"]))
    def a_promotion_fails(self, data: st.DataObject, outcome: str) -> None:
        world = self.world
        name = data.draw(st.sampled_from(self._promoted()))
        if outcome == "image gone":
            world.fail(name, lost=bool(world.on(name, L.SUSPENDED)))
        elif outcome == "stays":
            world.fail(name, S.SWAPPED_OUT, Tier.DISK)
        else:
            world.crash(name)
            if outcome == "dies":
                world.fail(name)

    @rule(name=names, happens=seldom)
    def an_engine_crashes(self, name: str, happens: bool) -> None:
        key = EngineName(name)
        alive = self.world.tiers[key] in {Tier.DEVICE, Tier.HOST}
        if happens and alive and self.world.states[key] is not S.FAILED:
            self.world.crash(name)

    @rule(name=names, verb=st.sampled_from(VERBS), happens=seldom)
    def command(self, name: str, verb: Verb, happens: bool) -> None:
        if happens:
            self.world.command(verb, name)

    # --------------------------------------------------------------------- end

    def teardown(self) -> None:
        """Left alone, everybody is served; then engines come to rest."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for name in NAMES:
            world.command("unpin", name)
        for _ in range(6):
            world.calm_down(20.0)
        assert not world.live
        assert not world.asked
        before = len(world.transitions())
        for _ in range(4):
            world.calm_down(30.0)
        # Each may come nearer once more by steps, and leave again when its time to live is over.
        assert len(world.transitions()) - before <= 4 * len(NAMES), world.transitions()[before:]

    def _promoted(self) -> list[str]:
        world = self.world
        pending = world.pending.items()
        return sorted(
            name for name, what in pending if world.promotes(what) and name not in world.dead
        )


def test_promises_hold_ahead_of_demand() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=int(os.environ.get("SWAPSERVE_EXAMPLES", "150")),
            stateful_step_count=50,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
