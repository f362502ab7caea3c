"""The host tier: RAM that holds the state of engines off their GPUs, and what makes room there."""

import pytest

from swapserve.errors import EngineCrashed
from swapserve.ids import DeviceName, EngineName
from swapserve.messages import EngineExited, EngineLeft, SwapOut
from swapserve.scheduler.policies.base import Wish
from swapserve.scheduler.victims import candidates
from swapserve.states import EngineState, LeaseState, Tier
from tests.stateful.world import DEVICE, World, engine, gpu, host

L = LeaseState
S = EngineState
G0 = DeviceName("g0")


def resident(world: World, name: str) -> None:
    """Bring the engine in for a request that is answered at once."""
    lease = world.request(name)
    world.settle()
    world.end(lease)


def machine(*sizes: int, ram: int = 10, cpu: int = 6, **options: float) -> World:
    """Return engines a, b, c ... on one GPU of 10, and `cpu` in the RAM that they park in."""
    specs = [
        engine(name, size, device="g0", ram=DEVICE)
        for name, size in zip("abcd", sizes, strict=False)
    ]
    devices = [host(ram), gpu("g0")]
    return World(engine("cpu", cpu), *specs, devices=devices, **options)  # type: ignore[arg-type]


def parked(world: World, *names: str) -> None:
    """Bring each in and swap it out to RAM, one after another, a second apart."""
    for name in names:
        resident(world, name)
        world.command("swap_out", name)
        world.settle()
        assert world.tiers[EngineName(name)] is Tier.HOST
        world.advance(1.0)


def bound_for(world: World) -> list[str]:
    """Return each swap out so far and where to."""
    return [f"{e.engine} {e.to}" for e in world.log if isinstance(e, SwapOut)]


def in_ram(world: World) -> int:
    return world.core.devices()[DEVICE].committed_bytes


# -------------------------------------------------------------------- parking


def test_an_engine_leaves_to_host_when_ram_has_room_for_all_its_devices() -> None:
    world = World(
        engine("wide", 4, device=("g0", "g1"), ram=DEVICE),
        devices=[host(8), gpu("g0"), gpu("g1")],
    )
    resident(world, "wide")
    world.command("swap_out", "wide")
    assert bound_for(world) == ["wide host"]
    assert world.core.devices()[DEVICE].reserved_bytes == 8
    world.left("wide", in_ram=7)
    account = world.core.devices()[DEVICE]
    assert (account.reserved_bytes, account.committed_bytes) == (0, 7)


def test_an_engine_leaves_to_disk_when_ram_has_no_room() -> None:
    world = World(
        engine("wide", 4, device=("g0", "g1"), ram=DEVICE),
        devices=[host(7), gpu("g0"), gpu("g1")],
    )
    resident(world, "wide")
    world.command("swap_out", "wide")
    assert bound_for(world) == ["wide disk"]
    assert world.core.devices()[DEVICE].reserved_bytes == 0


def test_ram_reserved_for_one_that_went_to_disk_after_all_is_free_again() -> None:
    world = machine(6)
    resident(world, "a")
    world.command("swap_out", "a")
    world.left("a", Tier.DISK)
    account = world.core.devices()[DEVICE]
    assert (account.reserved_bytes, account.committed_bytes) == (0, 0)


def test_only_an_engine_in_the_host_tier_holds_ram() -> None:
    world = machine(6)
    resident(world, "a")
    world.command("swap_out", "a")
    name = EngineName("a")
    del world.pending[name]
    world.states[name], world.tiers[name] = S.SWAPPED_OUT, Tier.DISK
    world.send(EngineLeft(engine=name, tier=Tier.DISK, seconds=1.0, host_bytes=6))
    assert in_ram(world) == 0


def test_ram_is_kept_until_the_engine_serves_again() -> None:
    world = machine(6)
    parked(world, "a")
    world.request("a")
    assert in_ram(world) == 6
    world.ready("a")
    assert in_ram(world) == 0


