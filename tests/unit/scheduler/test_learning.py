"""What the core tells its knowledge, and what it does with who left, or comes half the way."""

import pytest

from swapserve.errors import IllegalTransition
from swapserve.ids import EngineName
from swapserve.messages import Ask, BringIn, EngineReady, Used
from swapserve.states import EngineState, LeaseState, Tier
from tests.stateful.world import World, engine
from tests.unit.scheduler.test_ahead import machine

L = LeaseState
S = EngineState
A, B = EngineName("a"), EngineName("b")


def busy(world: World, name: str) -> None:
    world.request(name)
    world.settle()


# ---------------------------------------------------------------------- learnt


def test_time_in_suspension_is_no_time_of_the_request() -> None:
    world = World(engine("a"))
    lease = world.request("a")
    world.settle()
    world.advance(8.0)
    world.command("swap_out", "a")
    world.advance(500.0)
    world.left("a")
    world.advance(500.0)
    world.settle()
    world.advance(2.0)
    used = Used(tokens_in=1.0, tokens_out=101.0, prefill_s=None, decode_s=None)
    world.end(lease, used)
    assert world.core.knowledge.service.itl_s(A) == pytest.approx(0.1, rel=0.01)


def test_a_request_whose_client_left_teaches_nothing() -> None:
    world = World(engine("a"))
    busy(world, "a")
    before = world.core.knowledge.service.as_json()
    for lease in world.on("a", L.ACTIVE):
        world.end(lease)
    assert world.core.knowledge.service.as_json() == before


def test_swaps_with_requests_in_flight_are_learnt_apart() -> None:
    world = World(engine("a"))
    busy(world, "a")
    world.command("swap_out", "a")
    world.left("a", Tier.DISK, seconds=9.0)
    world.advance(10.0)
    world.ready("a", seconds=7.0)
    for lease in world.on("a", L.ACTIVE):
        world.end(lease)
    world.command("swap_out", "a")
    world.left("a", Tier.DISK, seconds=2.0)
    world.command("swap_in", "a")
    world.ready("a", seconds=3.0)
    costs = world.core.knowledge.costs
    assert [costs.out_s(A, Tier.DISK, busy=flag) for flag in (True, False)] == [9.0, 2.0]
    assert [costs.in_s(A, Tier.DISK, busy=flag) for flag in (True, False)] == [7.0, 3.0]


@pytest.mark.parametrize("kept", [False, True])
def test_a_cache_that_was_not_kept_is_worth_nothing(kept: bool) -> None:
    world = World(engine("a"))
    lease = world.request("a", ask=Ask(conversation=7))
    world.settle()
    world.end(lease, Used(tokens_in=5000.0, tokens_out=50.0, prefill_s=4.0, decode_s=2.0))
    worth = world.core.knowledge.caches.worth_s
    assert worth(A, world.now) > 0.0
    world.command("swap_out", "a")
    world.left("a", Tier.DISK, cache_kept=kept)
    assert (worth(A, world.now) > 0.0) is kept


# ------------------------------------------------------- who has left, or comes


def test_a_suspended_request_that_ends_lets_younger_wishes_go_on() -> None:
    world = World(engine("a", 6), engine("b", 6), engine("c", 4), quantum=100.0, max_wait=500.0)
    stream = world.request("a")
    world.settle()
    world.command("swap_out", "a")
    world.left("a")
    world.advance(50.0)
    busy(world, "b")
    world.advance(60.0)  # a is held out no longer, and waits for the end of b's quantum
    younger = world.request("c")
    assert world.transitions()[-1] == "in b"
    world.end(stream)
    assert world.transitions()[-1] == "in c"
    world.settle()
    assert world.state(younger) is L.ACTIVE


def test_those_for_whom_an_engine_came_are_forgotten_when_it_is_swapped_out() -> None:
    """Else nobody who is over age could ever end its quantum again."""
    world = World(engine("a"), engine("b"), quantum=400.0, max_wait=30.0)
    caller = world.request("a")
    world.settle()
    world.command("swap_out", "a")
    world.left("a")
    world.command("swap_in", "a")
    world.ready("a")
    assert world.state(caller) is L.ACTIVE
    world.request("a")
    world.end(caller)
    world.request("b")
    world.advance(29.9)
    assert world.transitions()[-1] == "in a"
    world.advance(0.1)
    assert world.transitions()[-1] == "out a"


def half_way() -> World:
    """Return a world in which b is on the way from disk to RAM, and a has the GPU."""
    world = machine(10, 6, tiers={"a": Tier.DEVICE})
    assert [(e.engine, e.to) for e in world.log if isinstance(e, BringIn)] == [("b", Tier.HOST)]
    return world


def test_one_that_comes_half_the_way_takes_no_turn_on_its_gpu() -> None:
    world = half_way()
    world.command("swap_out", "a")
    assert world.transitions() == ["in b", "out a"]


def test_one_that_was_to_come_half_the_way_does_not_serve() -> None:
    world = half_way()
    with pytest.raises(IllegalTransition):
        world.core.handle(EngineReady(engine=B, footprint={}, seconds=1.0), world.now)


def test_a_command_to_bring_it_in_is_not_answered_half_the_way() -> None:
    world = half_way()
    command = world.command("swap_in", "b")
    world.left("b")
    assert command in world.asked
    world.settle()
    assert world.outcomes[command] is None
    assert world.core.state(B) is S.READY
