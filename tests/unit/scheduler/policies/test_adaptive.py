"""What the default policy decides, through the core, in worlds of two or three engines."""

from collections.abc import Sequence

import pytest

from swapserve.ids import EngineName, LeaseId
from swapserve.messages import Ask, SwapOut, Used
from swapserve.scheduler.demand import GROUP_MAX
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.policies.adaptive import LEAST_SLICE
from swapserve.states import EngineState, LeaseState, Priority, Tier
from tests.stateful.traffic import taught
from tests.stateful.world import DEVICE, World, engine, gpu, host

L, S = LeaseState, EngineState
NAMES = ("a", "b", "c")
SWAP = 2.0
"""Seconds of a swap out, and of a swap in."""
SLICE = 2 * SWAP
MAX_WAIT = 30.0
BATCH, URGENT = Priority.BATCH, Priority.URGENT
ITL_S = 0.05
START = 1000.0
"""When a world begins, by its clock."""


def learn_lengths(knowledge: Knowledge, name: str, tokens: Sequence[int], key: str = "") -> None:
    for count in tokens:
        decode_s = (count - 1) * ITL_S
        used = Used(tokens_in=1, tokens_out=count, prefill_s=0.1, decode_s=decode_s)
        ask = Ask(key=key)
        knowledge.service.ended(EngineName(name), ask, used, 0.1 + decode_s)


def world_of(
    *sizes: int,
    knowledge: Knowledge | None = None,
    tokens: int = 4000,
    max_wait: float = MAX_WAIT,
    quantum: float | None = None,
    share: float = 0.2,
) -> World:
    """Return a world in which swaps take two seconds each way and answers `tokens` tokens."""
    known = knowledge or taught(NAMES, SWAP)
    for name in NAMES:
        learn_lengths(known, name, [tokens] * 40)
    specs = [engine(name, size) for name, size in zip(NAMES, sizes, strict=False)]
    return World(
        *specs, policy="adaptive", quantum=quantum, max_wait=max_wait, share=share, knowledge=known
    )


def busy(world: World, name: str, priority: Priority = Priority.INTERACTIVE) -> LeaseId:
    lease = world.request(name, priority)
    world.settle()
    assert world.state(lease) is L.ACTIVE
    return lease


def idle(world: World, name: str) -> None:
    world.end(busy(world, name))


def moved_after(world: World, most: float = 500.0, step: float = 0.1) -> float:
    """Let time pass until somebody is swapped out; return the seconds that it took."""
    begun = world.now
    while not world.pending:
        assert world.now < begun + most, "nobody leaves"
        world.advance(step)
    return world.now - begun


# ----------------------------------------------------------------- who leaves


def test_an_idle_engine_leaves_at_once() -> None:
    world = world_of(6, 6)
    idle(world, "a")
    world.request("b")
    assert world.of(SwapOut) == ["a"]


def test_of_idle_engines_the_one_leaves_that_is_asked_for_less() -> None:
    world = world_of(4, 4, 6)
    for _ in range(6):
        idle(world, "a")
        world.advance(2.0)
    idle(world, "b")  # used last, and once
    world.request("c")
    assert world.of(SwapOut) == ["b"]


def test_of_idle_engines_the_one_leaves_that_comes_back_faster() -> None:
    known = taught(NAMES, SWAP)
    for _ in range(10):
        known.costs.came(EngineName("a"), Tier.DISK, 60.0, busy=False)
    world = world_of(4, 4, 6, knowledge=known)
    idle(world, "a")
    world.advance(1.0)
    idle(world, "b")
    world.request("c")
    assert world.of(SwapOut) == ["b"]


