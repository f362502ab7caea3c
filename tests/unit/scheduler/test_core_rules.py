"""Rules that others learned the hard way, one test each."""

import pytest

from swapserve.errors import (
    CapacityError,
    EngineCrashed,
    EngineUnavailable,
    IllegalTransition,
    ModelNotFound,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
    StartFailed,
)
from swapserve.ids import EngineName
from swapserve.messages import Drain, EngineReady, GrantLease, SwapOut
from swapserve.states import EngineState, LeaseState, Tier
from tests.stateful.world import DEVICE, World, engine

L = LeaseState
S = EngineState


def resident(world: World, name: str) -> None:
    """Bring the engine in for a request that is answered at once."""
    lease = world.request(name)
    world.settle()
    world.end(lease)


def test_a_request_for_a_ready_engine_is_granted_at_once() -> None:
    world = World(engine("a"))
    resident(world, "a")
    lease = world.request("a")
    assert world.state(lease) is L.ACTIVE
    assert world.transitions() == ["in a"]


def test_engines_that_fit_together_are_resident_together() -> None:
    world = World(engine("a", 4), engine("b", 6))
    resident(world, "a")
    resident(world, "b")
    assert world.transitions() == ["in a", "in b"]


def test_many_waiters_for_one_engine_cause_one_swap() -> None:
    world = World(engine("a"), engine("b"))
    resident(world, "a")
    leases = [world.request("b") for _ in range(20)]
    world.settle()
    assert world.transitions() == ["in a", "out a", "in b"]
    granted = [effect.lease for effect in world.log if isinstance(effect, GrantLease)]
    assert granted[1:] == leases


def test_a_client_that_leaves_the_queue_causes_no_swap() -> None:
    world = World(engine("a"), engine("b"))
    world.request("a")
    world.settle()
    waiter = world.request("b")  # a is within its quantum
    world.end(waiter)
    world.advance(1000)
    assert world.transitions() == ["in a"]


def test_nobody_is_brought_in_when_the_last_waiter_left_while_the_victim_was_leaving() -> None:
    world = World(engine("a"), engine("b"))
    resident(world, "a")
    waiter = world.request("b")
    assert world.transitions() == ["in a", "out a"]
    world.end(waiter)
    world.left("a")
    assert world.transitions() == ["in a", "out a"]
    assert world.core.devices()[world.devices[0].name].reserved_bytes == 0


def test_an_engine_just_brought_in_keeps_its_device_until_its_caller_was_served() -> None:
    world = World(engine("a"), engine("b"), max_wait=1.0)
    resident(world, "a")
    caller = world.request("b")
    waiter = world.request("a")
    world.settle()
    assert world.state(caller) is L.ACTIVE
    world.advance(5.0)  # the other is over-age by now, the quantum is not over
    assert world.transitions() == ["in a", "out a", "in b"]
    world.end(caller)
    assert world.transitions()[-1] == "out b"
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_an_engine_brought_in_on_command_is_kept_for_a_quantum() -> None:
    world = World(engine("a"), engine("b"))
    world.command("swap_in", "a")
    world.settle()
    world.request("b")
    world.advance(9.9)
    assert world.transitions() == ["in a"]
    world.advance(0.1)
    assert world.transitions() == ["in a", "out a"]


def test_a_request_for_a_leaving_engine_waits_for_its_return() -> None:
    world = World(engine("a"), engine("b"))
    resident(world, "a")
    other = world.request("b")
    late = world.request("a")
    assert world.state(late) is L.WAITING
    world.settle()
    world.end(other)
    world.settle()
    assert world.state(late) is L.ACTIVE


def test_two_waiters_that_share_one_idle_victim_are_both_served() -> None:
    world = World(engine("a", 10), engine("b", 5), engine("c", 5))
    resident(world, "a")
    first, second = world.request("b"), world.request("c")
    assert world.transitions() == ["in a", "out a"]
    world.settle()
    assert world.state(first) is world.state(second) is L.ACTIVE
    assert world.transitions() == ["in a", "out a", "in b", "in c"]


