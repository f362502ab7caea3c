"""What each of the simple policies decides, in small worlds around the real core."""

import pytest

from swapserve.ids import LeaseId
from swapserve.messages import Drain
from swapserve.scheduler.plugins import load_policy
from swapserve.scheduler.policies.registry import POLICIES
from swapserve.scheduler.policies.static import Static
from swapserve.states import LeaseState
from tests.stateful.world import World, engine

L = LeaseState
SIMPLE = [name for name in POLICIES if name != "adaptive"]
SWAPPING = [name for name in SIMPLE if name != "static"]
CUTTING = ["lru", "lfu"]
DRAINING = ["lru-drain", "fifo-drain"]


def world_of(policy: str, *specs: object, **rules: object) -> World:
    """Return a world with room for ten bytes; quantum 10 s, `max_wait` 30 s."""
    return World(*specs, policy=load_policy(policy), **rules)  # type: ignore[arg-type]


def resident(world: World, *names: str) -> None:
    """Use each engine once, a second apart."""
    for name in names:
        lease = world.request(name)
        world.settle()
        world.advance(1.0)
        world.end(lease)


def busy(world: World, name: str) -> LeaseId:
    lease = world.request(name)
    world.settle()
    assert world.state(lease) is L.ACTIVE
    return lease


# -------------------------------------------------------------- all of them


@pytest.mark.parametrize("policy", SIMPLE)
def test_engines_that_fit_stay_together(policy: str) -> None:
    world = world_of(policy, engine("a", 4), engine("b", 6))
    resident(world, "a", "b", "a", "b")
    assert world.transitions() == ["in a", "in b"]


@pytest.mark.parametrize("policy", SIMPLE)
def test_a_pinned_engine_stays(policy: str) -> None:
    world = world_of(policy, engine("a", 4, pin=True), engine("b", 4), engine("c", 4))
    resident(world, "a", "b")
    world.request("c")
    world.advance(100.0)
    assert "out a" not in world.transitions()


@pytest.mark.parametrize("policy", SWAPPING)
def test_an_idle_engine_leaves_at_once(policy: str) -> None:
    world = world_of(policy, engine("a"), engine("b"))
    resident(world, "a")
    lease = busy(world, "b")
    assert world.transitions() == ["in a", "out a", "in b"]
    assert world.state(lease) is L.ACTIVE


@pytest.mark.parametrize("policy", SWAPPING)
def test_who_waits_longest_is_served_first_among_equals(policy: str) -> None:
    world = world_of(policy, engine("a"), engine("b"), engine("c"))
    lease = busy(world, "a")
    world.request("c")
    world.advance(0.5)
    world.request("b")
    world.end(lease)
    world.settle()
    assert world.transitions()[1:3] == ["out a", "in c"]


@pytest.mark.parametrize("policy", SWAPPING)
def test_an_engine_stays_for_min_resident_unless_somebody_has_waited_for_max_wait(
    policy: str,
) -> None:
    world = world_of(policy, engine("a", min_resident=20.0), engine("b", min_resident=1e6))
    resident(world, "a")
    world.request("b")
    world.advance(18.9)
    assert world.transitions() == ["in a"]
    world.advance(0.1)
    assert world.transitions() == ["in a", "out a"]
    world.settle()
    world.end(world.on("b", L.ACTIVE)[0])
    world.request("a")
    world.advance(29.9)
    assert world.transitions() == ["in a", "out a", "in b"]
    world.advance(0.1)
    assert world.transitions() == ["in a", "out a", "in b", "out b"]


# --------------------------------------------------------- who leaves first


@pytest.mark.parametrize(
    ("policy", "leaves"),
    [
        ("lru", "b"),  # a and c were used after it
        ("lfu", "c"),  # used twice, the others three times and more
        ("lru-drain", "b"),
        ("fifo-drain", "a"),  # came in first
        ("time-slice-drain", "b"),
    ],
)
def test_which_idle_engine_leaves(policy: str, leaves: str) -> None:
    world = world_of(policy, engine("a", 3), engine("b", 3), engine("c", 3), engine("d", 3))
    for name in ("a", "b", "c", "b", "b", "b", "a", "a", "c"):
        resident(world, name)
    world.request("d")
    assert world.transitions() == ["in a", "in b", "in c", f"out {leaves}"]