def test_a_cache_that_will_be_asked_for_again_keeps_its_engine() -> None:
    known = taught(NAMES, SWAP)
    for name in NAMES:  # a copy of a cache is dear
        for _ in range(10):
            known.costs.left(EngineName(name), Tier.DISK, 60.0, busy=True)
    world = world_of(4, 4, 6, knowledge=known)
    ask = Ask(tokens_in=30_000, conversation=7)
    for _ in range(8):
        lease = world.request("a", ask=ask)
        world.settle()
        world.advance(1.0)
        world.end(lease, Used(tokens_in=30_000, tokens_out=10, prefill_s=20.0, decode_s=0.5))
        idle(world, "b")
        world.advance(1.0)
    idle(world, "b")
    assert known.caches.worth_s(EngineName("a"), world.now) > 1.0
    world.request("c")
    assert world.of(SwapOut) == ["b"]
    (effect,) = [effect for effect in world.log if isinstance(effect, SwapOut)]
    assert effect.cache_s == 0.0


def test_of_busy_engines_the_one_leaves_whose_readers_have_most_left_to_read() -> None:
    world = world_of(4, 4, 6)
    busy(world, "a")
    world.advance(60.0)  # a thousand tokens ahead of who reads five in a second
    busy(world, "b")
    world.request("c")
    moved_after(world)
    assert world.of(SwapOut) == ["a"]


# ----------------------------------------------------------------------- when


def test_a_busy_engine_runs_for_a_slice_as_long_as_the_swap() -> None:
    world = world_of(6, 6)
    stream = busy(world, "a")
    world.request("b")
    assert moved_after(world) == pytest.approx(SLICE, abs=0.11)
    assert world.state(stream) is L.SUSPENDED


def test_a_quantum_of_the_operators_takes_the_slices_place() -> None:
    world = world_of(6, 6, quantum=17.0)
    busy(world, "a")
    world.request("b")
    assert moved_after(world) == pytest.approx(17.0, abs=0.11)


def test_an_engine_that_has_run_for_long_leaves_at_once() -> None:
    world = world_of(6, 6)
    busy(world, "a")
    world.advance(100.0)
    world.request("b")
    assert world.of(SwapOut) == ["a"]


def test_requests_about_to_end_are_waited_for() -> None:
    world = world_of(6, 6, tokens=30)  # one and a half seconds
    lease = busy(world, "a")
    world.request("b")
    world.advance(LEAST_SLICE * SLICE + 0.1)
    assert world.states[EngineName("a")] is S.DRAINING
    world.end(lease)
    assert world.of(SwapOut) == ["a"]
    (effect,) = [effect for effect in world.log if isinstance(effect, SwapOut)]
    assert effect.in_flight == 0


def test_a_wrong_prediction_does_not_make_a_drain_endless() -> None:
    world = world_of(6, 6, tokens=30)
    lease = busy(world, "a")
    world.request("b")
    assert moved_after(world) < 10 * SWAP
    assert world.state(lease) is L.SUSPENDED


def test_swaps_under_contention_keep_to_their_share_of_the_time() -> None:
    world = world_of(6, 6, max_wait=60.0)
    busy(world, "a")
    world.request("b")
    swapping = 0.0
    begun = world.now + 3_000.0  # a quiet device may swap at once, several times in a row
    while world.now < begun + 10_000.0:
        moved_after(world)
        while world.pending:
            world.advance(SWAP)
            swapping += SWAP * (world.now > begun)
            name, what = next(iter(world.pending.items()))
            if isinstance(what, SwapOut):
                world.left(name, seconds=SWAP)
            else:
                world.ready(name, seconds=SWAP)
    assert 0.1 < swapping / (world.now - begun) < 0.22


def test_max_wait_holds_by_a_timer_where_the_share_is_used_up() -> None:
    world = world_of(6, 6, share=0.01)
    busy(world, "a")
    world.request("b")
    waits = []
    for _ in range(6):
        waits.append(moved_after(world))
        world.settle()
    assert max(waits) <= MAX_WAIT
    assert waits[-1] > MAX_WAIT - 2 * SLICE, "nothing but max_wait ends a slice"


