"""Changes after which somebody could wait for nothing, or be told a wrong wait."""

from swapserve.errors import DeadlineUnmeetable, EngineCrashed
from swapserve.ids import EngineName, LeaseId
from swapserve.messages import Ask, EngineExited, LeaseBegan, SwapOut
from swapserve.scheduler.demand import Engine
from swapserve.scheduler.order import hand_over
from swapserve.scheduler.policies.base import Wish
from swapserve.states import EngineState, LeaseState, Priority, Tier
from tests.stateful.traffic import taught
from tests.stateful.world import DEVICE, World, engine, gpu, host

L, S = LeaseState, EngineState
SWAP = 0.5
STREAM = Ask(streams=True)


def world_of_two(max_wait: float = 60.0) -> World:
    return World(
        engine("a", 10),
        engine("b", 10),
        policy="adaptive",
        quantum=None,
        max_wait=max_wait,
        knowledge=taught("ab", SWAP),
    )


def stream(world: World, name: str = "a") -> LeaseId:
    lease = world.request(name, ask=STREAM)
    world.settle()
    return lease


def test_an_engine_is_spared_until_its_streams_have_begun() -> None:
    world = world_of_two()
    slow = stream(world)
    world.request("b")
    world.advance(20.0)
    assert world.of(SwapOut) == []
    world.send(LeaseBegan(lease=slow))
    assert world.of(SwapOut) == ["a"]


def test_an_engine_that_never_begins_is_not_spared_beyond_max_wait() -> None:
    world = world_of_two(max_wait=30.0)
    stream(world)
    world.request("b")
    world.advance(30.0)
    assert world.of(SwapOut) == ["a"]


def test_the_end_of_a_stream_that_never_began_makes_a_plan() -> None:
    world = world_of_two()
    world.send(LeaseBegan(lease=stream(world)))
    silent = world.request("a", ask=STREAM)
    world.advance(5.0)
    world.request("b")
    world.advance(1.0)
    assert world.of(SwapOut) == []
    world.end(silent)
    assert world.of(SwapOut) == ["a"]


def test_a_beginning_may_cross_with_the_end() -> None:
    world = world_of_two()
    gone = stream(world)
    world.end(gone)
    world.send(LeaseBegan(lease=gone))
    assert world.core.counts(EngineName("a")) == (0, 0, 0)


def test_an_engine_in_ram_is_no_endless_wait_for_that_ram() -> None:
    world = World(
        engine("g", 6, device="g0", ram=DEVICE),
        engine("c", 6),
        devices=[host(10), gpu("g0")],
        policy="adaptive",
        quantum=None,
        knowledge=taught("gc", SWAP),
    )
    lease = world.request("g")
    world.settle()
    world.end(lease)
    world.command("swap_out", "g")
    world.settle()
    waiter = world.request("c", deadline=30.0)
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_nobody_is_refused_for_a_deadline_before_it_is_known_what_is_there() -> None:
    world = World(engine("a", 6), see=False)
    waiter = world.request("a", deadline=5.0)
    assert world.state(waiter) is L.WAITING
    world.see("a", S.READY, Tier.DEVICE, 6)
    assert world.state(waiter) is L.ACTIVE


def test_a_deadline_passes_even_if_nobody_knows_what_is_there() -> None:
    world = World(engine("a", 6), see=False)
    waiter = world.request("a", deadline=5.0)
    world.advance(10.0)
    assert isinstance(world.error(waiter), DeadlineUnmeetable)


def test_a_deadline_behind_another_request_makes_the_wish_more_pressing() -> None:
    world = World(
        *(engine(name, 10) for name in "abc"),
        policy="adaptive",
        quantum=None,
        knowledge=taught("abc", SWAP),
    )
    world.end(stream(world, "c"))
    world.request("b")  # c leaves
    world.request("a")
    hurried = world.request("a", deadline=4.0)
    world.left("c")
    world.ready("a")
    assert world.state(hurried) is L.ACTIVE


def test_what_came_another_way_teaches_nothing_of_the_first() -> None:
    world = world_of_two()
    world.see("a", S.SWAPPED_OUT, Tier.DISK)
    costs = world.core.knowledge.costs
    before = costs.in_s(EngineName("a"), Tier.DISK, busy=False)
    world.request("a")
    world.send(EngineExited(engine=EngineName("a"), error=EngineCrashed("a", "broken image")))
    world.ready("a", seconds=600.0)
    assert costs.in_s(EngineName("a"), Tier.DISK, busy=False) == before


def test_a_larger_engine_is_expected_to_take_longer() -> None:
    world = World(engine("small", 1 << 30), engine("large", 100 << 30), capacity=200 << 30)
    for name, size in (("small", 1 << 30), ("large", 100 << 30)):
        world.see(name, S.SWAPPED_OUT, Tier.DISK, size)
    costs = world.core.knowledge.costs
    small, large = (costs.in_s(EngineName(n), Tier.DISK, busy=False) for n in ("small", "large"))
    assert large > 2 * small


def test_ttl_does_not_go_over_min_resident() -> None:
    world = World(engine("a", 6, ttl=1.0, min_resident=100.0), engine("b", 6))
    lease = world.request("a")
    world.settle()
    world.end(lease)
    world.advance(50.0)
    assert world.of(SwapOut) == []
    world.advance(51.0)
    assert world.of(SwapOut) == ["a"]


def test_a_chain_of_hand_overs_keeps_its_order() -> None:
    x, y, z, w, v = (Engine(engine(name), index) for index, name in enumerate("xyzwv"))
    x.left_for, y.left_for = y, z
    wishes = [(one, Wish((0.0, 0), one)) for one in (x, y, w, z, v)]
    assert [one.name for one, _ in hand_over(wishes)] == ["w", "z", "y", "x", "v"]


def test_a_hand_over_ends_with_the_wish_of_the_other() -> None:
    world = world_of_two()
    begun = stream(world)
    world.send(LeaseBegan(lease=begun))
    world.advance(30.0)
    left = world.request("b", Priority.URGENT)
    assert world.of(SwapOut) == ["a"]
    world.end(left)
    world.settle()
    assert world.state(begun) is L.ACTIVE