def test_engines_are_served_in_the_order_of_their_oldest_waiter() -> None:
    world = World(engine("a", 10), engine("b", 10), engine("c", 10), quantum=1.0)
    resident(world, "a")
    world.request("c")
    world.request("b")
    world.request("c")
    for _ in range(4):
        world.settle()
        world.advance(1.0)
    assert world.of(SwapOut)[:2] == ["a", "c"]
    assert world.transitions()[2:5] == ["in c", "out c", "in b"]


def test_a_later_arrival_does_not_steal_the_bytes_of_a_leaving_victim() -> None:
    world = World(engine("a", 10), engine("b", 8), engine("c", 4))
    resident(world, "a")
    world.request("b")
    world.request("c")
    world.left("a")
    assert world.transitions() == ["in a", "out a", "in b"]


def test_a_stream_of_small_wishes_does_not_keep_a_large_one_out() -> None:
    world = World(engine("x", 5), engine("y", 5), engine("big", 10), engine("small", 5))
    world.request("x")
    resident(world, "y")
    large = world.request("big")  # x is within its quantum
    world.request("small")
    assert world.transitions() == ["in x", "in y"]
    world.advance(10.0)
    world.settle()
    assert world.state(large) is L.ACTIVE


def test_a_failed_swap_out_never_leads_to_a_swap_in_of_the_next() -> None:
    world = World(engine("a"), engine("b"))
    resident(world, "a")
    waiter = world.request("b")
    world.fail("a", S.READY, Tier.DEVICE)
    assert world.transitions() == ["in a", "out a"]
    world.advance(1.9)
    assert world.transitions() == ["in a", "out a"]
    world.advance(0.1)
    assert world.transitions() == ["in a", "out a", "out a"]
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_another_victim_goes_when_the_first_could_not() -> None:
    world = World(engine("a", 5), engine("b", 5), engine("c", 5))
    resident(world, "a")
    world.advance(1.0)
    resident(world, "b")
    world.request("c")
    assert world.transitions()[-1] == "out a"
    world.fail("a", S.READY, Tier.DEVICE)
    assert world.transitions()[-1] == "out b"


def test_the_bytes_of_a_broken_engine_are_taken_back_by_stopping_it() -> None:
    world = World(engine("a"), engine("b"))
    resident(world, "a")
    waiter = world.request("b")
    world.fail("a", S.FAILED, Tier.DEVICE, lost=True)
    assert world.transitions()[-1] == "out a"
    world.advance(2.0)
    assert world.transitions()[-1] == "stop a"
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_the_least_recently_used_idle_engine_leaves() -> None:
    world = World(engine("a", 5), engine("b", 5), engine("c", 5))
    resident(world, "a")
    world.advance(1.0)
    resident(world, "b")
    world.advance(1.0)
    world.end(world.request("a"))
    world.request("c")
    assert world.of(SwapOut) == ["b"]


def test_nobody_leaves_who_is_not_needed() -> None:
    world = World(engine("small", 2), engine("large", 8), engine("c", 8))
    resident(world, "small")
    world.advance(1.0)
    resident(world, "large")
    world.request("c")
    assert world.of(SwapOut) == ["large"]


def test_a_busy_engine_is_preempted_after_its_quantum_and_its_lease_goes_on() -> None:
    world = World(engine("a"), engine("b"))
    stream = world.request("a")
    world.settle()
    waiter = world.request("b")
    world.advance(9.9)
    assert world.of(SwapOut) == []
    world.advance(0.1)
    assert world.state(stream) is L.SUSPENDED
    assert [e.in_flight for e in world.log if isinstance(e, SwapOut)] == [1]
    world.settle()
    assert world.state(waiter) is L.ACTIVE
    world.end(waiter)
    world.settle()
    assert world.state(stream) is L.ACTIVE


