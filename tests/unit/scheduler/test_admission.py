"""Who is let in to wait, for how long, and what is foretold to those who are not."""

import pytest

from swapserve.errors import (
    AdmissionError,
    DeadlineUnmeetable,
    EngineUnavailable,
    QueueFull,
    QueueTimeout,
)
from swapserve.ids import EngineName, LeaseId
from swapserve.messages import BringIn, SwapOut
from swapserve.states import LeaseState, Priority
from tests.stateful.traffic import taught
from tests.stateful.world import World, engine

L = LeaseState
A, B = EngineName("a"), EngineName("b")
SWAP = 4.0


def world_of_two(policy: str = "lru", **options: float | None) -> World:
    """Return engines a and b, of which one has room, and which take four seconds each way."""
    known = taught("ab", SWAP)
    return World(engine("a"), engine("b"), policy=policy, knowledge=known, **options)  # type: ignore[arg-type]


def refusal(world: World, name: str, **how: float) -> AdmissionError:
    error = world.error(world.request(name, **how))  # type: ignore[arg-type]
    assert isinstance(error, AdmissionError)
    return error


def busy(world: World, name: str) -> LeaseId:
    lease = world.request(name)
    world.settle()
    return lease


# ---------------------------------------------------------------------- limits


def test_an_engines_own_limit_counts_instead_of_the_general_one() -> None:
    world = World(engine("a", queue_limit=1), engine("b"), queue_limit=2)
    world.request("a")
    assert isinstance(refusal(world, "a"), QueueFull)
    world.request("b")
    world.request("b")
    assert isinstance(refusal(world, "b"), QueueFull)


def test_the_total_limit_counts_who_waits_for_any_engine() -> None:
    world = World(engine("a"), engine("b"), engine("c"), queue_limit_total=2)
    first = world.request("a")
    second = world.request("b")
    error = refusal(world, "c")
    assert isinstance(error, QueueFull)
    assert error.total
    world.ready("a")
    assert world.state(first) is L.ACTIVE
    third = world.request("c")
    assert world.state(third) is L.WAITING, "one of those who waited is served"
    world.end(second)
    assert world.error(world.request("c")) is None, "another has left"
    assert isinstance(refusal(world, "c"), QueueFull)


def test_who_was_refused_does_not_count_as_waiting() -> None:
    world = World(engine("a"), engine("b"), queue_limit_total=2, queue_timeout=10.0)
    for _ in range(5):
        world.request("a")
        world.request("a")
        world.advance(10.0)
    world.fail("a")
    assert not world.live
    world.request("b")
    assert world.error(world.request("b")) is None


def test_a_full_queue_tells_when_to_come_again() -> None:
    world = world_of_two(queue_limit=1)
    world.request("a")
    error = refusal(world, "a")
    assert error.retry_after_s == world.core.predicted_wait(A) == SWAP
    world.advance(1.0)
    assert refusal(world, "a").retry_after_s == SWAP - 1.0


def test_who_waited_too_long_is_told_when_to_come_again() -> None:
    world = world_of_two(queue_timeout=10.0, quantum=60.0)
    world.request("a")
    world.settle()
    waiter = world.request("b")
    world.advance(9.9)
    assert world.state(waiter) is L.WAITING
    world.advance(0.1)
    error = world.error(waiter)
    assert isinstance(error, QueueTimeout)
    assert error.retry_after_s is not None
    assert error.retry_after_s >= 2 * SWAP


def test_an_engine_that_failed_says_when_it_is_tried_again() -> None:
    world = world_of_two(backoff=8.0)
    world.request("a")
    world.fail("a")
    world.advance(3.0)
    error = world.error(world.request("a"))
    assert isinstance(error, EngineUnavailable)
    assert error.retry_after_s == pytest.approx(5.0)


# ------------------------------------------------------------------- deadlines


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    world = world_of_two()
    error = refusal(world, "a", deadline=SWAP - 0.5)
    assert isinstance(error, DeadlineUnmeetable)
    assert SWAP < error.predicted_s < SWAP + 1.0
    assert error.retry_after_s == SWAP
    assert world.transitions() == []
    patient = world.request("a", deadline=SWAP + 1.0)
    assert world.state(patient) is L.WAITING


def test_a_deadline_is_no_matter_where_the_engine_is_ready() -> None:
    world = world_of_two()
    world.request("a")
    world.settle()
    assert world.state(world.request("a", deadline=0.0)) is L.ACTIVE


def test_a_deadline_counts_the_way_of_the_engine_under_way() -> None:
    world = world_of_two()
    world.request("a")
    world.advance(3.0)
    assert isinstance(refusal(world, "a", deadline=0.9), DeadlineUnmeetable)
    in_time = world.request("a", deadline=1.5)
    world.advance(1.0)
    world.ready("a")
    assert world.state(in_time) is L.ACTIVE