def test_what_was_popular_long_ago_does_not_stay_for_ever_with_lfu() -> None:
    world = world_of("lfu", engine("a", 4), engine("b", 4), engine("c", 4))
    resident(world, *("a",) * 20)
    world.advance(100_000.0)
    resident(world, "b", "b", "b")
    world.request("c")
    assert world.transitions()[-1] == "out a"


@pytest.mark.parametrize("policy", ["lru", "lfu", "lru-drain", "time-slice-drain"])
def test_an_idle_engine_leaves_before_a_busy_one_that_came_in_earlier(policy: str) -> None:
    world = world_of(policy, engine("a", 5), engine("b", 5), engine("c", 5))
    busy(world, "a")
    resident(world, "b")
    world.advance(100.0)
    world.request("c")
    assert world.transitions()[-1] == "out b"


# ------------------------------------------------------------- lru and lfu


@pytest.mark.parametrize("policy", CUTTING)
@pytest.mark.parametrize(("quantum", "runs"), [(None, 10.0), (3.0, 3.0)])
def test_a_busy_engine_is_cut_off_after_its_quantum(
    policy: str, quantum: float | None, runs: float
) -> None:
    world = world_of(policy, engine("a"), engine("b"), quantum=quantum)
    lease = busy(world, "a")
    world.request("b")
    world.advance(runs - 0.1)
    assert world.state(lease) is L.ACTIVE
    world.advance(0.1)
    assert world.state(lease) is L.SUSPENDED
    assert world.transitions()[1:] == ["out a"]


@pytest.mark.parametrize("policy", CUTTING)
def test_over_age_ends_the_quantum_only_when_the_callers_are_served(policy: str) -> None:
    world = world_of(policy, engine("a"), engine("b"), max_wait=2.0)
    caller = busy(world, "a")
    later = busy(world, "a")
    world.request("b")
    world.advance(5.0)
    assert world.state(later) is L.ACTIVE
    world.end(caller)
    assert world.state(later) is L.SUSPENDED


@pytest.mark.parametrize("policy", CUTTING)
def test_min_resident_is_longer_than_the_quantum_but_not_than_max_wait(policy: str) -> None:
    world = world_of(policy, engine("a", min_resident=1000.0), engine("b"))
    lease = busy(world, "a")
    world.request("b")
    world.advance(29.9)
    assert world.state(lease) is L.ACTIVE
    world.advance(0.1)
    assert world.state(lease) is L.SUSPENDED


# --------------------------------------------------- lru-drain, fifo-drain


@pytest.mark.parametrize("policy", DRAINING)
def test_a_busy_engine_drains_at_once_and_is_never_cut_off(policy: str) -> None:
    world = world_of(policy, engine("a"), engine("b"), queue_timeout=1e6)
    lease = busy(world, "a")
    waiter = world.request("b")
    assert world.of(Drain) == ["a"]
    late = world.request("a")
    world.advance(10_000.0)
    assert world.state(lease) is L.ACTIVE
    assert world.state(late) is L.WAITING, "nothing new is begun on it"
    world.end(lease)
    world.settle()
    assert world.transitions()[1:3] == ["out a", "in b"]
    assert world.state(waiter) is L.ACTIVE


def test_alternating_requests_cost_a_swap_each_with_fifo_drain() -> None:
    world = world_of("fifo-drain", engine("a"), engine("b"))
    for name in ("a", "b") * 5:
        resident(world, name)
    assert world.transitions().count("in a") + world.transitions().count("in b") == 10


def test_the_engine_that_drains_is_not_changed_for_another_that_came_in_later() -> None:
    world = world_of("fifo-drain", engine("a", 5), engine("b", 5), engine("c", 5))
    first, second = busy(world, "a"), busy(world, "b")
    world.request("c")
    world.end(second)  # idle, and stays: a was there before
    assert world.of(Drain) == ["a"]
    assert world.transitions() == ["in a", "in b"]
    world.end(first)
    assert world.transitions() == ["in a", "in b", "out a"]