def test_a_refused_bring_in_leaves_the_state_in_ram() -> None:
    world = machine(6)
    parked(world, "a")
    waiter = world.request("a")
    world.refuse("a")
    assert in_ram(world) == 6
    assert world.core.devices()[G0].reserved_bytes == 0
    world.advance(2.0)
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_a_swap_out_that_is_given_up_gives_its_ram_back() -> None:
    world = machine(6)
    resident(world, "a")
    world.command("swap_out", "a")
    world.fail("a", S.READY, Tier.DEVICE)
    assert world.core.devices()[DEVICE].reserved_bytes == 0


def test_ram_that_a_broken_engine_may_hold_is_kept_until_it_is_stopped() -> None:
    world = machine(6)
    resident(world, "a")
    world.command("swap_out", "a")
    world.fail("a", S.FAILED, Tier.DEVICE, lost=True)
    assert in_ram(world) == 6
    world.request("cpu")
    world.advance(2.0)
    assert world.transitions()[-1] == "stop a"
    world.settle()
    assert in_ram(world) == 6  # of cpu
    assert world.transitions()[-1] == "in cpu"


def test_ram_that_a_broken_engine_holds_in_the_host_tier_is_kept() -> None:
    world = machine(6)
    resident(world, "a")
    world.command("swap_out", "a")
    world.fail("a", S.FAILED, Tier.HOST, lost=True)
    assert in_ram(world) == 6
    assert world.core.devices()[G0].committed_bytes == 0


def test_what_a_state_took_of_ram_is_reserved_the_next_time() -> None:
    world = machine(4)
    resident(world, "a")
    world.command("swap_out", "a")
    world.left("a", in_ram=7)
    resident(world, "a")
    world.command("swap_out", "a")
    assert world.core.devices()[DEVICE].reserved_bytes == 7


def test_an_engine_found_in_the_host_tier_holds_its_ram() -> None:
    specs = machine(6, 6).specs.values()
    world = World(*specs, devices=[host(), gpu("g0")], see=False)
    world.see("cpu")
    world.see("a", S.SWAPPED_OUT, Tier.HOST, in_ram=6, residue={"g0": 1})
    world.see("b")
    assert in_ram(world) == 6
    assert world.core.devices()[G0].committed_bytes == 1
    resident(world, "a")
    assert world.core.devices()[G0].committed_bytes == 6


# ---------------------------------------------------------------- making room


def test_parked_engines_count_against_those_that_run_in_ram() -> None:
    world = machine(6)
    parked(world, "a")
    waiter = world.request("cpu")
    assert world.transitions()[-1] == "out a"
    assert bound_for(world)[-1] == "a disk"
    assert world.core.state(EngineName("a")) is S.SWAPPING_OUT
    world.left("a")
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_the_least_recently_used_parked_engine_goes_further_down_and_no_more_than_needed() -> None:
    world = machine(3, 3, 3)
    parked(world, "b", "a", "c")
    world.request("cpu")
    assert bound_for(world)[3:] == ["b disk", "a disk"]


def test_a_parked_engine_that_is_wanted_stays_if_another_can_go() -> None:
    world = machine(4, 4, 10, cpu=6, quantum=100.0)
    parked(world, "a", "b")
    world.request("c")
    world.settle()
    world.request("a")  # c is within its quantum
    world.request("cpu")
    assert bound_for(world)[2:] == ["b disk"]


def test_a_parked_engine_that_is_wanted_goes_if_nothing_else_can_make_room() -> None:
    world = machine(4, 10, cpu=10, quantum=100.0)
    parked(world, "a")
    world.request("b")
    world.settle()
    world.request("a")
    waiter = world.request("cpu")
    assert bound_for(world)[1:] == ["a disk"]
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_a_parked_engine_that_is_wanted_is_spared_while_time_will_make_room() -> None:
    world = World(
        engine("a", 6, device="g0", ram=DEVICE),
        engine("b", 10, device="g0", ram=DEVICE),
        engine("cpu", 6),
        engine("other", 6),
        devices=[host(12), gpu("g0")],
        quantum=50.0,
    )
    parked(world, "a")
    world.request("b")
    world.request("cpu")
    world.settle()
    world.request("a")
    world.request("other")  # cpu leaves when its quantum is over
    assert world.of(SwapOut) == ["a"]
    world.advance(50.0)
    assert "cpu" in world.of(SwapOut)


