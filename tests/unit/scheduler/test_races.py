"""Races that other model swappers had to mend, or still have; each test is named after its bug.

References are to github.com/doublewordai/llmux and github.com/mostlygeek/llama-swap: the commit
that mended the bug, or the release that has it.
"""

import itertools
from collections.abc import Callable

import pytest

from swapserve.errors import EngineCrashed, EngineUnavailable, QueueFull
from swapserve.ids import DeviceName, EngineName, LeaseId
from swapserve.messages import (
    BringIn,
    EngineSpec,
    GrantLease,
    LeaseEnded,
    LeaseRequested,
    ResumeLease,
    SwapOut,
    Tick,
)
from swapserve.scheduler.policies.adaptive import LEAST_SLICE
from swapserve.scheduler.policies.registry import POLICIES
from swapserve.states import EngineState, LeaseState, Tier
from tests.stateful.traffic import taught
from tests.stateful.world import World, engine, gpu

L = LeaseState
S = EngineState
A, B = EngineName("a"), EngineName("b")
SWAP = 1.0
SWAPPING = [name for name, kind in POLICIES.items() if kind.swaps]
CUTTING = [name for name, kind in POLICIES.items() if kind.bounded]
"""Policies that cut off a busy engine in the end, so that nobody waits for ever."""
DRAINING = [name for name in SWAPPING if name not in CUTTING]

every_policy = pytest.mark.parametrize("policy", SWAPPING)
every_cutting_policy = pytest.mark.parametrize("policy", CUTTING)


def crowd(policy: str, *specs: EngineSpec, **options: float | bool) -> World:
    """Return a world in which a swap takes a second each way, as everybody knows."""
    specs = specs or (engine("a"), engine("b"))
    knowledge = taught([spec.name for spec in specs], SWAP)
    options = {"quantum": None, **options}  # type: ignore[dict-item]
    return World(*specs, policy=policy, knowledge=knowledge, **options)  # type: ignore[arg-type]


def one_gpu(policy: str, *sizes: int) -> World:
    specs = [engine(name, size, device="g0") for name, size in zip("abcd", sizes, strict=False)]
    return World(*specs, devices=[gpu("g0")], policy=policy, quantum=None)


def busy(world: World, name: str = "a") -> LeaseId:
    """Bring the engine in for a request that goes on and on."""
    lease = world.request(name)
    world.settle()
    assert world.state(lease) is L.ACTIVE
    return lease


def idle(world: World, name: str = "a") -> None:
    """Bring the engine in for a request that is answered at once."""
    world.end(busy(world, name))


def granted(world: World, lease: LeaseId) -> bool:
    return GrantLease(lease=lease) in world.log


def go_on(world: World, seconds: float = 100.0) -> None:
    """Let time pass in which every transition succeeds, as soon as it is asked for."""
    for _ in range(int(seconds)):
        world.settle()
        world.advance(1.0)


# ------------------------------------------------------------------- hand-off


@every_policy
@pytest.mark.parametrize("order", list(itertools.permutations(["end", "wish", "tick"])))
def test_lost_wake_up(policy: str, order: tuple[str, ...]) -> None:
    """The end of the last request and the wish for the room cross; the drain must not hang.

    llmux 2.4.0 looks at the count, then begins to listen for its change.
    """
    world = crowd(policy)
    stream = busy(world)
    steps: dict[str, Callable[[], object]] = {
        "end": lambda: world.end(stream),
        "wish": lambda: world.request("b"),
        "tick": lambda: world.send(Tick()),
    }
    for step in order:
        steps[step]()
    assert world.transitions() == ["in a", "out a"]


@every_policy
def test_woken_waiters_have_not_started_when_the_next_switch_drains_them(policy: str) -> None:
    """Engines come and go without end and none ever answers: llmux 210b1b0."""
    world = crowd(policy, max_wait=0.0)
    world.request("a")
    world.request("b")
    served = dict.fromkeys("ab", 0)
    for _ in range(200):
        for name in tuple(world.pending):
            before = len(world.log)
            world.succeed(name)
            came = [e for e in world.log[before:] if isinstance(e, GrantLease | ResumeLease)]
            if world.states[name] is S.READY:
                assert came, "nobody is answered by an engine that has just come"
        for lease in [*world.on("a", L.ACTIVE), *world.on("b", L.ACTIVE)]:
            name = world.leases[lease].engine
            world.request(name)
            world.advance(0.5)
            if world.state(lease) is L.ACTIVE:
                world.end(lease)
                served[name] += 1
        world.advance(0.5)
    assert min(served.values()) > 0


