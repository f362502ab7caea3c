"""Under any load, no request waits longer than the engines before it need for their turns.

Two bounds are derived here, and held against every policy that claims to have one.

With a quantum (`lru`, `lfu`, and `adaptive` where an operator has set one) each engine that is
served before takes a turn: a quantum, once out, once in.

`adaptive` derives the slice from the swap that ends it. A wish that has waited for `max_wait` comes
before all that are younger, and ends every slice but the least: a part of what the swap takes, or,
where so many engines want the device that least slices could not keep `max_wait`, so much that
swaps take their share of the time. Requests about to end may be waited for beyond that, for twice
what the way back takes. Each of the other engines has one older wish at most, which takes a turn:
the least slice, the patience, once out and once in. All of it goes by predicted seconds: the bound
grows by what they are wrong by.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swapserve.messages import EngineSpec
from swapserve.scheduler.policies.adaptive import LEAST_SLICE
from swapserve.scheduler.policies.registry import POLICIES
from swapserve.states import LeaseState, Priority
from tests.stateful.traffic import Arrival, Traffic, taught
from tests.stateful.world import DEVICE, World, engine, gpu, host

L = LeaseState
NAMES = "abcd"
QUANTUM, MAX_WAIT, SWAP, LONGEST = 5.0, 12.0, 3.0, 20.0
BOUNDED = [name for name, kind in POLICIES.items() if kind.bounded]
# Each engine before it: its turn (a quantum, or callers until over-age), once out and once in;
# and everyone may have been brought in once more since, because an idle turn ends early.
TURN = MAX_WAIT + QUANTUM + 2 * SWAP
BOUND = 2 * (len(NAMES) + 1) * TURN

seconds = st.floats(0.1, LONGEST).map(lambda t: round(t, 1))
times = st.floats(0, 200).map(lambda t: round(t, 1))


def arrivals(names: str | list[str], most: int) -> st.SearchStrategy[list[Arrival]]:
    one = st.builds(Arrival, times, st.sampled_from(names), seconds, st.sampled_from(Priority))
    return st.lists(one, min_size=20, max_size=most)


def adaptive_bound(rivals: int, predicted: float, took: float, outs: int = 1) -> float:
    """Return the longest wait with `adaptive`, among so many engines on the same memory.

    Args:
        rivals: engines that want it, the one that waits included.
        predicted: what a move one way is predicted to take.
        took: what it takes.
        outs: moves one after another that make room for one engine.
    """
    swap, share = 2 * predicted, 0.2
    enough = rivals * (1 + LEAST_SLICE) * swap <= MAX_WAIT
    least = (LEAST_SLICE if enough else (1 - share) / share) * swap
    turn = least + 2 * predicted + (outs + 1) * took
    # What is under way when the wish becomes the oldest ends first.
    return MAX_WAIT + rivals * turn + (outs + 1) * took


def bound_of_two(policy: str) -> float:
    """Return the longest wait of an engine whose memory a single other one wants, too."""
    # One quantum of the other, then out and in.
    quantum = QUANTUM + 2 * SWAP + MAX_WAIT
    return max(quantum, adaptive_bound(2, SWAP, SWAP)) if policy == "adaptive" else quantum


@pytest.mark.parametrize("policy", BOUNDED)
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([3, 5, 7, 10]), min_size=4, max_size=4),
    arrivals=arrivals(NAMES, 120),
)
def test_nobody_waits_past_the_bound_with_a_quantum(
    policy: str, sizes: list[int], arrivals: list[Arrival]
) -> None:
    specs = [engine(name, size) for name, size in zip(NAMES, sizes, strict=True)]
    world = World(
        *specs,
        policy=policy,
        quantum=QUANTUM,
        max_wait=MAX_WAIT,
        queue_limit=10**6,
        knowledge=taught(NAMES, SWAP),
    )
    assert Traffic(world, arrivals, SWAP).longest_wait() <= BOUND


@pytest.mark.parametrize(
    ("took", "predicted"), [(SWAP, SWAP), (SWAP, 0.5), (SWAP, 15.0), (0.5, 0.5), (0.5, 0.1)]
)
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([3, 5, 7, 10]), min_size=4, max_size=4),
    look_ahead=st.booleans(),
    arrivals=arrivals(NAMES, 80),
)
def test_nobody_waits_past_the_bound_of_adaptive_whatever_it_predicts(
    took: float, predicted: float, sizes: list[int], look_ahead: bool, arrivals: list[Arrival]
) -> None:
    specs = [engine(name, size) for name, size in zip(NAMES, sizes, strict=True)]
    world = World(
        *specs,
        policy="adaptive",
        quantum=None,
        max_wait=MAX_WAIT,
        queue_limit=10**6,
        look_ahead=look_ahead,
        knowledge=taught(NAMES, predicted),
    )
    longest = Traffic(world, arrivals, took, predicted).longest_wait()
    assert longest <= adaptive_bound(len(NAMES), predicted, took)


# ------------------------------------------------------------------- four GPUs

GPUS = ("g0", "g1", "g2", "g3")
SPANS = {"a": ("g0",), "b": ("g1",), "c": ("g0", "g1"), "d": ("g1", "g2"), "e": ("g3",), "f": GPUS}
# On one GPU whoever leaves does so after the others, so a turn takes a swap out for each of them;
# wishes go by age, so each other engine has one turn before.
GPU_TURN = MAX_WAIT + QUANTUM + (len(SPANS) + 1) * SWAP
GPU_BOUND = len(SPANS) * GPU_TURN


def machine(sizes: list[int], ram: int) -> list[EngineSpec]:
    """Return engines on one, two and four GPUs that rest in RAM, and one that runs there."""
    spans = zip(SPANS.items(), sizes, strict=True)
    on_gpus = [engine(name, size, device=on, ram=DEVICE) for (name, on), size in spans]
    return [*on_gpus, engine("cpu", 6)]


@pytest.mark.parametrize("policy", BOUNDED)
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([3, 5, 7, 10]), min_size=6, max_size=6),
    ram=st.sampled_from([10, 30, 200]),
    arrivals=arrivals([*SPANS, "cpu"], 120),
)
def test_nobody_waits_past_the_bound_on_four_gpus(
    policy: str, sizes: list[int], ram: int, arrivals: list[Arrival]
) -> None:
    world = World(
        *machine(sizes, ram),
        devices=[host(ram), *map(gpu, GPUS)],
        policy=policy,
        quantum=QUANTUM,
        max_wait=MAX_WAIT,
        queue_limit=10**6,
        knowledge=taught([*SPANS, "cpu"], SWAP),
    )
    assert Traffic(world, arrivals, SWAP).longest_wait() <= GPU_BOUND


@pytest.mark.parametrize(("took", "predicted"), [(SWAP, SWAP), (SWAP, 15.0), (0.3, 0.3)])
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([3, 5, 7, 10]), min_size=6, max_size=6),
    ram=st.sampled_from([10, 30, 200]),
    arrivals=arrivals([*SPANS, "cpu"], 120),
)
def test_nobody_waits_past_the_bound_of_adaptive_on_four_gpus(
    took: float, predicted: float, sizes: list[int], ram: int, arrivals: list[Arrival]
) -> None:
    world = World(
        *machine(sizes, ram),
        devices=[host(ram), *map(gpu, GPUS)],
        policy="adaptive",
        quantum=None,
        max_wait=MAX_WAIT,
        queue_limit=10**6,
        look_ahead=True,
        knowledge=taught([*SPANS, "cpu"], predicted),
    )
    longest = Traffic(world, arrivals, took, predicted).longest_wait()
    assert longest <= adaptive_bound(len(SPANS) + 1, predicted, took, outs=len(SPANS))


@pytest.mark.parametrize("policy", BOUNDED)
def test_streams_for_single_gpus_do_not_starve_an_engine_on_all_of_them(policy: str) -> None:
    singles = [engine(name, 6, device=name) for name in GPUS]
    world = World(
        engine("all", 6, device=GPUS),
        *singles,
        devices=[*map(gpu, GPUS)],
        policy=policy,
        quantum=QUANTUM,
        max_wait=MAX_WAIT,
        queue_limit=10**6,
        knowledge=taught(["all", *GPUS], SWAP),
    )
    stream = [Arrival(i * 0.5, GPUS[i % 4], 3.0) for i in range(400)]
    wide = [Arrival(10.0, "all", 1.0), Arrival(90.0, "all", 1.0)]
    longest = Traffic(world, stream + wide, SWAP).longest_wait()
    assert longest <= bound_of_two(policy)


# ---------------------------------------------------------- streams, priorities


@pytest.mark.parametrize("policy", BOUNDED)
def test_a_steady_stream_for_one_engine_does_not_starve_another(policy: str) -> None:
    world = World(
        engine("a", 10),
        engine("b", 10),
        policy=policy,
        quantum=QUANTUM,
        max_wait=MAX_WAIT,
        queue_limit=10**6,
        knowledge=taught("ab", SWAP),
    )
    stream = [Arrival(i * 0.5, "a", 3.0) for i in range(400)]
    others = [Arrival(10.0, "b", 1.0), Arrival(90.0, "b", 1.0)]
    longest = Traffic(world, stream + others, SWAP).longest_wait()
    assert longest <= bound_of_two(policy)


def test_interactive_streams_for_two_engines_do_not_starve_batch_work_of_a_third() -> None:
    """Each of three engines takes the whole device; two of them always have people waiting."""
    swap = 0.5
    world = World(
        *(engine(name, 10) for name in "abc"),
        policy="adaptive",
        quantum=None,
        max_wait=MAX_WAIT,
        queue_limit=10**6,
        knowledge=taught("abc", swap),
    )
    people = [Arrival(i * 0.25, "ab"[i % 2], 0.5) for i in range(480)]
    batch = [Arrival(10.0 * i, "c", 4.0, Priority.BATCH) for i in range(12)]
    longest = Traffic(world, people + batch, swap).longest_wait()
    assert longest <= adaptive_bound(3, swap, swap)


@pytest.mark.parametrize("policy", POLICIES)
def test_interactive_requests_do_not_starve_batch_work_in_the_queue_of_one_engine(
    policy: str,
) -> None:
    """One slot, always somebody more urgent in the queue: age counts in the end."""
    world = World(
        engine("a", slots=1), policy=policy, quantum=None, max_wait=MAX_WAIT, queue_limit=10**6
    )
    people = [Arrival(i * 1.0, "a", 1.02, Priority.URGENT) for i in range(120)]
    batch = [Arrival(5.0 + 40.0 * i, "a", 3.0, Priority.BATCH) for i in range(3)]
    traffic = Traffic(world, people + batch, SWAP)
    traffic.longest_wait()
    # Over age, it goes before all that are younger: one is running, one may be as old.
    waits = traffic.waits(Priority.BATCH)
    assert len(waits) == len(batch)
    assert max(waits) <= MAX_WAIT + 2 * 3.0
    assert min(waits) > MAX_WAIT / 2, "the queue was always full of others"