def test_no_more_of_those_that_are_wanted_go_than_must() -> None:
    world = machine(4, 4, 2, 10, cpu=6, quantum=100.0)
    parked(world, "a", "b", "c")
    world.request("d")
    world.settle()
    world.request("a")
    world.request("b")
    world.request("cpu")
    assert sorted(bound_for(world)[3:]) == ["a disk", "c disk"]


def test_a_parked_engine_was_used_last_when_its_requests_were_suspended() -> None:
    world = World(
        engine("cpu", 6),
        engine("a", 4, device="g0", ram=DEVICE),
        engine("b", 4, device="g1", ram=DEVICE),
        devices=[host(), gpu("g0"), gpu("g1")],
    )
    stream = world.request("a")
    resident(world, "b")  # asked for as often and as lately as a
    world.advance(5.0)
    world.command("swap_out", "b")
    world.left("b")
    world.advance(5.0)
    world.command("swap_out", "a")
    world.left("a")
    world.end(stream)
    world.request("cpu")
    assert bound_for(world)[2:] == ["b disk"]


def test_the_parked_engine_goes_whose_place_in_ram_saves_least() -> None:
    world = machine(4, 4)
    for _ in range(4):
        resident(world, "a")
    world.command("swap_out", "a")
    world.settle()
    parked(world, "b")  # used last, but seldom
    world.request("cpu")
    assert bound_for(world)[2:] == ["b disk"]


def test_a_pinned_engine_keeps_its_ram_if_another_can_go() -> None:
    world = machine(4, 4)
    parked(world, "a", "b")
    world.command("pin", "a")
    world.request("cpu")
    assert bound_for(world)[2:] == ["b disk"]


def test_an_engine_that_came_on_command_and_was_swapped_out_is_not_guarded_in_ram() -> None:
    world = machine(6, quantum=100.0)
    world.command("swap_in", "a")
    world.settle()
    world.command("swap_out", "a")
    world.settle()
    world.request("cpu")
    assert bound_for(world) == ["a host", "a disk"]


def test_ram_of_one_that_is_coming_back_will_be_free_so_nobody_else_goes() -> None:
    world = machine(6, 6, ram=12)
    parked(world, "a", "b")
    world.request("a")
    waiter = world.request("cpu")
    assert bound_for(world) == ["a host", "b host"]
    world.ready("a")
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_ram_of_one_that_is_on_its_way_there_will_not_be_free() -> None:
    world = machine(6, 6, ram=12)
    parked(world, "a")
    resident(world, "b")
    world.command("swap_out", "b")
    world.request("cpu")
    assert bound_for(world)[2:] == ["a disk"]


def test_ram_of_a_pinned_engine_that_is_coming_back_does_not_make_others_fail() -> None:
    world = machine(6)
    parked(world, "a")
    world.command("pin", "a")
    world.request("a")
    waiter = world.request("cpu")
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_ram_promised_to_a_victim_is_not_given_to_a_younger_wish_of_the_same_moment() -> None:
    world = machine(6, 6)
    world.request("a")
    stream = world.request("cpu")
    world.settle()
    world.request("b")  # until the end of a's quantum
    world.command("swap_out", "cpu")
    world.left("cpu")  # held out for a quantum
    world.advance(10.0)
    assert bound_for(world) == ["cpu disk", "a host"]
    assert world.state(stream) is L.SUSPENDED
    world.settle()
    assert world.state(stream) is L.ACTIVE