@every_policy
def test_activated_then_slept_at_once(policy: str) -> None:
    """An engine is put to sleep as soon as it wakes, which GPUs do not like: llmux 985ac74.

    Everybody is over age here. The tenure begins when the engine is back, however long that took.
    """
    world = crowd(policy, max_wait=0.0)
    busy(world)
    world.advance(50.0)
    world.request("b")
    world.advance(50.0)
    for lease in world.on("a", L.ACTIVE):
        world.end(lease)
    world.left("a")
    world.request("a")
    world.advance(500.0)
    world.ready("b")
    world.advance(LEAST_SLICE * 2 * SWAP * 0.9)
    assert world.transitions() == ["in a", "out a", "in b"]
    assert world.on("b", L.ACTIVE)


@pytest.mark.parametrize("policy", DRAINING)
def test_a_request_slips_in_between_the_end_of_the_drain_and_the_swap_out(policy: str) -> None:
    """It is admitted to an engine that is about to be frozen: llmux 18d8c72.

    Here the drained engine even has to wait for its turn on the GPU.
    """
    world = one_gpu(policy, 4, 4, 8)
    first, second = world.request("a"), world.request("b")
    world.settle()
    world.request("c")
    world.advance(world.rules.max_wait_s)
    for name, lease in (("a", first), ("b", second)):
        assert world.states[EngineName(name)] is S.DRAINING
        assert world.state(world.request(name)) is L.WAITING
        world.end(lease)
    assert world.states[B] is S.DRAINING, "its turn comes after that of the first"
    assert world.state(world.request("b")) is L.WAITING
    world.settle()
    inside = [(e.engine, e.in_flight) for e in world.log if isinstance(e, SwapOut)][:2]
    assert inside == [("a", 0), ("b", 0)]


@every_policy
def test_a_request_slips_in_while_the_engine_sleeps_and_the_next_one_wakes(policy: str) -> None:
    """The gate opens after the sleep, not after the wake-up: llmux 2.4.0."""
    world = crowd(policy)
    idle(world)
    other = world.request("b")
    late = world.request("a")
    assert world.state(late) is L.WAITING
    world.left("a")
    assert world.state(late) is L.WAITING
    world.ready("b")
    assert world.state(late) is L.WAITING
    world.end(other)
    go_on(world)
    assert world.state(late) is L.ACTIVE


@pytest.mark.parametrize("first", ["command", "request"])
@every_policy
def test_a_fast_path_forwards_to_an_engine_that_is_stopping(policy: str, first: str) -> None:
    """It was ready when it was looked at: llama-swap #277 (c3f0d43e)."""
    world = crowd(policy)
    idle(world)
    if first == "request":
        before = world.request("a")
        world.command("stop", "a")
        assert isinstance(world.error(before), EngineUnavailable)
    else:
        world.command("stop", "a")
    assert isinstance(world.error(world.request("a")), EngineUnavailable)
    assert world.transitions()[-1] == "stop a"


# ------------------------------------------------------- switches for nobody


@every_policy
def test_a_stale_queued_switch_runs_for_nobody(policy: str) -> None:
    """Whoever wanted it was served, or left, before its turn came: llmux 86ac9b6."""
    world = one_gpu(policy, 4, 6, 6)
    idle(world)
    world.request("b")  # has the turn on the GPU
    waiter = world.request("c")  # its swap out of a has to wait
    world.end(waiter)
    world.ready("b")
    go_on(world)
    assert world.transitions() == ["in a", "in b"]


