"""Who is brought nearer before anybody asks, and who is left where it is."""

from dataclasses import replace

import pytest

from swapserve.errors import CriuError, CudaError
from swapserve.ids import DeviceName, EngineName
from swapserve.messages import BringIn, SwapOut
from swapserve.scheduler.ahead import HORIZON_S, LOOK_MAX_S, ahead
from swapserve.scheduler.knowledge import Knowledge
from swapserve.states import EngineState, LeaseState, Tier
from tests.stateful.world import DEVICE, World, engine, gpu, host

S = EngineState
L = LeaseState
START = 1000.0
G0 = DeviceName("g0")


def learnt(*names: str, every_s: float = 20.0, last: float = START - 1.0) -> Knowledge:
    """Return what is known after many requests for each, at that pace, up to a moment."""
    knowledge = Knowledge()
    times = [last - number * every_s for number in reversed(range(12))]
    for time in times:
        for name in names:
            knowledge.arrivals.arrived(EngineName(name), time)
    for name in names:
        costs = knowledge.costs
        for tier, seconds in ((Tier.HOST, 1.0), (Tier.DISK, 5.0), (Tier.NONE, 30.0)):
            costs.came(EngineName(name), tier, seconds, busy=False)
            costs.left(EngineName(name), tier, 1.0, busy=False)
    return knowledge


def machine(
    *sizes: int | None,
    tiers: dict[str, Tier] | None = None,
    knowledge: Knowledge | None = None,
    ram: int = 20,
    ttl: float | None = None,
    seen: bool = True,
    **options: object,
) -> World:
    """Return engines a, b, c ... on one GPU of 10, all of them on disk unless told otherwise."""
    names = "abcd"[: len(sizes)]
    specs = [
        engine(name, size, device="g0", ram=DEVICE, ttl=ttl)
        for name, size in zip(names, sizes, strict=True)
    ]
    known = learnt(*names) if knowledge is None else knowledge
    world = World(
        *specs,
        devices=[host(ram), gpu("g0")],
        knowledge=known,
        see=False,
        **{"look_ahead": True, **options},  # type: ignore[arg-type]
    )
    for name in names if seen else ():
        see(world, name, (tiers or {}).get(name, Tier.DISK))
    return world


def see(world: World, name: str, tier: Tier) -> None:
    """Report where an engine is as the daemon starts."""
    size = world.specs[EngineName(name)].memory_bytes or 0
    state = S.STOPPED if tier is Tier.NONE else S.READY if tier is Tier.DEVICE else S.SWAPPED_OUT
    world.see(name, state, tier, in_ram=size if tier is Tier.HOST else 0)


def brought(world: World) -> list[str]:
    """Return who was brought in so far, and how near."""
    return [f"{e.engine} {e.to}" for e in world.log if isinstance(e, BringIn)]


def wanted(world: World) -> list[str]:
    """Return who would be brought nearer now, best first."""
    board = world.core._board
    board.now = board.view.now = world.now
    return [f"{engine.name} {tier}" for engine, tier in ahead(board, board.view, 0)[0]]


# ------------------------------------------------------------------- who comes


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK, Tier.NONE])
def test_one_that_is_likely_to_be_asked_for_comes_onto_a_free_device(tier: Tier) -> None:
    world = machine(6, tiers={"a": tier})
    assert brought(world) == ["a device"]
    world.ready("a")
    lease = world.request("a")
    assert world.leases[lease].state is L.ACTIVE, "so nobody waits for it"


def test_one_that_nobody_has_ever_asked_for_stays() -> None:
    world = machine(6, knowledge=Knowledge())
    assert brought(world) == []
    assert world.timer is None, "and nobody looks again and again"


def test_one_that_is_hardly_ever_asked_for_stays() -> None:
    busy, rare = learnt("a"), learnt("b", every_s=30 * HORIZON_S)
    busy.arrivals = rare.arrivals
    world = machine(6, 6, knowledge=busy)
    assert brought(world) == []


def test_the_likelier_one_comes_first_and_one_at_a_time() -> None:
    knowledge = learnt("a", every_s=600.0)
    often = learnt("b", every_s=5.0)
    for number in reversed(range(12)):
        knowledge.arrivals.arrived(EngineName("b"), START - 1.0 - 5.0 * number)
    knowledge.costs = often.costs
    world = machine(3, 3, knowledge=knowledge, ram=0)
    assert brought(world) == ["b device"]
    world.ready("b")
    assert brought(world) == ["b device", "a device"]


