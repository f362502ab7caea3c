"""Slots and priorities: who of those that wait for one engine, or for several, goes first."""

import pytest

from swapserve.ids import EngineName, LeaseId
from swapserve.messages import GrantLease
from swapserve.scheduler.policies.registry import POLICIES
from swapserve.states import EngineState, LeaseState, Priority
from tests.stateful.traffic import taught
from tests.stateful.world import World, engine

L = LeaseState
S = EngineState
A = EngineName("a")
URGENT, INTERACTIVE, BATCH = Priority
every_policy = pytest.mark.parametrize("policy", POLICIES)


def states(world: World, *leases: LeaseId) -> list[LeaseState]:
    return [world.state(lease) for lease in leases]


@every_policy
def test_no_more_requests_are_inside_than_the_engine_has_slots(policy: str) -> None:
    world = World(engine("a", slots=2), policy=policy)
    leases = [world.request("a") for _ in range(4)]
    world.settle()
    assert states(world, *leases) == [L.ACTIVE, L.ACTIVE, L.WAITING, L.WAITING]
    world.end(leases[1])
    assert states(world, leases[2], leases[3]) == [L.ACTIVE, L.WAITING]
    world.end(leases[0])
    world.end(leases[2])
    assert world.state(leases[3]) is L.ACTIVE
    assert world.state(world.request("a")) is L.ACTIVE


def test_a_new_request_does_not_overtake_those_who_wait_for_a_slot() -> None:
    world = World(engine("a", slots=1))
    first, second, third = (world.request("a") for _ in range(3))
    world.settle()
    world.end(second)
    world.end(first)
    assert world.state(third) is L.ACTIVE
    assert world.state(world.request("a")) is L.WAITING


@every_policy
def test_the_more_urgent_goes_first_and_the_older_among_equals(policy: str) -> None:
    world = World(engine("a", slots=1), policy=policy)
    running = world.request("a")
    world.settle()
    waiting = [
        world.request("a", one) for one in (BATCH, INTERACTIVE, URGENT, BATCH, INTERACTIVE, URGENT)
    ]
    world.end(running)
    for _ in waiting:
        world.end(world.on("a", L.ACTIVE)[0])
    order = [effect.lease for effect in world.log if isinstance(effect, GrantLease)][1:]
    assert order == [waiting[i] for i in (2, 5, 1, 4, 0, 3)]


@every_policy
def test_priority_counts_when_the_engine_comes_in_too(policy: str) -> None:
    world = World(engine("a", slots=1), policy=policy)
    batch, person = world.request("a", BATCH), world.request("a", INTERACTIVE)
    world.settle()
    assert states(world, batch, person) == [L.WAITING, L.ACTIVE]


@every_policy
def test_who_is_over_age_goes_before_who_is_urgent(policy: str) -> None:
    world = World(engine("a", slots=1), policy=policy, max_wait=30.0)
    running = world.request("a")
    world.settle()
    batch = world.request("a", BATCH)
    world.advance(29.0)
    urgent = world.request("a", URGENT)
    world.advance(1.0)
    world.end(running)
    assert states(world, batch, urgent) == [L.ACTIVE, L.WAITING]


def test_requests_that_were_suspended_have_their_slots_back_before_others() -> None:
    world = World(engine("a", slots=1), engine("b"))
    stream = world.request("a", BATCH)
    world.settle()
    urgent = world.request("a", URGENT)
    other = world.request("b")
    world.advance(10.0)
    world.settle()
    world.end(other)
    world.settle()
    assert states(world, stream, urgent) == [L.ACTIVE, L.WAITING]
    world.end(stream)
    assert world.state(urgent) is L.ACTIVE