def test_others_that_are_wanted_go_when_the_first_holds_what_only_survives_in_ram() -> None:
    specs = machine(4, 4, 4, 10, cpu=8).specs.values()
    world = World(*specs, devices=[host(12), gpu("g0")], see=False, quantum=50.0)
    for name in ("cpu", "a", "b", "c", "d"):
        world.see(name, can_dump=name != "a")
    stream = world.request("a")
    world.settle()
    world.command("swap_out", "a")
    world.left("a")
    parked(world, "b", "c")
    for name in ("d", "b", "c", "cpu"):
        world.request(name)
        if name == "d":
            world.settle()
    assert bound_for(world)[3:] == ["b disk", "c disk"]
    assert world.state(stream) is L.SUSPENDED


def test_a_parked_engine_with_requests_that_would_not_survive_on_disk_stays() -> None:
    specs = machine(4, 10).specs.values()
    world = World(*specs, devices=[host(), gpu("g0")], see=False, quantum=1.0)
    world.see("cpu")
    world.see("a", can_dump=False)
    world.see("b")
    stream = world.request("a")
    world.settle()
    other = world.request("b")
    world.advance(1.0)
    world.settle()
    assert world.state(stream) is L.SUSPENDED
    waiter = world.request("cpu")
    world.settle()
    assert world.state(waiter) is L.ACTIVE
    world.end(waiter)
    assert bound_for(world) == ["a host"]
    world.end(other)
    world.settle()
    assert world.state(stream) is L.ACTIVE


def test_ram_is_not_lent_while_requests_that_only_survive_there_are_about_to_go_back() -> None:
    specs = machine(6, 10, 2, cpu=6).specs.values()
    world = World(*specs, devices=[host(), gpu("g0")], see=False, quantum=1.0)
    world.see("cpu")
    world.see("a", can_dump=False)
    world.see("b")
    world.see("c")
    stream = world.request("a")
    world.settle()
    other = world.request("b")
    world.advance(1.0)
    world.settle()
    waiter = world.request("cpu")  # only a could make room, and a is stuck there
    assert world.core.devices()[DEVICE].reserved_bytes == 4
    world.end(other)
    world.settle()
    assert world.state(stream) is world.state(waiter) is L.ACTIVE


def test_a_busy_engine_whose_requests_would_not_survive_on_disk_drains_when_ram_is_full() -> None:
    specs = machine(6, 10, cpu=6).specs.values()
    world = World(*specs, devices=[host(), gpu("g0")], see=False, quantum=1.0)
    world.see("cpu")
    world.see("a", can_dump=False)
    world.see("b")
    running = world.request("cpu")
    stream = world.request("a")
    world.settle()
    world.request("b")
    world.advance(500.0)
    assert world.core.state(EngineName("a")) is S.DRAINING
    assert world.state(stream) is L.ACTIVE
    world.end(running)
    world.command("swap_out", "cpu")
    world.left("cpu")  # now there is room in RAM
    assert bound_for(world) == ["cpu disk", "a host"]
    assert world.state(stream) is L.SUSPENDED


def test_a_parked_engine_moves_down_while_its_gpu_is_busy_with_others() -> None:
    world = machine(6, 6)
    parked(world, "a")
    world.request("b")
    world.request("cpu")
    assert world.transitions()[-2:] == ["in b", "out a"]


def test_a_failed_move_down_leaves_the_engine_parked_and_pauses() -> None:
    world = machine(6)
    stream = world.request("a")
    world.settle()
    world.command("swap_out", "a")
    world.left("a")
    waiter = world.request("cpu")
    world.fail("a", S.SWAPPED_OUT, Tier.HOST)
    assert in_ram(world) == 6
    assert world.state(stream) is L.SUSPENDED
    assert bound_for(world) == ["a host", "a disk"]
    world.advance(2.0)
    assert bound_for(world) == ["a host", "a disk", "a disk"]
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_a_move_down_that_frees_nothing_is_not_repeated_without_a_pause() -> None:
    world = machine(6)
    parked(world, "a")
    world.request("cpu")
    world.left("a", Tier.HOST)
    assert bound_for(world) == ["a host", "a disk"]
    world.advance(2.0)
    assert bound_for(world) == ["a host", "a disk", "a disk"]