def test_without_room_on_its_device_one_comes_half_the_way() -> None:
    world = machine(6, 6, tiers={"a": Tier.DEVICE})
    assert brought(world) == ["b host"]
    world.left("b", in_ram=6)
    assert world.core.devices()[DEVICE].committed_bytes == 6
    assert world.core.devices()[G0].committed_bytes == 6
    world.advance(3 * LOOK_MAX_S)
    assert brought(world) == ["b host"]


def test_from_host_memory_it_goes_on_when_its_device_is_free() -> None:
    world = machine(6, 6, tiers={"a": Tier.DEVICE})
    world.left("b", in_ram=6)
    world.command("swap_out", "a")
    world.left("a", Tier.DISK)
    assert brought(world) == ["b host", "b device"]


def test_room_in_ram_is_promised_for_all_that_it_will_hold() -> None:
    """It was never there: what it takes of its device is all that is known."""
    world = machine(6, 6, tiers={"a": Tier.DEVICE})
    assert brought(world) == ["b host"]
    assert world.core.devices()[DEVICE].reserved_bytes == 6


@pytest.mark.parametrize(("ram", "found"), [(12, ["b host"]), (11, [])])
def test_whoever_is_on_a_device_still_finds_room_in_ram(ram: int, found: list[str]) -> None:
    world = machine(6, 6, tiers={"a": Tier.DEVICE}, ram=ram, knowledge=learnt("b"))
    assert brought(world) == found
    if found:
        world.left("b", in_ram=6)
        world.command("swap_out", "a")
        world.left("a")
        assert world.tiers[EngineName("a")] is Tier.HOST


# ------------------------------------------------------------------ who stays


def test_nobody_comes_where_that_is_switched_off() -> None:
    assert brought(machine(6, look_ahead=False)) == []


def test_nobody_comes_whom_a_policy_without_swaps_would_never_let_go() -> None:
    assert brought(machine(6, policy="static")) == []


def test_nobody_leaves_for_it() -> None:
    world = machine(6, 6, tiers={"a": Tier.DEVICE}, ram=0)
    assert brought(world) == []
    assert not [effect for effect in world.log if isinstance(effect, SwapOut)]
    assert world.timer is None, "room that becomes free is noticed by itself"


def test_nobody_comes_while_somebody_waits() -> None:
    world = machine(6, 3, 3, knowledge=learnt("b", "c"), seen=False)
    waiter = world.request("a")
    for name in "abc":
        see(world, name, Tier.DISK)
    assert brought(world) == ["a device"]
    world.ready("a")
    assert world.leases[waiter].state is L.ACTIVE
    assert brought(world)[1:] == ["b device"], "beside it, now that it has what it wants"


def test_nobody_comes_while_somebody_waits_out_a_pause() -> None:
    world = machine(6, 3, ram=0, knowledge=learnt("b"), seen=False)
    lease = world.request("a")
    for name in "ab":
        see(world, name, Tier.DISK)
    world.refuse("a")
    assert world.state(lease) is L.WAITING
    assert brought(world) == ["a device"]
    world.end(lease)
    assert brought(world) == ["a device", "b device"]


def test_one_comes_half_the_way_at_a_time() -> None:
    """Each reads a disk and takes a processor, while others answer."""
    world = machine(10, 2, 2, tiers={"a": Tier.DEVICE}, knowledge=learnt("b", "c"))
    world.advance(LOOK_MAX_S)
    world.command("pin", "a")  # whatever makes it plan anew
    assert brought(world) == ["b host"]
    world.left("b", in_ram=2)
    assert brought(world) == ["b host", "c host"]


def test_one_that_could_not_come_when_it_was_asked_for_does_not_come_by_itself() -> None:
    world = machine(6, tiers={"a": Tier.DEVICE})
    world.command("swap_out", "a")
    world.left("a", Tier.DISK)
    lease = world.request("a")
    world.refuse("a")
    world.end(lease)
    for _ in range(10):
        world.advance(LOOK_MAX_S)
    assert brought(world) == ["a device"]


def test_one_of_unknown_size_stays() -> None:
    """It would take all that there is."""
    assert brought(machine(None)) == []


def test_one_with_its_cache_on_disk_does_not_come_half_the_way() -> None:
    """That image could be used only once."""
    world = machine(6, tiers={"a": Tier.DEVICE})
    world.command("swap_out", "a")
    world.left("a", Tier.DISK, cache_kept=True)
    board = world.core._board
    board.engines[EngineName("a")].unasked = False
    assert wanted(world) == ["a device"]
    board.engines[EngineName("a")].dumped = False
    assert wanted(world) == ["a device", "a host"]