def test_a_drain_does_not_move_on_to_who_has_been_busy_longer_but_may_leave_only_now() -> None:
    world = world_of(
        "lru-drain", engine("a", 5, min_resident=50.0), engine("b", 5), engine("c", 5), max_wait=1e3
    )
    busy(world, "a")
    world.advance(1.0)
    busy(world, "b")
    world.request("c")
    assert world.of(Drain) == ["b"]
    world.advance(60.0)
    world.request("c")
    world.command("pin", "c")  # something happens, and it is all planned anew
    assert world.of(Drain) == ["b"]


# ------------------------------------------------------- time-slice-drain


def test_a_busy_engine_is_left_alone_until_somebody_is_over_age() -> None:
    world = world_of("time-slice-drain", engine("a"), engine("b"))
    lease = busy(world, "a")
    world.request("b")
    world.advance(29.9)
    late = world.request("a")
    assert world.state(late) is L.ACTIVE, "it works on its own queue"
    assert world.of(Drain) == []
    world.advance(0.1)
    assert world.of(Drain) == ["a"]
    world.advance(300.0)
    assert world.state(lease) is L.ACTIVE, "never in mid-request"
    world.end(lease)
    world.end(late)
    world.settle()
    assert world.transitions() == ["in a", "out a", "in b"]


def test_the_deepest_queue_comes_next() -> None:
    world = world_of("time-slice-drain", engine("a"), engine("b"), engine("c"))
    lease = busy(world, "a")
    world.request("b")
    world.advance(1.0)
    for _ in range(3):
        world.request("c")
    world.end(lease)
    world.settle()
    assert world.transitions() == ["in a", "out a", "in c"]


def test_the_over_age_come_before_the_deepest_queue() -> None:
    world = world_of("time-slice-drain", engine("a"), engine("b"), engine("c"))
    lease = busy(world, "a")
    world.request("b")
    world.advance(29.0)
    for _ in range(3):
        world.request("c")
    world.advance(1.0)
    world.end(lease)
    world.settle()
    assert world.transitions()[:3] == ["in a", "out a", "in b"]


def test_staleness_is_seen_by_a_timer_and_not_by_the_next_arrival() -> None:
    """The deep queue is first in the order, so the timer must know of the other's age, too."""
    world = world_of(
        "time-slice-drain", engine("a"), engine("b"), engine("c"), engine("d"), queue_timeout=1e6
    )
    busy(world, "a")
    world.request("b")
    world.advance(20.0)
    for _ in range(3):
        world.request("c")
    world.request("d")
    world.advance(9.9)
    assert world.of(Drain) == []
    world.advance(0.1)
    assert world.of(Drain) == ["a"]


def test_a_device_in_debt_waits_for_nobody_s_age() -> None:
    world = world_of("time-slice-drain", engine("a", 5), engine("b", 5))
    busy(world, "a")
    busy(world, "b")
    world.measure("b", 7)
    assert world.of(Drain) == ["a"]


def test_a_victim_that_never_leaves_sets_no_timer() -> None:
    class Stubborn(Static):
        swaps = True

    world = World(engine("a"), engine("b"), policy=Stubborn())
    paused = busy(world, "b")
    world.command("swap_out", "b")
    world.settle()
    resident(world, "a")
    world.advance(1000.0)
    assert world.state(paused) is L.SUSPENDED
    assert world.transitions() == ["in b", "out b", "in a"]
    assert world.timer is None


# ----------------------------------------------------------------- static


def test_nobody_leaves_for_another_with_static() -> None:
    world = world_of("static", engine("a"), engine("b"), queue_timeout=500.0)
    resident(world, "a")
    waiter = world.request("b")
    world.advance(499.0)
    assert world.transitions() == ["in a"]
    assert world.state(waiter) is L.WAITING
    world.advance(1.0)
    assert world.state(waiter) is L.ENDED


def test_an_operator_s_commands_work_with_static() -> None:
    world = world_of("static", engine("a"), engine("b"))
    resident(world, "a")
    waiter = world.request("b")
    world.command("swap_out", "a")
    world.settle()
    assert world.transitions() == ["in a", "out a", "in b"]
    assert world.state(waiter) is L.ACTIVE