def test_requests_for_an_engine_on_its_way_down_wait_and_bring_it_back() -> None:
    world = machine(6)
    stream = world.request("a")
    world.settle()
    world.command("swap_out", "a")
    world.left("a")
    world.request("cpu")
    assert [e.in_flight for e in world.log if isinstance(e, SwapOut)] == [1, 1]
    late = world.request("a")
    world.settle()
    world.advance(10.0)
    world.settle()
    assert world.state(stream) is world.state(late) is L.ACTIVE


def test_a_state_larger_than_its_ram_makes_others_leave() -> None:
    world = machine(4, 4)
    parked(world, "a")
    resident(world, "b")
    world.command("swap_out", "b")
    world.left("b", in_ram=8)
    assert bound_for(world)[-1] == "a disk"
    assert world.core.devices()[DEVICE].excess_bytes == 2
    world.left("a")
    assert world.core.devices()[DEVICE].excess_bytes == 0


def test_a_state_larger_than_all_ram_goes_down_by_itself() -> None:
    world = machine(4)
    resident(world, "a")
    world.command("swap_out", "a")
    world.left("a", in_ram=12)
    assert bound_for(world) == ["a host", "a disk"]
    world.left("a")
    assert in_ram(world) == 0


def test_a_pin_does_not_keep_the_ram_of_an_engine_that_was_swapped_out() -> None:
    world = machine(6)
    parked(world, "a")
    world.command("pin", "a")
    waiter = world.request("cpu")
    world.settle()
    assert world.state(waiter) is L.ACTIVE


# -------------------------------------------------------------------- residue


def asleep(world: World, name: str, residue: int = 1) -> None:
    """Bring it in and let it sleep: most of it in RAM, the rest still on its GPU."""
    resident(world, name)
    world.command("swap_out", name)
    world.left(name, in_ram=3, residue={"g0": residue})
    world.advance(1.0)


def test_what_a_sleeping_engine_keeps_of_its_gpu_stays_charged() -> None:
    world = machine(4, 9)
    asleep(world, "a")
    assert world.core.devices()[G0].committed_bytes == 1
    resident(world, "b")
    assert world.core.devices()[G0].committed_bytes == 10
    assert world.core.state(EngineName("a")) is S.SWAPPED_OUT


def test_a_sleeping_engine_is_away_and_its_residue_counts_when_it_comes_back() -> None:
    world = machine(4, 6)
    asleep(world, "a")
    resident(world, "b")
    waiter = world.request("a")
    assert world.state(waiter) is L.WAITING
    assert world.transitions()[-1] == "in a"  # 6 of b, 1 there already, 3 more
    world.ready("a")
    assert world.core.devices()[G0].committed_bytes == 10


def test_a_sleeping_engine_is_moved_down_when_a_newcomer_needs_its_residue() -> None:
    world = machine(4, 10)
    asleep(world, "a")
    waiter = world.request("b")
    assert bound_for(world)[-1] == "a host"
    assert world.core.devices()[DEVICE].reserved_bytes == 1
    world.left("a")
    assert in_ram(world) == 4
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_moving_a_residue_into_ram_frees_no_ram() -> None:
    world = machine(4, 10)
    asleep(world, "a")
    board, wish = world.core._board, Wish((world.now, 0))
    (upper,) = candidates(board, (), {G0: 1}, wish)
    assert {device: size for device, size in upper.sizes.items() if size} == {G0: 1}
    (lower,) = candidates(board, (), {DEVICE: 1}, wish)
    assert lower.sizes == {G0: 1, DEVICE: 3}


def test_a_sleeping_engine_goes_to_disk_when_its_residue_has_no_room_in_ram() -> None:
    world = machine(4, 10, ram=10, cpu=7)
    asleep(world, "a")
    world.request("cpu")
    world.settle()
    world.request("b")
    assert bound_for(world)[-1] == "a disk"