def test_an_engine_that_cannot_be_preempted_is_drained_and_grants_nothing_more() -> None:
    world = World(engine("a"), engine("b"), can_preempt=False)
    stream = world.request("a")
    world.settle()
    waiter = world.request("b")
    world.advance(10.0)
    late = world.request("a")
    assert world.core.state(EngineName("a")) is S.DRAINING
    world.advance(500.0)
    assert world.state(stream) is L.ACTIVE
    world.end(stream)
    world.settle()
    assert world.state(waiter) is L.ACTIVE
    assert world.state(late) is L.WAITING


def test_two_wishes_do_not_count_on_the_same_draining_engine() -> None:
    world = World(
        *(engine(name, 6) for name in "abcd"), capacity=12, can_preempt=False, quantum=10.0
    )
    world.request("a")
    world.settle()
    world.advance(5.0)
    world.request("b")
    world.settle()
    world.request("c")
    world.request("d")
    world.advance(5.0)
    assert world.core.state(EngineName("b")) is S.READY
    world.advance(5.0)
    assert {world.core.state(EngineName(name)) for name in "ab"} == {S.DRAINING}


def test_a_drain_is_taken_back_when_its_caller_leaves() -> None:
    world = World(engine("a"), engine("b"), policy="lru-drain")
    world.request("a")
    world.settle()
    waiter = world.request("b")
    late = world.request("a")
    assert world.state(late) is L.WAITING
    world.end(waiter)
    assert [e.on for e in world.log if isinstance(e, Drain)] == [True, False]
    assert world.state(late) is L.ACTIVE


def test_a_policy_that_drains_cuts_nobody_off_whatever_the_age_of_who_waits() -> None:
    world = World(engine("a"), engine("b"), policy="lru-drain")
    stream = world.request("a")
    world.settle()
    waiter = world.request("b")
    assert world.core.state(EngineName("a")) is S.DRAINING
    world.advance(500.0)
    assert world.state(stream) is L.ACTIVE
    world.end(stream)
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_a_waiter_over_age_overrides_a_long_quantum_once_the_callers_are_done() -> None:
    world = World(engine("a"), engine("b"), quantum=500.0)
    caller = world.request("a")
    world.settle()
    world.request("a")
    world.end(caller)
    world.request("b")
    world.advance(29.9)
    assert world.of(SwapOut) == []
    world.advance(0.1)
    assert world.of(SwapOut) == ["a"]


def test_slow_swaps_do_not_keep_two_busy_engines_from_progress() -> None:
    """Each is over-age whenever the other becomes ready; each still gets its quantum."""
    world = World(engine("a"), engine("b"))
    world.request("a")
    world.request("b")
    for _ in range(6):
        (name,) = world.pending
        world.advance(40.0)
        if world.states[name] is S.SWAPPING_OUT:
            world.left(name)
        else:
            world.ready(name)
            world.advance(9.9)
            assert world.states[name] is S.READY
            world.advance(0.1)
            assert world.states[name] is S.SWAPPING_OUT
    assert world.transitions() == ["in a", "out a", "in b", "out b", "in a", "out a", "in b"]


def test_suspended_leases_bring_their_engine_back() -> None:
    world = World(engine("a"), engine("b"), quantum=1.0)
    first = world.request("a")
    world.settle()
    second = world.request("b")
    world.advance(1.0)
    world.settle()
    world.advance(1.0)
    world.settle()
    assert world.state(first) is L.ACTIVE
    assert world.state(second) is L.SUSPENDED


def test_pinned_engines_are_never_victims_and_the_rest_is_told() -> None:
    world = World(engine("a", 6, pin=True), engine("b", 6))
    resident(world, "a")
    waiter = world.request("b")
    assert isinstance(world.error(waiter), CapacityError)
    world.command("unpin", "a")
    waiter = world.request("b")
    world.settle()
    assert world.state(waiter) is L.ACTIVE


def test_pinning_an_engine_that_is_away_does_not_load_it() -> None:
    world = World(engine("a"))
    command = world.command("pin", "a")
    assert world.outcomes[command] is None
    assert world.transitions() == []


