"""Operator commands: what each does, and that each is answered exactly once."""

from swapserve.errors import EngineUnavailable, ModelNotFound, SwapError
from swapserve.messages import SwapOut
from swapserve.states import EngineState, LeaseState, Tier
from tests.stateful.world import World, engine

L = LeaseState
S = EngineState


def test_swap_in_brings_an_engine_in_that_nobody_waits_for() -> None:
    world = World(engine("a"))
    command = world.command("swap_in", "a")
    assert command in world.asked
    world.settle()
    assert world.outcomes[command] is None
    again = world.command("swap_in", "a")
    assert world.outcomes[again] is None
    assert world.transitions() == ["in a"]


def test_swap_out_of_a_busy_engine_suspends_it_and_holds_it_out_for_a_quantum() -> None:
    world = World(engine("a"))
    stream = world.request("a")
    world.settle()
    command = world.command("swap_out", "a")
    assert world.state(stream) is L.SUSPENDED
    world.left("a")
    assert world.outcomes[command] is None
    world.advance(9.9)
    assert world.transitions() == ["in a", "out a"]
    world.advance(0.1)
    world.settle()
    assert world.state(stream) is L.ACTIVE


def test_swap_out_of_a_busy_engine_that_cannot_be_preempted_drains_it() -> None:
    world = World(engine("a"), can_preempt=False)
    stream = world.request("a")
    world.settle()
    command = world.command("swap_out", "a")
    assert world.of(SwapOut) == []
    world.end(stream)
    world.settle()
    assert world.outcomes[command] is None


def test_a_failed_swap_out_answers_the_command_and_the_leases_go_on() -> None:
    world = World(engine("a"))
    stream = world.request("a")
    world.settle()
    command = world.command("swap_out", "a")
    world.fail("a", S.READY, Tier.DEVICE)
    assert isinstance(world.outcomes[command], SwapError)
    assert world.state(stream) is L.ACTIVE


def test_stop_ends_every_lease_and_refuses_new_ones_until_start() -> None:
    world = World(engine("a"), engine("b"))
    running = world.request("a")
    world.settle()
    command = world.command("stop", "a")
    assert isinstance(world.error(running), EngineUnavailable)
    assert isinstance(world.error(world.request("a")), EngineUnavailable)
    world.settle()
    assert world.outcomes[command] is None
    assert isinstance(world.error(world.request("a")), EngineUnavailable)
    world.command("start", "a")
    lease = world.request("a")
    world.settle()
    assert world.state(lease) is L.ACTIVE


def test_an_engine_that_was_never_started_starts_on_demand() -> None:
    world = World(engine("a"))
    world.request("a")
    assert world.transitions() == ["in a"]


def test_a_command_that_conflicts_with_a_transition_waits_for_its_end() -> None:
    world = World(engine("a"))
    start = world.command("start", "a")
    stop = world.command("stop", "a")
    start_again = world.command("start", "a")
    assert set(world.asked) == {start, stop, start_again}
    world.settle()
    assert set(world.outcomes.values()) == {None}
    assert world.transitions() == ["in a", "stop a", "in a"]


def test_a_command_that_agrees_with_a_transition_is_answered_by_it() -> None:
    world = World(engine("a"))
    first, second = world.command("swap_in", "a"), world.command("start", "a")
    world.ready("a")
    assert world.outcomes == {first: None, second: None}


def test_a_later_command_takes_the_place_of_one_that_has_not_begun() -> None:
    world = World(engine("a"), engine("b"))
    world.request("a")
    world.settle()
    waiting = world.command("swap_in", "b")
    world.command("stop", "b")
    assert isinstance(world.outcomes[waiting], EngineUnavailable)


def test_a_command_for_an_unknown_engine_says_so() -> None:
    world = World(engine("a"))
    assert isinstance(world.outcomes[world.command("pin", "z")], ModelNotFound)


def test_a_command_given_before_its_engine_was_seen_waits() -> None:
    world = World(engine("a"), see=False)
    command = world.command("swap_in", "a")
    assert world.transitions() == []
    world.see("a")
    world.settle()
    assert world.outcomes[command] is None