def test_a_group_of_requests_may_overtake_a_wish_and_no_more() -> None:
    world = world_of(6, 6, share=0.01)
    busy(world, "a")
    world.request("b")
    for _ in range(2):
        moved_after(world)
        world.settle()
    # The share is used up, so a stays until b has waited for long.
    world.advance(SLICE)
    for _ in range(GROUP_MAX):
        assert world.of(SwapOut) == ["a", "b"]
        world.request("a")
        world.advance(0.1)
    assert world.of(SwapOut) == ["a", "b", "a"]


def test_max_wait_that_cannot_be_kept_is_not_paid_for() -> None:
    slow = taught(NAMES, 40.0)
    world = world_of(6, 6, knowledge=slow)
    busy(world, "a")
    world.request("b")
    assert moved_after(world, most=1000.0) > 80.0


# ----------------------------------------------------------------- priorities


def test_batch_work_makes_way_for_who_waits_in_front_of_it() -> None:
    world = world_of(6, 6, share=0.01)
    busy(world, "a", BATCH)
    world.request("b")
    assert moved_after(world) == pytest.approx(LEAST_SLICE * SLICE, abs=0.11)


def test_batch_work_does_not_push_interactive_work_aside_before_its_limit() -> None:
    world = world_of(6, 6, 6, share=0.2)
    busy(world, "a")
    world.request("b", BATCH)
    world.advance(0.1)
    interactive = world.request("c")
    moved_after(world)
    world.settle()
    assert world.state(interactive) is L.ACTIVE


def test_the_more_urgent_wish_is_first_whatever_its_age() -> None:
    world = world_of(6, 6, 6)
    busy(world, "a")
    world.request("b")
    urgent = world.request("c", URGENT)
    moved_after(world)
    world.settle()
    assert world.state(urgent) is L.ACTIVE


def test_a_deadline_makes_a_wish_more_pressing() -> None:
    world = world_of(6, 6, 6)
    busy(world, "a")
    world.request("b")
    hurried = world.request("c", deadline=9.0)
    moved_after(world)
    world.settle()
    assert world.state(hurried) is L.ACTIVE


def test_batch_work_at_its_limit_is_due_like_all_else() -> None:
    world = world_of(6, 6, 6, quantum=300.0)
    busy(world, "a")
    old = world.request("b", BATCH)
    world.advance(MAX_WAIT - 2.0)
    world.request("c")
    world.advance(2.0 + SLICE)
    world.settle()
    assert world.state(old) is L.ACTIVE


def test_who_was_sent_away_does_not_come_back_before_the_one_for_whom_it_left() -> None:
    world = world_of(6, 6)
    stream = world.request("a", URGENT)
    world.settle()
    world.advance(100.0)
    waiter = world.request("b", BATCH)
    for _ in range(20):
        world.advance(5.0)
        world.settle()
        if world.state(waiter) is L.ACTIVE:
            break
    assert world.of(SwapOut) == ["a"]
    assert world.state(stream) is L.SUSPENDED


# ------------------------------------------------------------------------ RAM


def test_who_is_not_wanted_leaves_ram_for_requests_in_flight() -> None:
    specs = [engine(name, 6, device="g0", ram=DEVICE) for name in NAMES]
    known = taught(NAMES, SWAP)
    for name in NAMES:
        learn_lengths(known, name, [4000] * 40)
    world = World(
        *specs, devices=[gpu("g0"), host(6)], policy="adaptive", quantum=None, knowledge=known
    )
    idle(world, "a")
    stream = busy(world, "b")
    assert world.tiers[EngineName("a")] is Tier.HOST
    world.request("c")
    world.advance(SLICE)
    assert world.of(SwapOut)[-1] == "a", "on to disk"
    assert world.states[EngineName("b")] in {S.READY, S.DRAINING}, "it serves until there is room"
    world.left("a", Tier.DISK)
    assert world.of(SwapOut)[-1] == "b"
    world.settle()
    assert world.state(stream) is L.SUSPENDED
    assert world.tiers[EngineName("b")] is Tier.HOST