def test_the_end_of_a_suspended_request_leaves_its_slot_to_the_next() -> None:
    world = World(engine("a", slots=1), engine("b"))
    stream = world.request("a")
    world.settle()
    waiter = world.request("a")
    other = world.request("b")
    world.advance(10.0)
    world.settle()
    world.end(stream)
    world.end(other)
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_an_engine_that_was_idle_for_want_of_room_in_its_queue_is_none() -> None:
    """Somebody waits for a slot: the engine is busy, and its quantum counts."""
    world = World(engine("a", slots=1), engine("b"))
    first = world.request("a")
    second = world.request("a")
    world.settle()
    world.request("b")
    world.end(first)
    assert world.transitions() == ["in a"]
    assert world.state(second) is L.ACTIVE
    world.advance(10.0)
    assert world.transitions() == ["in a", "out a"]


def test_a_drain_grants_no_slot_and_when_it_is_taken_back_it_does() -> None:
    world = World(engine("a", slots=1), engine("b"), policy="lru-drain")
    first = world.request("a")
    world.settle()
    other = world.request("b")
    waiter, later = world.request("a"), world.request("a")
    assert world.states[A] is S.DRAINING
    world.end(other)
    assert states(world, first, waiter, later) == [L.ACTIVE, L.WAITING, L.WAITING]
    world.end(first)
    assert states(world, waiter, later) == [L.ACTIVE, L.WAITING]


def test_queued_tells_who_waits_by_priority() -> None:
    world = World(engine("a"))
    for priority in (BATCH, BATCH, URGENT):
        world.request("a", priority)
    assert world.core.queued(A) == {URGENT: 1, INTERACTIVE: 0, BATCH: 2}


# ------------------------------------------------------------ between engines


def test_adaptive_brings_in_whom_people_want_before_batch_work() -> None:
    world = three("adaptive")
    running = resident(world, "c")
    world.request("a", BATCH)
    world.advance(0.1)
    world.request("b", INTERACTIVE)
    world.end(running)
    world.left("c")
    assert world.transitions() == ["in c", "out c", "in b"]


def test_adaptive_brings_in_batch_work_that_is_over_age_before_people() -> None:
    world = three("adaptive")
    running = resident(world, "c")
    world.request("a", BATCH)
    world.now += world.rules.max_wait_s  # nobody looks meanwhile
    world.request("b", INTERACTIVE)
    world.end(running)
    world.left("c")
    assert world.transitions() == ["in c", "out c", "in a"]


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo-drain", "lru-drain"])
def test_others_bring_in_the_oldest_wish_whatever_its_priority(policy: str) -> None:
    world = three(policy)
    running = resident(world, "c")
    world.request("a", BATCH)
    world.advance(0.1)
    world.request("b", INTERACTIVE)
    world.end(running)
    world.left("c")
    assert world.transitions() == ["in c", "out c", "in a"]


def three(policy: str) -> World:
    """Return engines of which each takes the whole device, with swaps of half a second."""
    specs = (engine(name, 10) for name in "abc")
    return World(*specs, policy=policy, quantum=None, knowledge=taught("abc", 0.5))


# --------------------------------------------------------------- least residence


@pytest.mark.parametrize("policy", [name for name, kind in POLICIES.items() if kind.swaps])
def test_an_engine_stays_for_its_least_residence_though_it_is_idle(policy: str) -> None:
    world = World(engine("a", min_resident=20.0), engine("b"), policy=policy, quantum=1.0)
    world.advance(5.0)
    world.end(resident(world, "a"))
    world.advance(5.0)
    waiter = world.request("b")
    world.advance(14.9)
    assert world.transitions() == ["in a"]
    world.advance(0.1)
    assert world.transitions() == ["in a", "out a"]
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_who_has_waited_for_max_wait_ends_the_least_residence() -> None:
    world = World(engine("a", min_resident=500.0), engine("b"), max_wait=30.0)
    world.end(resident(world, "a"))
    world.request("b")
    world.advance(29.9)
    assert world.transitions() == ["in a"]
    world.advance(0.1)
    assert world.transitions() == ["in a", "out a"]


def resident(world: World, name: str) -> LeaseId:
    lease = world.request(name)
    world.settle()
    return lease