@every_policy
def test_waiters_who_have_left_still_trigger_switches(policy: str) -> None:
    """They are not taken out of the queue: llmux 2.4.0; llama-swap #844 (ed77385d)."""
    world = crowd(policy, queue_limit=3)
    stream = busy(world)
    waiters = [world.request("b") for _ in range(3)]
    assert isinstance(world.error(world.request("b")), QueueFull)
    for waiter in waiters:
        world.end(waiter)
    world.end(stream)
    go_on(world)
    assert world.transitions() == ["in a"]
    assert world.error(world.request("b")) is None, "nor do they fill the queue"


@every_policy
def test_a_deferred_switch_that_is_not_needed_any_more_spoils_the_next_one(policy: str) -> None:
    """`defer_pending` stays set, so later requests are skipped: llmux 0.9."""
    world = crowd(policy)
    stream = busy(world)
    world.end(world.request("b"))  # it was to wait for a's slice
    later = world.request("b")
    if policy in DRAINING:
        world.end(stream)
    go_on(world)
    assert granted(world, later)


@every_policy
def test_force_switch_to_an_engine_with_an_empty_queue_does_nothing(policy: str) -> None:
    """Since 86ac9b6, as llmux 2.4.0 has it: who orders an engine in is not in its queue."""
    world = crowd(policy)
    idle(world)
    command = world.command("swap_in", "b")
    world.settle()
    assert world.outcomes[command] is None
    assert world.transitions() == ["in a", "out a", "in b"]


@every_policy
def test_a_client_who_leaves_while_frozen_has_its_engine_fetched_back(policy: str) -> None:
    """What it left behind is no demand; the next one who wants the engine thaws it as well."""
    world = crowd(policy)
    stream = busy(world)
    world.command("swap_out", "a")
    assert world.state(stream) is L.SUSPENDED
    world.left("a")
    world.end(stream)
    go_on(world)
    assert world.transitions() == ["in a", "out a"]


# ------------------------------------------------------------ who is stranded


@pytest.mark.parametrize("outcome", ["success", "refused", "fails to leave", "fails to come"])
@every_policy
def test_requests_that_arrive_during_a_switch_are_stranded(policy: str, outcome: str) -> None:
    """Nobody looks again when it is over: llmux ed2450e, 9c23ec6."""
    world = crowd(policy, engine("a"), engine("b"), engine("c"))
    idle(world)
    world.request("b")
    late = [world.request(name) for name in "abc"]
    if outcome == "fails to leave":
        world.fail("a", S.READY, Tier.DEVICE)
    else:
        world.left("a")
    late += [world.request(name) for name in "abc"]
    coming = next(iter(world.pending), None)
    if outcome == "refused":
        assert coming is not None
        world.refuse(coming)
    elif outcome == "fails to come":
        assert coming is not None
        world.fail(coming)
    late += [world.request(name) for name in "abc"]
    for _ in range(60):
        go_on(world, 4)
        for name in "abc":
            for lease in world.on(name, L.ACTIVE):
                world.end(lease)
    assert not world.live
    told = [lease for lease in late if world.error(lease) is not None]
    assert all(world.leases[lease].engine == coming for lease in told)
    assert bool(told) == (outcome == "fails to come")


@every_cutting_policy
def test_age_is_looked_at_only_when_a_request_arrives(policy: str) -> None:
    """With no arrival there is no switch: `time_slice` of llmux 0.9. A timer must see to it."""
    world = crowd(policy)
    stream = busy(world)
    waiter = world.request("b")
    go_on(world, world.rules.max_wait_s)
    assert granted(world, waiter)
    go_on(world, world.rules.max_wait_s)
    assert ResumeLease(lease=stream) in world.log, "which holds for those who are frozen, too"


def test_age_is_looked_at_by_a_timer_also_where_nobody_is_cut_off() -> None:
    """As above; the deeper queue gives way to the older wish, and the engine in its way drains."""
    world = crowd("time-slice-drain")
    busy(world)
    world.request("b")
    world.advance(world.rules.max_wait_s)
    assert world.states[A] is S.DRAINING