def test_a_deadline_counts_older_wishes_and_who_has_to_leave() -> None:
    world = World(*(engine(name, 10) for name in "abc"), knowledge=taught("abc", SWAP))
    world.end(busy(world, "a"))
    world.request("b")  # out 4, in 4
    assert isinstance(refusal(world, "c", deadline=3 * SWAP), DeadlineUnmeetable)
    assert world.state(world.request("c", deadline=5 * SWAP)) is L.WAITING


def test_who_waits_is_refused_as_soon_as_the_deadline_is_certain_to_pass() -> None:
    """By the timer, and before the deadline: then there is still time to ask elsewhere."""
    world = world_of_two(quantum=100.0)
    busy(world, "a")  # expected to be done soon, but it is not
    waiter = world.request("b", deadline=40.0)
    least = SWAP + world.core.knowledge.service.first_s(B, world.leases[waiter].ask)
    world.advance(40.0 - least - 0.01)
    assert world.state(waiter) is L.WAITING
    world.advance(0.01)
    assert isinstance(world.error(waiter), DeadlineUnmeetable)
    world.advance(1000.0)
    assert world.of(SwapOut) == [], "nobody leaves for who is gone"


def test_who_has_a_deadline_is_served_if_the_engine_comes_in_time() -> None:
    world = world_of_two()
    waiter = world.request("a", deadline=SWAP + 2.0)
    for _ in range(4):
        world.advance(SWAP / 4)
        assert world.state(waiter) is L.WAITING
    world.ready("a")
    assert world.state(waiter) is L.ACTIVE
    world.advance(1000.0)
    assert world.state(waiter) is L.ACTIVE, "a deadline is for the first token"


def test_a_deadline_is_looked_at_again_while_the_engine_is_late() -> None:
    world = world_of_two()
    waiter = world.request("a", deadline=SWAP + 3.0)
    world.advance(SWAP + 4.0)
    assert isinstance(world.error(waiter), DeadlineUnmeetable)
    assert world.of(BringIn) == ["a"]
    world.ready("a")


def test_deadlines_do_not_end_the_wait_of_others() -> None:
    world = world_of_two(quantum=20.0)
    busy(world, "a")
    hasty = world.request("b", deadline=15.0)
    patient = world.request("b")
    world.advance(15.0)
    assert world.error(hasty) is not None
    world.advance(5.0)
    world.settle()
    assert world.state(patient) is L.ACTIVE


# ------------------------------------------------------------- predicted waits


def test_the_wait_for_a_ready_engine_is_none() -> None:
    world = world_of_two()
    busy(world, "a")
    assert world.core.predicted_wait(A) == 0.0


def test_the_wait_for_an_engine_that_leaves_is_the_way_there_and_back() -> None:
    world = world_of_two()
    world.end(busy(world, "a"))
    world.request("b")
    assert world.core.predicted_wait(A) == pytest.approx(2 * SWAP)
    world.advance(1.0)
    world.command("pin", "b")
    assert world.core.predicted_wait(A) == pytest.approx(2 * SWAP - 1.0)


def test_the_wait_behind_a_busy_engine_is_until_it_is_done_or_cut_off() -> None:
    world = world_of_two(quantum=2.0)
    busy(world, "a")
    world.request("b")
    assert world.core.predicted_wait(B) == pytest.approx(2.0 + 2 * SWAP), "cut off"
    world = world_of_two(quantum=500.0, max_wait=400.0)
    lease = busy(world, "a")
    world.request("b")
    ask = world.leases[lease].ask
    done = world.core.knowledge.service.remaining(A, ask, 0.0).p50_s
    assert done < 100.0
    assert world.core.predicted_wait(B) == pytest.approx(done + 2 * SWAP)


@pytest.mark.parametrize("policy", ["lru-drain", "fifo-drain"])
def test_the_wait_for_a_draining_engine_is_not_none(policy: str) -> None:
    world = world_of_two(policy)
    busy(world, "a")
    world.request("b")
    late = world.request("a")
    assert world.state(late) is L.WAITING
    assert world.core.predicted_wait(A) >= 2 * SWAP
    assert isinstance(refusal(world, "a", deadline=1.0), DeadlineUnmeetable)


def test_the_wait_for_a_slot_grows_with_the_queue_and_shrinks_with_the_slots() -> None:
    waits = []
    for slots in (1, 2):
        world = World(engine("a", slots=slots))
        busy(world, "a")
        for _ in range(5):
            world.request("a", Priority.BATCH)
        shorter = world.core.predicted_wait(A)
        for _ in range(5):
            world.request("a", Priority.BATCH)
        waits.append(world.core.predicted_wait(A))
        assert 0.0 < shorter < waits[-1]
    assert waits[0] > 1.5 * waits[1]


def test_the_wait_for_an_engine_in_a_pause_counts_the_pause() -> None:
    world = world_of_two(backoff=8.0)
    world.request("a")
    world.refuse("a")
    assert world.core.predicted_wait(A) == pytest.approx(8.0 + SWAP)