@pytest.mark.parametrize("verb", ["swap_out", "stop"])
def test_what_an_operator_has_sent_away_stays_away_until_it_is_asked_for(verb: str) -> None:
    world = machine(6, tiers={"a": Tier.DEVICE})
    world.command(verb, "a")  # type: ignore[arg-type]
    world.left("a", Tier.DISK)
    world.advance(10 * LOOK_MAX_S)
    assert brought(world) == []


def test_what_an_operator_has_sent_away_comes_again_after_it_was_asked_for() -> None:
    world = machine(6, 6, tiers={"a": Tier.DEVICE}, knowledge=learnt("a"))
    world.command("swap_out", "a")
    world.left("a")
    lease = world.request("a")
    world.settle()
    world.end(lease)
    other = world.request("b")
    world.settle()
    world.end(other)
    assert world.states[EngineName("a")] is S.SWAPPED_OUT
    world.command("swap_out", "b")
    world.settle()
    assert brought(world)[-1] == "a device"


def test_a_pinned_one_is_brought_in_by_those_who_want_it_alone() -> None:
    """Nothing would ever make it leave again."""
    world = machine(6, knowledge=Knowledge())
    world.command("pin", "a")
    world.core._board.knowledge.arrivals = learnt("a").arrivals
    assert wanted(world) == []
    world.command("unpin", "a")
    assert brought(world) == ["a device"]


def test_one_whose_last_try_failed_waits_for_somebody_who_wants_it() -> None:
    world = machine(6)
    world.fail("a", S.SWAPPED_OUT, Tier.DISK)
    world.advance(10 * LOOK_MAX_S)
    assert brought(world) == ["a device"]
    lease = world.request("a")
    assert brought(world) == ["a device", "a device"]
    world.ready("a")
    assert world.leases[lease].state is L.ACTIVE


# ---------------------------------------------------------------- no flip-flop


def test_one_that_came_in_vain_does_not_come_again_before_it_is_asked_for() -> None:
    world = machine(6, 6, knowledge=learnt("a"), ram=20)
    world.ready("a")
    for _ in range(5):
        other = world.request("b")
        world.settle()
        world.end(other)
        world.command("swap_out", "b")
        world.settle()
        world.advance(2 * LOOK_MAX_S)
    assert brought(world).count("a device") == 1
    assert world.states[EngineName("a")] is S.SWAPPED_OUT


def test_one_that_came_in_vain_leaves_before_all_others() -> None:
    world = machine(4, 4, 4, tiers={"a": Tier.DEVICE}, knowledge=learnt("b"))
    world.ready("b")
    world.request("c")
    gone = [effect.engine for effect in world.log if isinstance(effect, SwapOut)]
    assert gone == ["b"], "though it came last"


def test_one_that_was_asked_for_is_no_easy_victim_any_more() -> None:
    world = machine(4, 4, 4, tiers={"a": Tier.DEVICE}, knowledge=learnt("b"))
    world.ready("b")
    world.end(world.request("b"))
    world.request("c")
    gone = [effect.engine for effect in world.log if isinstance(effect, SwapOut)]
    assert gone == ["a"]


def test_one_that_left_by_ttl_is_not_fetched_back_at_once() -> None:
    world = machine(6, tiers={"a": Tier.DEVICE}, ttl=15.0, knowledge=learnt("a", every_s=20.0))
    world.advance(15.0)
    world.left("a")
    assert brought(world) == []
    for _ in range(14):
        world.advance(1.0)
    assert brought(world) == [], "it is away for as long as it was idle before"
    lease = world.request("a")
    assert brought(world) == ["a device"], "unless somebody asks"
    world.ready("a")
    assert world.leases[lease].state is L.ACTIVE


def test_what_ttl_would_send_away_again_is_prepared_for_that_long_only() -> None:
    gap = 600.0
    assert brought(machine(6, knowledge=learnt("a", every_s=gap, last=START - 10.0), ram=0)) == [
        "a device"
    ]
    world = machine(6, knowledge=learnt("a", every_s=gap, last=START - 10.0), ttl=200.0, ram=0)
    assert brought(world) == []
    world.advance(gap - 20.0)
    assert brought(world) == ["a device"], "shortly before it is due"