def test_an_engine_larger_than_its_device_is_refused() -> None:
    world = World(engine("a", 11))
    assert isinstance(world.error(world.request("a")), CapacityError)


def test_an_unknown_footprint_takes_the_whole_device_until_it_is_measured() -> None:
    world = World(engine("a", None), engine("b", 4))
    world.request("a")
    waiter = world.request("b")
    assert world.transitions() == ["in a"]
    world.ready("a", 5)
    assert world.transitions() == ["in a", "in b"]
    world.settle()
    assert world.state(waiter) is L.ACTIVE
    assert world.core.footprint(EngineName("a")) == {DEVICE: 5}


def test_use_beyond_the_plan_evicts_idle_others() -> None:
    world = World(engine("a", 5), engine("b", 5))
    resident(world, "a")
    world.request("b")
    world.ready("b", 8)
    assert world.transitions()[-1] == "out a"
    assert world.core.devices()[world.devices[0].name].excess_bytes == 3
    world.left("a")
    assert world.core.devices()[world.devices[0].name].excess_bytes == 0


def test_preload_waits_until_every_engine_was_seen() -> None:
    world = World(engine("a", 6, preload=True), engine("b", 6, preload=True), see=False)
    world.see("a")
    assert world.transitions() == []
    world.see("b")
    assert world.transitions() == ["in a"]
    world.settle()
    world.advance(100.0)
    assert world.transitions() == ["in a"]


def test_an_engine_idle_beyond_its_ttl_is_swapped_out() -> None:
    world = World(engine("a", ttl=5.0))
    resident(world, "a")
    world.advance(3.0)
    lease = world.request("a")
    world.advance(100.0)
    world.end(lease)
    world.advance(4.9)
    assert world.of(SwapOut) == []
    world.advance(0.1)
    assert [e.cause for e in world.log if isinstance(e, SwapOut)] == ["ttl"]


def test_a_failed_start_refuses_its_callers_and_backs_off() -> None:
    world = World(engine("a"))
    caller = world.request("a")
    world.fail("a")
    assert isinstance(world.error(caller), StartFailed)
    refused = world.error(world.request("a"))
    assert isinstance(refused, EngineUnavailable)
    assert "unhealthy" in str(refused)
    assert "2.0 s" in str(refused)
    world.advance(2.0)
    world.request("a")
    world.fail("a")
    world.advance(3.9)
    assert world.error(world.request("a")) is not None
    world.advance(0.1)
    lease = world.request("a")
    world.settle()
    assert world.state(lease) is L.ACTIVE


def test_start_clears_the_backoff() -> None:
    world = World(engine("a"))
    world.request("a")
    world.fail("a")
    command = world.command("start", "a")
    world.settle()
    assert world.outcomes[command] is None


def test_a_crash_loses_running_leases_and_keeps_waiting_ones() -> None:
    world = World(engine("a"), engine("b"), policy="lru-drain")
    running = world.request("a")
    world.settle()
    other = world.request("b")
    waiting = world.request("a")
    world.crash("a")
    assert isinstance(world.error(running), EngineCrashed)
    assert world.state(waiting) is L.WAITING
    world.settle()
    world.end(other)
    world.advance(2.0)
    world.settle()
    assert world.state(waiting) is L.ACTIVE


def test_a_crash_in_mid_transition_frees_nothing_before_the_transition_is_answered() -> None:
    world = World(engine("a"), engine("b"))
    resident(world, "a")
    world.request("b")
    world.crash("a")
    assert world.transitions() == ["in a", "out a"]
    world.left("a")
    assert world.transitions() == ["in a", "out a", "in b"]


def test_leases_lost_with_the_process_are_told() -> None:
    world = World(engine("a"), engine("b"), quantum=0.5)
    stream = world.request("a")
    world.settle()
    world.request("b")
    world.advance(0.5)
    world.left("a", Tier.NONE, lost=True)
    assert isinstance(world.error(stream), EngineUnavailable)