@every_policy
def test_endless_traffic_for_one_model_starves_another(policy: str) -> None:
    """First come, first served, as long as the first one keeps coming: llama-swap #612."""
    world = crowd(policy)
    busy(world)
    waiter = world.request("b")
    for _ in range(80):
        world.request("a")
        for lease in world.on("a", L.ACTIVE)[:-1]:
            world.end(lease)
        world.advance(0.5)
        world.settle()
        if world.states[A] is S.DRAINING:
            for lease in world.on("a", L.ACTIVE):
                world.end(lease)
    assert granted(world, waiter)


@pytest.mark.parametrize("policy", DRAINING)
def test_one_endless_stream_holds_the_lock_for_every_model(policy: str) -> None:
    """There is one lock, and a drain without a limit holds it: llmux 2.4.0.

    Where a policy never cuts a stream off, only those wait who need what it holds.
    """
    world = World(
        engine("a", device="g0"),
        engine("b", device="g0"),
        engine("c", device="g1"),
        devices=[gpu("g0"), gpu("g1")],
        policy=policy,
    )
    busy(world)
    waiter = world.request("b")
    go_on(world, 40)
    assert world.states[A] is S.DRAINING
    elsewhere = world.request("c")
    go_on(world, 40)
    assert world.state(waiter) is L.WAITING
    assert world.state(elsewhere) is L.ACTIVE


@every_cutting_policy
def test_switching_is_set_before_the_cooldown(policy: str) -> None:
    """The engine that is still awake turns its requests away while the GPU idles: llmux 2.4.0."""
    world = crowd(policy, engine("a", min_resident=8.0), engine("b"))
    busy(world)
    world.request("b")
    for _ in range(7):
        world.advance(1.0)
        assert world.state(world.request("a")) is L.ACTIVE


@pytest.mark.parametrize("first", ["request", "timer"])
@every_policy
def test_a_ttl_unload_races_a_grant(policy: str, first: str) -> None:
    """Both act on what they saw before, and the engine is never used again: llama-swap #946."""
    world = crowd(policy, engine("a", ttl=5.0), engine("b"))
    idle(world)
    assert world.timer is not None
    world.now = world.timer
    if first == "timer":
        world.ring()
        lease = world.request("a")
        assert world.state(lease) is L.WAITING
        world.settle()
        assert world.transitions() == ["in a", "out a", "in a"]
    else:
        lease = world.request("a")
        world.ring()
        assert world.transitions() == ["in a"]
    assert world.state(lease) is L.ACTIVE
    world.advance(100.0)
    assert world.state(lease) is L.ACTIVE


@every_policy
def test_a_time_to_live_of_nothing(policy: str) -> None:
    """An engine that may not be idle leaves before its first request, or never: llama-swap #827."""
    world = crowd(policy, engine("a", ttl=0.0), engine("b"))
    lease = busy(world)
    world.advance(10.0)
    assert world.transitions() == ["in a"]
    world.end(lease)
    go_on(world, 10)
    assert world.transitions() == ["in a", "out a"]


@every_policy
def test_stop_is_ignored_while_the_engine_starts(policy: str) -> None:
    """llama-swap #670 (231e6229): it is not running yet, so there is nothing to stop."""
    world = crowd(policy)
    waiter = world.request("a")
    command = world.command("stop", "a")
    world.settle()
    assert world.outcomes[command] is None
    assert world.transitions() == ["in a", "stop a"]
    assert isinstance(world.error(waiter), EngineUnavailable)


# ------------------------------------------------------- memory, and failures


@every_policy
def test_a_client_who_leaves_cancels_the_switch(policy: str) -> None:
    """An orphan holds the memory, and the next request starts a second: llmux f722a4e."""
    world = crowd(policy)
    waiter = world.request("a")
    world.end(waiter)
    assert world.core.state(A) is S.STARTING
    again = world.request("a")
    world.request("b")
    assert world.of(BringIn) == ["a"], "one start, and no room for another engine beside it"
    world.ready("a")
    assert world.state(again) is L.ACTIVE
    assert world.of(BringIn) == ["a"]


