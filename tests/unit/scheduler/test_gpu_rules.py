"""Rules of exclusive devices and of engines that span several, one test each."""

from functools import partial

import pytest

from swapserve.errors import (
    CapacityError,
    CudaError,
    DeviceBusy,
    EngineUnavailable,
    IllegalTransition,
    SwapServeError,
)
from swapserve.ids import DeviceName, EngineName
from swapserve.messages import BringIn, EngineReady, SwapOut
from swapserve.scheduler.failures import REFUSALS_MAX
from swapserve.states import EngineState, LeaseState, Tier
from tests.stateful.world import DEVICE, World, engine, gpu, host

L = LeaseState
S = EngineState
G0, G1 = DeviceName("g0"), DeviceName("g1")


def resident(world: World, name: str) -> None:
    """Bring the engine in for a request that is answered at once."""
    lease = world.request(name)
    world.settle()
    world.end(lease)


def one_gpu(*sizes: int, **options: float | str) -> World:
    """Return engines a, b, c ... of these sizes on one GPU of 10."""
    specs = [engine(name, size, device="g0") for name, size in zip("abcd", sizes, strict=False)]
    return World(*specs, devices=[gpu("g0")], **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------ exclusive


def test_engines_that_fit_together_on_a_gpu_come_in_one_after_another() -> None:
    world = one_gpu(4, 6)
    world.request("a")
    second = world.request("b")
    assert world.transitions() == ["in a"]
    world.ready("a")
    assert world.transitions() == ["in a", "in b"]
    world.ready("b")
    assert world.state(second) is L.ACTIVE


def test_engines_on_different_gpus_move_at_the_same_time() -> None:
    world = World(
        engine("a", device="g0"), engine("b", device="g1"), devices=[gpu("g0"), gpu("g1")]
    )
    world.request("a")
    world.request("b")
    assert world.transitions() == ["in a", "in b"]


def test_several_victims_on_one_gpu_leave_one_after_another_and_then_the_newcomer_comes() -> None:
    world = one_gpu(5, 5, 10)
    resident(world, "a")
    world.advance(1.0)
    resident(world, "b")
    waiter = world.request("c")
    assert world.transitions()[2:] == ["out a"]
    world.left("a")
    assert world.transitions()[2:] == ["out a", "out b"]
    world.left("b")
    assert world.transitions()[2:] == ["out a", "out b", "in c"]
    world.ready("c")
    assert world.state(waiter) is L.ACTIVE


def test_a_victim_that_waits_for_its_turn_serves_until_then() -> None:
    world = one_gpu(5, 5, 10)
    resident(world, "a")
    world.advance(1.0)
    resident(world, "b")
    world.advance(20.0)
    world.request("c")
    meanwhile = world.request("b")
    assert world.state(meanwhile) is L.ACTIVE
    world.left("a")
    assert world.state(meanwhile) is L.SUSPENDED
    assert world.transitions()[-1] == "out b"


def test_a_victim_that_drained_and_waits_for_its_turn_is_not_opened_again() -> None:
    world = one_gpu(4, 4, 8, policy="lru-drain")
    first, second = world.request("a"), world.request("b")
    world.settle()
    world.request("c")
    assert {world.core.state(EngineName(name)) for name in "ab"} == {S.DRAINING}
    world.end(first)
    world.end(second)
    assert world.transitions()[2:] == ["out a"]
    assert world.core.state(EngineName("b")) is S.DRAINING


def test_a_younger_wish_does_not_take_the_victim_that_an_older_one_waits_for() -> None:
    world = one_gpu(5, 5, 10, 5)
    resident(world, "a")
    world.advance(1.0)
    resident(world, "b")
    older = world.request("c")
    world.request("d")
    world.left("a")
    world.left("b")
    assert world.transitions()[-1] == "in c"
    world.ready("c")
    assert world.state(older) is L.ACTIVE


def test_a_swap_out_by_command_waits_for_the_transition_under_way_on_its_gpu() -> None:
    world = one_gpu(4, 4)
    resident(world, "a")
    world.request("b")
    command = world.command("swap_out", "a")
    assert world.transitions() == ["in a", "in b"]
    world.ready("b")
    assert world.transitions()[-1] == "out a"
    assert command in world.asked
    world.left("a")
    assert world.outcomes[command] is None


def test_a_stop_by_command_waits_for_the_transition_under_way_on_its_gpu() -> None:
    world = one_gpu(4, 4)
    running = world.request("a")
    world.settle()
    world.request("b")
    command = world.command("stop", "a")
    later = world.command("start", "a")
    assert world.transitions() == ["in a", "in b"]
    assert world.state(running) is L.ACTIVE
    world.ready("b")
    assert world.transitions()[-1] == "stop a"
    world.settle()
    assert world.outcomes[command] is world.outcomes[later] is None
    assert world.transitions()[-1] == "in a"


def test_a_stop_of_an_engine_that_holds_nothing_of_the_gpu_waits_for_nobody() -> None:
    world = one_gpu(6, 6)
    resident(world, "a")
    world.request("b")
    world.left("a")
    command = world.command("stop", "a")
    assert world.transitions()[-1] == "stop a"
    world.left("a")
    assert world.outcomes[command] is None


def test_a_command_on_two_gpus_is_not_overtaken_by_wishes_that_need_one_of_them() -> None:
    world = World(
        engine("wide", 2, device=("g0", "g1")),
        *(engine(name, 2, device="g0") for name in "ab"),
        *(engine(name, 2, device="g1") for name in "xy"),
        devices=[gpu("g0"), gpu("g1")],
    )
    resident(world, "wide")
    world.request("a")
    world.request("x")
    command = world.command("stop", "wide")
    world.request("b")
    world.request("y")
    world.ready("a")
    assert world.transitions()[1:] == ["in a", "in x"]
    world.ready("x")
    assert world.transitions()[-1] == "stop wide"
    world.settle()
    assert world.outcomes[command] is None
    assert world.of(SwapOut) == []


def test_an_idle_engine_past_its_ttl_waits_for_its_turn() -> None:
    world = World(
        engine("a", 4, device="g0", ttl=5.0), engine("b", 4, device="g0"), devices=[gpu("g0")]
    )
    resident(world, "a")
    world.request("b")
    world.advance(10.0)
    assert world.transitions() == ["in a", "in b"]
    world.ready("b")
    assert world.transitions()[-1] == "out a"


def test_preloads_on_one_gpu_come_in_one_after_another() -> None:
    specs = [engine(name, 4, device="g0", preload=True) for name in "ab"]
    world = World(*specs, devices=[gpu("g0")])
    assert world.transitions() == ["in a"]
    world.ready("a")
    assert world.transitions() == ["in a", "in b"]


def test_a_preload_that_found_no_room_takes_the_place_of_one_that_failed_to_come() -> None:
    specs = [engine(name, 6, device="g0", preload=True) for name in "ab"]
    world = World(*specs, devices=[gpu("g0")])
    assert world.transitions() == ["in a"]
    world.fail("a")
    assert world.transitions() == ["in a", "in b"]


def test_an_engine_that_an_earlier_daemon_was_starting_has_the_turn_on_its_gpu() -> None:
    specs = [engine(name, 4, device="g0") for name in "ab"]
    world = World(*specs, devices=[gpu("g0")], see=False)
    world.see("a", S.STARTING, Tier.DEVICE)
    world.pending[EngineName("a")] = BringIn(engine=EngineName("a"))
    world.see("b")
    world.request("b")
    assert world.transitions() == []
    world.ready("a")
    assert world.transitions() == ["in b"]


def test_an_engine_with_no_memory_to_show_still_takes_its_turn() -> None:
    world = World(
        *(engine(name, None, device="g0") for name in "ab"), engine("c", 4, device="g0"),
        devices=[gpu("g0")],
    )  # fmt: skip
    world.request("a")
    world.ready("a", 0)
    world.request("c")
    world.command("swap_out", "a")
    assert world.transitions() == ["in a", "in c"]
    world.ready("c")
    assert world.transitions()[-1] == "out a"


def broken(world: World, name: str) -> None:
    """Leave the engine broken, with its bytes still in use."""
    resident(world, name)
    world.command("swap_out", name)
    world.fail(name, S.FAILED, Tier.DEVICE, lost=True)
    world.advance(5.0)


def test_a_broken_engine_is_stopped_for_a_newcomer_when_it_is_its_turn() -> None:
    world = one_gpu(4, 4, 6)
    broken(world, "a")
    world.request("b")
    world.request("c")
    assert world.transitions()[2:] == ["in b"]
    world.ready("b")
    assert world.transitions()[2:] == ["in b", "stop a"]


def test_a_swap_out_command_for_a_broken_engine_waits_for_its_turn() -> None:
    world = one_gpu(4, 4)
    broken(world, "a")
    world.request("b")
    command = world.command("swap_out", "a")
    assert world.transitions()[2:] == ["in b"]
    world.settle()
    assert world.transitions()[2:] == ["in b", "stop a"]
    assert world.outcomes[command] is None


def test_use_beyond_the_plan_waits_for_the_turn_of_whom_it_evicts() -> None:
    world = one_gpu(4, 4, 2)
    resident(world, "a")
    resident(world, "b")
    world.request("c")
    world.measure("b", 8)
    assert world.transitions()[-1] == "in c"
    world.ready("c")
    assert world.transitions()[-1] == "out a"


# ------------------------------------------------------------- several devices


def two_gpus(*, quantum: float = 10.0) -> World:
    """Return `wide` on two GPUs, which takes both, and `a` and `b` on one of them each."""
    return World(
        engine("wide", 8, device=("g0", "g1")),
        engine("a", 6, device="g0"),
        engine("b", 6, device="g1"),
        devices=[gpu("g0"), gpu("g1")],
        quantum=quantum,
    )


def test_an_engine_on_two_gpus_comes_in_when_it_has_room_on_both() -> None:
    world = two_gpus()
    resident(world, "a")
    resident(world, "b")
    waiter = world.request("wide")
    assert world.transitions()[2:] == ["out a", "out b"]
    world.left("b")
    assert world.core.devices()[G1].reserved_bytes == 8
    assert world.transitions()[2:] == ["out a", "out b"]
    world.left("a")
    assert world.transitions()[-1] == "in wide"
    world.ready("wide")
    assert world.state(waiter) is L.ACTIVE
    for device in (G0, G1):
        assert world.core.devices()[device].committed_bytes == 8
    assert world.core.footprint(EngineName("wide")) == {G0: 8, G1: 8}


def test_an_engine_on_two_gpus_leaves_both_for_one_newcomer() -> None:
    world = two_gpus()
    resident(world, "wide")
    world.request("a")
    world.request("b")
    world.left("wide")
    assert world.transitions() == ["in wide", "out wide", "in a", "in b"]


def test_only_the_gpu_that_is_short_is_cleared_for_an_engine_on_two() -> None:
    world = World(
        engine("wide", 5, device=("g0", "g1")),
        engine("a", 6, device="g0"),
        engine("b", 4, device="g1"),
        devices=[gpu("g0"), gpu("g1")],
    )
    resident(world, "b")
    resident(world, "a")
    world.request("wide")
    assert world.of(SwapOut) == ["a"]


def test_two_engines_that_want_the_same_two_gpus_never_hold_one_each() -> None:
    world = World(
        engine("x", 8, device=("g0", "g1")),
        engine("y", 8, device=("g1", "g0")),
        devices=[gpu("g0"), gpu("g1")],
    )
    first, second = world.request("x"), world.request("y")
    assert world.transitions() == ["in x"]
    world.settle()
    world.end(first)
    world.settle()
    assert world.state(second) is L.ACTIVE


def test_wishes_for_one_gpu_do_not_keep_an_engine_on_two_from_both() -> None:
    """The wish for both is blocked on one of them; the other is not lent to younger wishes."""
    world = two_gpus()
    world.request("a")
    world.settle()
    wide = world.request("wide")  # a is within its quantum
    younger = world.request("b")
    assert world.transitions() == ["in a"]
    world.advance(10.0)
    world.settle()
    assert world.state(wide) is L.ACTIVE
    assert world.state(younger) is L.WAITING


def test_who_stands_back_on_one_gpu_is_not_overtaken_on_its_other() -> None:
    world = World(
        engine("a", 6, device="g0"),
        engine("big", 8, device="g0"),
        engine("wide", 8, device=("g0", "g1")),
        engine("b", 8, device="g1"),
        devices=[gpu("g0"), gpu("g1")],
    )
    world.request("a")
    world.settle()
    world.request("big")  # a is within its quantum
    world.request("wide")
    world.request("b")
    assert world.transitions() == ["in a"]
    for _ in range(8):
        world.advance(10.0)
        world.settle()
    assert {"big", "wide", "b"} <= set(world.of(BringIn))


def test_a_preload_does_not_take_a_gpu_that_somebody_waits_for_with_another() -> None:
    world = World(
        engine("a", 6, device="g0"),
        engine("big", 8, device="g0"),
        engine("wide", 8, device=("g0", "g1")),
        engine("eager", 8, device="g1", preload=True),
        devices=[gpu("g0"), gpu("g1")],
        see=False,
    )
    world.see("a", S.READY, Tier.DEVICE)
    for name in ("a", "big", "wide"):
        world.request(name)
    for name in ("big", "wide", "eager"):
        world.see(name)
    assert world.transitions() == []


def test_a_stream_of_moves_on_either_gpu_does_not_keep_out_who_needs_both_at_rest() -> None:
    world = World(
        engine("wide", 2, device=("g0", "g1")),
        *(engine(name, 2, device="g0") for name in "ab"),
        *(engine(name, 2, device="g1") for name in "xy"),
        devices=[gpu("g0"), gpu("g1")],
    )
    world.request("a")
    world.request("x")
    wide = world.request("wide")
    world.request("b")
    world.request("y")
    world.ready("a")
    assert world.transitions() == ["in a", "in x"]
    world.ready("x")
    assert world.transitions()[2:] == ["in wide"]
    world.ready("wide")
    assert world.state(wide) is L.ACTIVE
    assert world.transitions()[3:] == ["in b", "in y"]


def test_a_wish_that_stands_back_blocks_only_its_own_gpus() -> None:
    specs = [
        engine("a", 6, device="g0"),
        engine("big", 8, device="g0"),
        engine("other", 8, device="g2"),
        engine("tie", 8, device=("g1", "g2")),
    ]
    world = World(*specs, devices=[gpu("g0"), gpu("g1"), gpu("g2")])
    world.request("a")
    world.settle()
    world.request("big")  # a is within its quantum
    free = world.request("other")
    world.settle()
    assert world.state(free) is L.ACTIVE


def test_an_engine_too_large_for_one_of_its_gpus_is_refused_and_told_which() -> None:
    world = World(engine("wide", 8, device=("g0", "g1")), devices=[gpu("g0", 10), gpu("g1", 7)])
    error = world.error(world.request("wide"))
    assert isinstance(error, CapacityError)
    assert error.device == "g1"


def test_an_unknown_footprint_takes_all_its_gpus_until_each_is_measured() -> None:
    world = World(
        engine("wide", None, device=("g0", "g1")),
        engine("a", 3, device="g0"),
        devices=[gpu("g0"), gpu("g1")],
    )
    world.request("wide")
    world.request("a")
    assert world.transitions() == ["in wide"]
    world.ready("wide", 7)
    assert world.transitions() == ["in wide", "in a"]
    assert world.core.footprint(EngineName("wide")) == {G0: 7, G1: 7}


def test_a_gpu_that_was_not_read_keeps_what_was_promised_on_it() -> None:
    world = World(engine("wide", None, device=("g0", "g1")), devices=[gpu("g0"), gpu("g1")])
    world.request("wide")
    del world.pending[EngineName("wide")]
    world.states[EngineName("wide")] = S.READY
    world.send(EngineReady(engine=EngineName("wide"), footprint={G0: 4}, seconds=1.0))
    assert world.core.devices()[G0].committed_bytes == 4
    assert world.core.devices()[G1].committed_bytes == 10
    assert world.core.footprint(EngineName("wide")) == {G0: 4}


def test_what_a_broken_engine_of_unknown_size_was_promised_is_not_free() -> None:
    world = World(engine("a", None, device="g0"), devices=[gpu("g0")])
    world.request("a")
    world.fail("a", S.FAILED, Tier.DEVICE)
    assert world.core.devices()[G0].committed_bytes == 10


def test_a_broken_engine_gives_back_all_its_gpus_by_one_stop() -> None:
    world = two_gpus()
    resident(world, "wide")
    world.request("a")
    world.fail("wide", S.FAILED, Tier.DEVICE, lost=True)
    world.advance(2.0)
    assert world.transitions()[-1] == "stop wide"
    world.settle()
    assert world.core.devices()[G1].committed_bytes == 0


# ----------------------------------------------------------- refused bring-ins


def test_a_refused_bring_in_keeps_who_waits_and_is_tried_again_after_a_growing_pause() -> None:
    world = one_gpu(6)
    waiter = world.request("a")
    world.refuse("a")
    assert world.state(waiter) is L.WAITING
    assert world.core.devices()[G0].reserved_bytes == 0
    late = world.request("a")
    assert world.state(late) is L.WAITING
    world.advance(1.9)
    assert world.transitions() == ["in a"]
    world.advance(0.1)
    assert world.transitions() == ["in a", "in a"]
    world.refuse("a")
    world.advance(3.9)
    assert len(world.transitions()) == 2
    world.advance(0.1)
    world.settle()
    assert world.state(waiter) is world.state(late) is L.ACTIVE


def test_a_refused_bring_in_does_not_keep_others_from_the_gpu() -> None:
    world = one_gpu(6, 6)
    world.request("a")
    other = world.request("b")
    world.refuse("a")
    assert world.transitions() == ["in a", "in b"]
    world.settle()
    assert world.state(other) is L.ACTIVE


def test_too_many_refusals_in_a_row_end_the_wait_with_the_reason() -> None:
    world = one_gpu(6, backoff=1.0)
    waiter = world.request("a")
    for _ in range(REFUSALS_MAX):
        assert world.state(waiter) is L.WAITING
        world.refuse("a")
        world.advance(60.0)
    error = world.error(waiter)
    assert isinstance(error, EngineUnavailable)
    assert f"{REFUSALS_MAX} times" in str(error)
    assert "nvidia-smi" in str(error)
    world.request("a")
    world.refuse("a")
    late = world.request("a")
    world.advance(60.0)
    world.settle()
    assert world.state(late) is L.ACTIVE
    world.end(late)
    world.command("swap_out", "a")
    world.settle()
    patient = world.request("a")
    world.refuse("a")
    assert world.state(patient) is L.WAITING, "a success begins the count anew"


def test_a_bring_in_that_the_driver_undid_is_a_refusal_like_one_for_want_of_memory() -> None:
    world = one_gpu(6)
    waiter = world.request("a")
    world.fail("a", S.SWAPPED_OUT, Tier.DISK, error=CudaError("a", "restore", "busy", lost=False))
    assert world.state(waiter) is L.WAITING
    world.advance(2.0)
    world.settle()
    assert world.state(waiter) is L.ACTIVE


@pytest.mark.parametrize(
    ("tier", "lost", "error"),
    [
        (Tier.DEVICE, False, DeviceBusy("a", "GPU-0", 6, 5)),
        (Tier.NONE, True, DeviceBusy("a", "GPU-0", 6, 5)),
        (Tier.NONE, False, CudaError("a", "restore", "out of memory", lost=True)),
    ],
)
def test_a_bring_in_that_changed_something_is_a_failure(
    tier: Tier, lost: bool, error: SwapServeError
) -> None:
    world = one_gpu(6)
    waiter = world.request("a")
    world.fail("a", S.FAILED, tier, lost=lost, error=error)
    assert world.error(waiter) is error


def test_suspended_leases_outlast_every_refusal() -> None:
    world = one_gpu(6, backoff=1.0)
    stream = world.request("a")
    world.settle()
    world.command("swap_out", "a")
    world.left("a")
    for _ in range(3 * REFUSALS_MAX):
        world.advance(61.0)
        world.refuse("a")
    assert world.state(stream) is L.SUSPENDED
    world.advance(61.0)
    world.settle()
    assert world.state(stream) is L.ACTIVE


def test_a_refused_command_is_answered_with_the_reason_at_once() -> None:
    world = one_gpu(6)
    command = world.command("swap_in", "a")
    world.refuse("a")
    assert isinstance(world.outcomes[command], DeviceBusy)
    world.advance(1000.0)
    assert world.transitions() == ["in a"]


@pytest.mark.parametrize("gives_up", [True, False])
def test_an_outcome_that_makes_a_parked_engine_serve_is_a_bug(gives_up: bool) -> None:
    world = World(
        engine("a", device="g0", ram=DEVICE),
        engine("h", 6),
        devices=[host(), gpu("g0")],
    )
    resident(world, "a")
    world.command("swap_out", "a")
    world.settle()
    world.request("h")
    assert [e.to for e in world.log if isinstance(e, SwapOut)] == [Tier.HOST, Tier.DISK]
    answer = world.ready if gives_up else partial(world.fail, state=S.READY, tier=Tier.DEVICE)
    with pytest.raises(IllegalTransition):
        answer("a")