def test_the_queue_has_a_limit_and_a_longest_wait() -> None:
    world = World(engine("a"), queue_limit=2, queue_timeout=60.0)
    first = world.request("a")
    world.request("a")
    assert isinstance(world.error(world.request("a")), QueueFull)
    world.advance(60.0)
    assert isinstance(world.error(first), QueueTimeout)


def test_shutdown_refuses_who_waits_and_starts_nothing() -> None:
    world = World(engine("a"), engine("b"))
    waiting = world.request("a")
    command = world.command("swap_in", "a")
    world.shut_down()
    assert isinstance(world.error(waiting), ShuttingDown)
    assert isinstance(world.outcomes[command], ShuttingDown)
    assert isinstance(world.error(world.request("b")), ShuttingDown)
    assert isinstance(world.outcomes[world.command("start", "b")], ShuttingDown)
    world.settle()
    assert world.transitions() == ["in a"]


def test_an_unknown_model_is_refused() -> None:
    world = World(engine("a"))
    assert isinstance(world.error(world.request("z")), ModelNotFound)


def test_an_outcome_that_answers_nothing_is_a_bug_and_raises() -> None:
    world = World(engine("a"))
    with pytest.raises(IllegalTransition):
        world.core.handle(EngineReady(engine=EngineName("a"), footprint={}, seconds=0.0), world.now)


def test_bytes_that_leave_for_one_are_not_counted_on_by_the_next() -> None:
    world = World(*(engine(name, 10) for name in "abcd"), capacity=20)
    resident(world, "a")
    world.advance(1.0)
    resident(world, "b")
    world.request("c")
    world.request("d")
    assert world.of(SwapOut) == ["a", "b"]


def test_the_end_of_the_last_caller_lets_an_over_age_waiter_in_at_once() -> None:
    world = World(engine("a"), engine("b"), quantum=500.0)
    caller = world.request("a")
    world.settle()
    other = world.request("a")
    world.request("b")
    world.advance(100.0)
    assert world.of(SwapOut) == []
    world.end(caller)
    assert world.of(SwapOut) == ["a"]
    assert world.state(other) is L.SUSPENDED


def test_a_wish_that_nothing_can_help_now_does_not_block_younger_ones() -> None:
    world = World(engine("x", 5), engine("y", 5), engine("big", 10), engine("small", 5))
    resident(world, "x")
    world.advance(1.0)
    resident(world, "y")
    first = world.request("small")
    world.fail("x", S.READY, Tier.DEVICE)  # y goes instead, x may not be asked for a while
    world.end(first)
    world.settle()
    resident(world, "y")
    world.request("big")
    assert world.transitions()[-1] == "in y"
    younger = world.request("small")
    world.settle()
    assert world.state(younger) is L.ACTIVE


def test_engines_found_resident_serve_at_once_and_unknown_ones_take_what_is_left() -> None:
    world = World(engine("a", None), engine("b", None), engine("c", 4), see=False)
    world.see("a", S.READY, Tier.DEVICE)
    lease = world.request("a")
    assert world.state(lease) is L.ACTIVE
    world.see("b", S.READY, Tier.DEVICE, 5)
    world.see("c")
    account = world.core.devices()[world.devices[0].name]
    assert (account.committed_bytes, account.excess_bytes) == (10, 0)
    world.measure("a", 1)
    world.request("c")
    assert world.transitions() == ["in c"]


def test_an_engine_that_grew_beyond_its_device_still_gets_its_suspended_leases_back() -> None:
    world = World(engine("a", 6), engine("b", 6))
    stream = world.request("a")
    world.settle()
    world.measure("a", 12)
    other = world.request("b")
    world.advance(10.0)
    world.left("a")
    assert world.state(stream) is L.SUSPENDED
    assert isinstance(world.error(world.request("a")), CapacityError)
    world.settle()
    world.end(other)
    world.settle()
    assert world.state(stream) is L.ACTIVE