@every_policy
def test_a_half_woken_engine_keeps_its_memory(policy: str) -> None:
    """Its start failed, what it had taken was not given back, and the next runs out: llmux #6."""
    world = crowd(policy)
    world.request("a")
    waiter = world.request("b")
    world.fail("a", S.FAILED, Tier.DEVICE)
    world.advance(20.0)
    assert world.transitions() == ["in a", "stop a"]
    assert world.state(waiter) is L.WAITING
    world.left("a")
    assert world.transitions() == ["in a", "stop a", "in b"]


@every_policy
def test_a_failed_sleep_still_wakes_the_target(policy: str) -> None:
    """Both are there then, and the GPU has no room for both: llmux 2.4.0."""
    world = crowd(policy)
    idle(world)
    waiter = world.request("b")
    world.fail("a", S.READY, Tier.DEVICE)
    world.advance(1.0)
    assert world.of(BringIn) == ["a"]
    go_on(world, 10)
    assert world.state(waiter) is L.ACTIVE
    assert world.of(SwapOut) == ["a", "a"]


@pytest.mark.parametrize("while_leaving", [False, True])
@every_policy
def test_a_dead_engine_counts_as_running(policy: str, while_leaving: bool) -> None:
    """Requests go to a process that is no more: llmux 985ac74.

    And its memory is free when that was seen, not when its process was heard to be gone.
    """
    world = crowd(policy)
    stream = busy(world)
    if while_leaving:
        world.end(stream)
        world.request("b")
        world.crash("a")
        assert world.of(BringIn) == ["a"]
        world.left("a")
        assert world.of(BringIn) == ["a", "b"]
        return
    world.crash("a")
    assert isinstance(world.error(stream), EngineCrashed)
    late = world.request("a")
    assert world.state(late) is L.WAITING
    go_on(world, 10)
    assert world.state(late) is L.ACTIVE
    assert world.transitions() == ["in a", "in a"]


@every_policy
def test_a_cold_start_measures_memory_while_another_engine_gives_it_back(policy: str) -> None:
    """Engines that size themselves by what is free fail, or take too much: one move at a time."""
    world = one_gpu(policy, 4, 4)
    idle(world)
    world.command("swap_out", "a")
    world.request("b")
    assert world.transitions() == ["in a", "out a"], "there is room, but not yet a turn"
    world.left("a")
    assert world.transitions()[-1] == "in b"


@every_policy
def test_the_end_of_a_request_crosses_with_its_refusal(policy: str) -> None:
    """Whoever handles both writes to an answer that is somebody else's: llama-swap #804."""
    world = crowd(policy, queue_timeout=10.0)
    busy(world)
    waiter = world.request("b")
    world.advance(10.0)
    for lease in world.on("a", L.ACTIVE):
        world.end(lease)
    assert world.error(waiter) is not None
    late = world.request("b")
    before = [world.core.counts(EngineName(name)) for name in "ab"]
    world.send(LeaseEnded(lease=waiter))
    world.send(LeaseEnded(lease=LeaseId("nobody's")))
    assert [world.core.counts(EngineName(name)) for name in "ab"] == before
    go_on(world, 5)
    assert granted(world, late)


@every_policy
def test_a_request_is_counted_twice(policy: str) -> None:
    """Whose lease is known already cannot ask again: its first end would leave the second one."""
    world = crowd(policy)
    lease = busy(world)
    with pytest.raises(ValueError, match="exists already"):
        world.core.handle(LeaseRequested(lease=lease, engine=B), world.now)


@every_policy
def test_a_device_of_another_group_is_planned_by_the_wrong_owner(policy: str) -> None:
    """Two schedulers move engines of one GPU: here each device has one plan, and one only."""
    world = World(
        engine("a", device="g0"),
        engine("b", device="g0"),
        engine("c", device="g1"),
        engine("d", device="g1"),
        devices=[gpu("g0"), gpu("g1")],
        policy=policy,
    )
    idle(world, "a")
    idle(world, "c")
    world.request("b")
    world.request("d")
    assert world.transitions()[2:] == ["out a", "out c"]
    world.left("c")
    assert world.transitions()[2:] == ["out a", "out c", "in d"]
    assert world.core.devices()[DeviceName("g0")].committed_bytes == 6
