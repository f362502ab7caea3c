"""Under any load, no request waits longer than the engines before it need for their turns."""

import heapq
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from swapserve.ids import EngineName, LeaseId
from swapserve.messages import BringIn, Tick
from swapserve.states import LeaseState
from tests.stateful.world import DEVICE, World, engine, gpu, host

L = LeaseState
NAMES = "abcd"
QUANTUM, MAX_WAIT, SWAP, LONGEST = 5.0, 12.0, 3.0, 20.0
# Each engine before it: its turn (a quantum, or a drain until over-age), once out and once in;
# and everyone may have been brought in once more since, because an idle turn ends early.
TURN = MAX_WAIT + QUANTUM + 2 * SWAP
BOUND = 2 * (len(NAMES) + 1) * TURN


class Traffic:
    """Requests that arrive and work, and engines that take their time to come and go."""

    def __init__(self, world: World, arrivals: list[tuple[float, str, float]]) -> None:
        self.world = world
        self.worst = 0.0
        self.agenda: list[tuple[float, int, str, str, float]] = []
        self.work: dict[LeaseId, float] = {}
        self.begun: dict[LeaseId, float] = {}
        self.moving: set[str] = set()
        self.numbers = itertools.count()
        for time, name, seconds in arrivals:
            self.at(world.now + time, "new", name, seconds)

    def at(self, time: float, what: str, key: str, seconds: float = 0.0) -> None:
        heapq.heappush(self.agenda, (time, next(self.numbers), what, key, seconds))

    def longest_wait(self) -> float:
        """Run everything to its end; return the longest wait in seconds."""
        world = self.world
        while self.agenda or world.timer is not None:
            if world.timer is not None and (not self.agenda or world.timer < self.agenda[0][0]):
                world.now, world.timer = max(world.now, world.timer), None
                world.send(Tick())
            else:
                world.now, _, what, key, seconds = heapq.heappop(self.agenda)
                self.happen(what, key, seconds)
            self.look()
        assert not world.live
        return self.worst

    def happen(self, what: str, key: str, seconds: float) -> None:
        if what == "new":
            lease = LeaseId(f"{key}-{next(self.numbers)}")
            self.work[lease] = seconds
            self.world.request_as(lease, key)
        elif what == "move":
            self.moving.remove(key)
            if isinstance(self.world.pending[EngineName(key)], BringIn):
                self.world.ready(key)
            else:
                self.world.left(key)
        else:
            self.finish(LeaseId(key))

    def finish(self, lease: LeaseId) -> None:
        # Suspended and resumed since: then a later end of its own is on the agenda.
        begun = self.begun.get(lease)
        if begun is not None and begun + self.work[lease] <= self.world.now + 1e-6:
            del self.begun[lease]
            self.world.end(lease)

    def look(self) -> None:
        now = self.world.now
        for name in self.world.pending:
            if name not in self.moving:
                self.moving.add(name)
                self.at(now + SWAP, "move", name)
        for lease in self.world.live:
            record = self.world.leases[lease]
            if record.state is not L.ACTIVE:
                self.work[lease] -= now - self.begun.pop(lease, now)
                self.worst = max(self.worst, now - record.since)
            elif lease not in self.begun:
                self.begun[lease] = now
                self.at(now + self.work[lease], "done", lease)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([3, 5, 7, 10]), min_size=4, max_size=4),
    busy=st.sampled_from(["preempt", "drain"]),
    arrivals=st.lists(
        st.tuples(
            st.floats(0, 200).map(lambda t: round(t, 1)),
            st.sampled_from(NAMES),
            st.floats(0.1, LONGEST).map(lambda t: round(t, 1)),
        ),
        min_size=20,
        max_size=120,
    ),
)
def test_nobody_waits_past_the_bound(
    sizes: list[int], busy: str, arrivals: list[tuple[float, str, float]]
) -> None:
    specs = [engine(name, size) for name, size in zip(NAMES, sizes, strict=True)]
    world = World(*specs, busy=busy, quantum=QUANTUM, max_wait=MAX_WAIT, queue_limit=10**6)
    assert Traffic(world, arrivals).longest_wait() <= BOUND


GPUS = ("g0", "g1", "g2", "g3")
SPANS = {"a": ("g0",), "b": ("g1",), "c": ("g0", "g1"), "d": ("g1", "g2"), "e": ("g3",), "f": GPUS}
# On one GPU whoever leaves does so after the others, so a turn takes a swap out for each of them;
# wishes go by age, so each other engine has one turn before.
GPU_TURN = MAX_WAIT + QUANTUM + (len(SPANS) + 1) * SWAP
GPU_BOUND = len(SPANS) * GPU_TURN


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([3, 5, 7, 10]), min_size=6, max_size=6),
    ram=st.sampled_from([10, 30, 200]),
    busy=st.sampled_from(["preempt", "drain"]),
    arrivals=st.lists(
        st.tuples(
            st.floats(0, 200).map(lambda t: round(t, 1)),
            st.sampled_from([*SPANS, "cpu"]),
            st.floats(0.1, LONGEST).map(lambda t: round(t, 1)),
        ),
        min_size=30,
        max_size=150,
    ),
)
def test_nobody_waits_past_the_bound_on_four_gpus(
    sizes: list[int], ram: int, busy: str, arrivals: list[tuple[float, str, float]]
) -> None:
    specs = [
        engine(name, size, device=devices, ram=DEVICE)
        for (name, devices), size in zip(SPANS.items(), sizes, strict=True)
    ]
    world = World(
        *specs,
        engine("cpu", 6),
        devices=[host(ram), *map(gpu, GPUS)],
        busy=busy,
        quantum=QUANTUM,
        max_wait=MAX_WAIT,
        queue_limit=10**6,
    )
    assert Traffic(world, arrivals).longest_wait() <= GPU_BOUND


def test_streams_for_single_gpus_do_not_starve_an_engine_on_all_of_them() -> None:
    singles = [engine(name, 6, device=name) for name in GPUS]
    world = World(
        engine("all", 6, device=GPUS),
        *singles,
        devices=[*map(gpu, GPUS)],
        quantum=QUANTUM,
        max_wait=MAX_WAIT,
        queue_limit=10**6,
    )
    arrivals = [(i * 0.5, GPUS[i % 4], 3.0) for i in range(400)]
    wide = [(10.0, "all", 1.0), (90.0, "all", 1.0)]
    # One quantum of each at the same time, then out and in.
    assert Traffic(world, arrivals + wide).longest_wait() <= QUANTUM + 2 * SWAP + MAX_WAIT


def test_a_steady_stream_for_one_engine_does_not_starve_another() -> None:
    world = World(
        engine("a", 10), engine("b", 10), quantum=QUANTUM, max_wait=MAX_WAIT, queue_limit=10**6
    )
    arrivals = [(i * 0.5, "a", 3.0) for i in range(400)] + [(10.0, "b", 1.0), (90.0, "b", 1.0)]
    # One quantum of a, then out and in.
    assert Traffic(world, arrivals).longest_wait() <= QUANTUM + 2 * SWAP + MAX_WAIT