@pytest.mark.parametrize(
    ("size", "device", "gap_s", "found"),
    [
        (6, "g0", 600.0, ["a device"]),  # hardly anybody asks for the other one
        (6, "g0", 1.0, []),  # it would be pushed out at once
        (4, "g0", 10.0, ["a device"]),  # both fit
        (4, "g0", 0.5, []),  # they do, but on a GPU one has to wait for the other's move
        (4, DEVICE, 0.5, ["a device"]),
        (6, DEVICE, 1.0, []),
    ],
)
def test_what_requests_for_another_would_wait_for_it_counts(
    size: int, device: str, gap_s: float, found: list[str]
) -> None:
    """The other one, which is away as well, may not come ahead itself."""
    knowledge = learnt("a", every_s=100.0, last=START - 40.0)
    for number in reversed(range(12)):
        knowledge.arrivals.arrived(EngineName("b"), START - 40.0 - gap_s * number)
    for number in range(1, int(39.0 / gap_s)):
        knowledge.arrivals.arrived(EngineName("b"), START - 40.0 + gap_s * number)
    knowledge.arrivals._sequence = Knowledge().arrivals._sequence
    world = World(
        engine("a", size, device=device),
        engine("b", size, device=device),
        devices=[host(), gpu("g0")],
        knowledge=knowledge,
        look_ahead=True,
        see=False,
    )
    board = world.core._board
    board.engines[EngineName("b")].unasked = True
    board.engines[EngineName("a")].unasked = True
    for name in "ab":
        see(world, name, Tier.DISK)
    board.engines[EngineName("a")].unasked = False
    group = board.engines[EngineName("a")].group
    board.now = board.view.now = world.now
    wanted_now = [f"{one.name} {tier}" for one, tier in ahead(board, board.view, group)[0]]
    assert wanted_now == found


# --------------------------------------------------------------- failed promotion


@pytest.mark.parametrize(
    ("error", "tier"),
    [
        (CudaError("b", "admission", "no size", lost=False), Tier.DISK),
        (CriuError("b", "restore", "broken"), Tier.NONE),
    ],
)
def test_a_failed_promotion_costs_nobody_anything(error: CudaError, tier: Tier) -> None:
    world = machine(6, 6, tiers={"a": Tier.DEVICE}, knowledge=learnt("b"))
    assert brought(world) == ["b host"]
    lease = world.request("b")
    world.fail("b", S.SWAPPED_OUT, tier, error=error)
    assert world.leases[lease].state is L.WAITING
    world.settle()
    assert world.leases[lease].state is L.ACTIVE


def test_a_failed_promotion_is_not_tried_again_and_again() -> None:
    world = machine(6, 6, tiers={"a": Tier.DEVICE}, knowledge=learnt("b"))
    world.fail("b", S.SWAPPED_OUT, Tier.DISK, error=CudaError("b", "x", "y", lost=False))
    for _ in range(20):
        world.advance(LOOK_MAX_S)
    assert brought(world) == ["b host"]


def test_one_that_is_wanted_while_it_comes_half_the_way_goes_on() -> None:
    world = machine(6, 6, tiers={"a": Tier.DEVICE}, knowledge=learnt("b"))
    lease = world.request("b")
    world.left("b", in_ram=6)
    world.settle()
    assert brought(world) == ["b host", "b device"]
    assert world.leases[lease].state is L.ACTIVE


# -------------------------------------------------------------------- preload


def test_what_is_configured_comes_first_and_also_without_looking_ahead() -> None:
    for look in (True, False):
        world = machine(6, 6, seen=False, look_ahead=look, knowledge=learnt("a"))
        world = World(
            engine("a", 6, device="g0"),
            replace(engine("b", 6, device="g0"), preload=True),
            devices=[host(), gpu("g0")],
            knowledge=learnt("a"),
            look_ahead=look,
        )
        assert brought(world) == ["b device"]


def test_what_is_configured_comes_once() -> None:
    world = World(
        engine("a", 6, device="g0", preload=True), devices=[host(), gpu("g0")], look_ahead=True
    )
    world.ready("a")
    world.command("swap_out", "a")
    world.settle()
    world.advance(LOOK_MAX_S)
    assert brought(world) == ["a device"]


def causes(world: World) -> list[str]:
    """Return why engines were brought in so far."""
    return [effect.cause for effect in world.log if isinstance(effect, BringIn)]


def test_it_is_told_why_an_engine_comes() -> None:
    world = machine(6, 6, tiers={"a": Tier.DEVICE}, knowledge=learnt("b"))
    world.request("b")
    world.settle()
    assert causes(world) == ["ahead", "demand"]
    assert causes(machine(6)) == ["ahead"]
    configured = engine("a", 6, device="g0", preload=True)
    assert causes(World(configured, devices=[host(), gpu("g0")])) == ["preload"]