def test_a_residue_that_stayed_after_a_move_to_host_is_dropped_with_the_move_to_disk() -> None:
    world = machine(4, 10)
    asleep(world, "a")
    waiter = world.request("b")
    world.left("a", in_ram=3, residue={"g0": 1})
    assert bound_for(world)[-1] == "a host"
    world.advance(2.0)
    assert bound_for(world)[-1] == "a disk"
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_a_residue_stays_whose_requests_lost_their_room_in_ram_to_another_victim() -> None:
    world = World(
        engine("a", 4, device="g0", ram=DEVICE),
        engine("v", 7, device="g1", ram=DEVICE),
        engine("wide", 10, device=("g0", "g1"), ram=DEVICE),
        devices=[host(), gpu("g0"), gpu("g1")],
        see=False,
    )
    for name in ("a", "v", "wide"):
        world.see(name, can_dump=name != "a")
    stream = world.request("a")
    world.settle()
    resident(world, "v")
    world.command("swap_out", "a")
    world.left("a", in_ram=3, residue={"g0": 1})
    waiter = world.request("wide")
    assert bound_for(world) == ["a host", "v host"]
    world.left("v")
    for _ in range(3):
        world.advance(10.0)
        world.settle()
        for lease in world.on("a", L.ACTIVE):
            world.end(lease)
    world.settle()
    assert world.error(stream) is None
    assert world.state(waiter) is L.ACTIVE


def test_moving_a_residue_waits_for_its_turn_on_the_gpu() -> None:
    world = machine(4, 8, cpu=8)
    asleep(world, "a")
    world.request("b")
    world.request("cpu")
    assert world.transitions()[-1] == "in b"
    world.ready("b")
    assert world.transitions()[-1] == "out a"


def test_a_refused_bring_in_of_a_sleeping_engine_leaves_it_asleep() -> None:
    world = machine(4)
    asleep(world, "a")
    world.request("a")
    world.refuse("a")
    account = world.core.devices()[G0]
    assert (account.reserved_bytes, account.committed_bytes) == (0, 1)
    assert in_ram(world) == 3


# --------------------------------------------------------------------- crashes


def test_an_engine_that_dies_in_the_host_tier_loses_its_suspended_requests_and_its_ram() -> None:
    world = machine(6)
    stream = world.request("a")
    world.settle()
    world.command("swap_out", "a")
    world.left("a", residue={"g0": 1})
    waiting = world.request("a")
    world.crash("a")
    assert isinstance(world.error(stream), EngineCrashed)
    assert world.state(waiting) is L.WAITING
    assert in_ram(world) == world.core.devices()[G0].committed_bytes == 0
    assert world.core.state(EngineName("a")) is S.FAILED
    world.advance(10.0)
    world.settle()
    assert world.state(waiting) is L.ACTIVE


def test_a_report_of_the_end_of_an_engine_that_is_on_disk_is_old_news() -> None:
    world = machine(6)
    resident(world, "a")
    world.command("swap_out", "a")
    world.left("a", Tier.DISK)
    world.send(EngineExited(engine=EngineName("a"), error=EngineCrashed("a", "SIGKILL")))
    assert world.core.state(EngineName("a")) is S.SWAPPED_OUT


@pytest.mark.parametrize("where", ["coming", "leaving", "lowering"])
def test_a_crash_in_mid_transition_frees_nothing_before_it_is_answered(where: str) -> None:
    world = machine(6)
    if where == "leaving":
        resident(world, "a")
        world.command("swap_out", "a")
    else:
        parked(world, "a")
        world.request("a" if where == "coming" else "cpu")
    before = {name: a.committed_bytes for name, a in world.core.devices().items()}
    world.crash("a")
    assert {name: a.committed_bytes for name, a in world.core.devices().items()} == before
    world.fail("a")
    assert in_ram(world) == world.core.devices()[G0].committed_bytes == 0
