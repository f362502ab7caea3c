"""The simulated machine: what it takes, what it answers, and everything that it refuses."""

from dataclasses import replace

import pytest

from evaluation.simulate.agenda import Agenda
from evaluation.simulate.cluster import Cluster
from evaluation.simulate.costs import GB, EngineKind
from evaluation.simulate.engine import Engine, IllegalEffect
from evaluation.simulate.server import Requests
from evaluation.simulate.world import World
from swapserve.ids import EngineName
from swapserve.messages import BringIn, Drain, EngineLeft, EngineReady, SwapOut
from swapserve.states import EngineState, Tier
from tests.support.simulation import KIND, SLEEPER, cluster

COUNT = 9


def world_of(found: Cluster, *, noise: float = 0.0) -> World:
    requests = Requests(
        tokens_in=[100] * COUNT,
        tokens_out=[101] * COUNT,
        conversation=[1] * COUNT,
        first_at=[-1.0] * COUNT,
    )
    world = World(found, requests, Agenda(), noise=noise, seed=1)
    world.seen()
    return world


def out(name: str, to: Tier = Tier.HOST, *, in_flight: int = 0, cache_s: float = 0.0) -> SwapOut:
    return SwapOut(
        engine=EngineName(name), in_flight=in_flight, cause="test", to=to, cache_s=cache_s
    )


def bring(name: str, to: Tier = Tier.DEVICE) -> BringIn:
    return BringIn(engine=EngineName(name), to=to)


def end(world: World, engine: Engine) -> EngineReady | EngineLeft:
    return world.finish(engine, engine.move_end)


def left(world: World, effect: SwapOut, now: float = 0.0) -> EngineLeft:
    world.swap_out(effect, now)
    event = end(world, world.by_name[effect.engine])
    assert isinstance(event, EngineLeft)
    return event


# ------------------------------------------------------------------ begin


def test_at_first_the_popular_serve_the_next_rest_in_memory_the_others_on_disk() -> None:
    found = world_of(cluster(KIND, KIND, KIND, ram_gb=5))
    tiers = [engine.tier for engine in found.engines]
    assert tiers == [Tier.DEVICE, Tier.HOST, Tier.DISK]
    assert [engine.host_bytes for engine in found.engines] == [0, 4 * GB, 0]


def test_an_engine_without_any_tier_begins_with_nothing() -> None:
    found = world_of(cluster(KIND, replace(KIND, ways={}), ram_gb=0))
    assert found.engines[1].state is EngineState.STOPPED
    found.swap_out(out("m0", Tier.DISK), 0.0)
    end(found, found.engines[0])
    found.bring_in(bring("m1"), 10.0)
    assert found.engines[1].move_end == pytest.approx(60.0)
    assert found.activity.cold_starts == 1


# ------------------------------------------------------------------ moves


def test_an_idle_engine_leaves_without_its_cache_unless_that_is_worth_more() -> None:
    # To host memory: keeping costs 7 s both ways, dropping 3.
    cheap = left(world_of(cluster(KIND, KIND)), out("m0", cache_s=3.9))
    assert (cheap.cache_kept, cheap.seconds, cheap.host_bytes) == (False, 2.0, 4 * GB)
    dear = left(world_of(cluster(KIND, KIND)), out("m0", cache_s=4.1))
    assert (dear.cache_kept, dear.seconds, dear.host_bytes) == (True, 4.0, 10 * GB)
    # To disk: 33 s against 9.5.
    discarded = left(world_of(cluster(KIND, KIND)), out("m0", Tier.DISK, cache_s=23.0))
    assert (discarded.cache_kept, discarded.seconds) == (False, 2.5)
    dumped = left(world_of(cluster(KIND, KIND)), out("m0", Tier.DISK, cache_s=24.0))
    assert (dumped.cache_kept, dumped.seconds) == (True, 24.0)


def test_the_way_back_is_the_one_it_left_by() -> None:
    for to, in_flight, expected_s in (
        (Tier.HOST, 0, 1.0),
        (Tier.HOST, 1, 3.0),
        (Tier.DISK, 0, 7.0),
        (Tier.DISK, 1, 9.0),
    ):
        found = world_of(cluster(KIND, KIND))
        engine = found.engines[0]
        if in_flight:
            found.grant(engine, 0, 0.0)
            found.suspend(engine, 0, 0.0)
        assert left(found, out("m0", to, in_flight=in_flight)).tier is to
        found.bring_in(bring("m0"), 100.0)
        event = end(found, engine)
        assert isinstance(event, EngineReady)
        assert event.seconds == expected_s
        assert engine.server.running


def test_without_a_disk_way_an_idle_engine_is_killed() -> None:
    found = world_of(cluster(replace(KIND, ways={}), KIND))
    event = left(found, out("m0", Tier.DISK))
    assert (event.tier, event.seconds) == (Tier.NONE, 0.5)


def test_from_host_memory_further_down() -> None:
    found = world_of(cluster(KIND, KIND))
    left(found, out("m0", cache_s=100.0))
    event = left(found, out("m0", Tier.DISK, cache_s=100.0), 50.0)
    assert (event.tier, event.cache_kept, event.seconds) == (Tier.DISK, True, 20.0)
    assert found.engines[0].host_bytes == 0
    # One whose cache is worth nothing has its image on disk already.
    lean = left(found, out("m1", Tier.DISK), 100.0)
    assert (lean.tier, lean.cache_kept, lean.seconds) == (Tier.DISK, False, 0.5)
    assert found.activity.lowered == 2


def test_from_disk_into_host_memory_ahead_of_demand() -> None:
    found = world_of(cluster(KIND, KIND, ram_gb=0))
    found = world_of(cluster(KIND, KIND, KIND, ram_gb=5))
    left(found, out("m1", Tier.DISK))  # makes room
    found.bring_in(bring("m2", Tier.HOST), 10.0)
    event = end(found, found.engines[2])
    assert isinstance(event, EngineLeft)
    assert (event.tier, event.seconds, event.host_bytes) == (Tier.HOST, 6.0, 4 * GB)
    assert found.activity.raised == 1


def test_a_sleeper_keeps_a_little_of_its_gpu() -> None:
    found = world_of(cluster(SLEEPER, SLEEPER, gpu_gb=12))
    event = left(found, out("m0"))
    assert event.residue == {"gpu0": GB}
    found.bring_in(bring("m1"), 10.0)
    assert isinstance(end(found, found.engines[1]), EngineReady)
    # What it has kept can only be had by ending it.
    lowered = left(found, out("m0"), 50.0)
    assert (lowered.tier, lowered.residue) == (Tier.NONE, {})


def test_noise_changes_durations_and_is_the_same_for_the_same_seed() -> None:
    taken = [left(world_of(cluster(KIND, KIND), noise=0.3), out("m0")).seconds for _ in range(2)]
    assert taken[0] == taken[1] != 2.0


def test_time_in_moves_and_in_service_is_counted() -> None:
    found = world_of(cluster(KIND, KIND))
    engine = found.engines[0]
    found.grant(engine, 0, 1.0)
    while engine.server.due < 100.0:
        found.step(engine, engine.pending)
    found.swap_out(out("m0"), 5.0)
    found.close(6.0)
    # 0.1 s of prompt and a hundred gaps; one of the two seconds out.
    assert found.activity.serving_s == pytest.approx(1.1)
    assert found.activity.moving_s == pytest.approx(1.0)


def test_engines_that_work_on_one_gpu_share_it() -> None:
    found = world_of(cluster(KIND, KIND, gpu_gb=20))
    first, second = found.engines
    found.grant(first, 0, 0.0)
    found.grant(second, 1, 0.0)
    assert first.server.due == second.server.due == pytest.approx(0.2)
    alone = world_of(cluster(KIND, KIND, gpus=2, gpu_gb=20))
    alone.grant(alone.engines[0], 0, 0.0)
    alone.grant(alone.engines[1], 1, 0.0)
    assert alone.engines[0].server.due == pytest.approx(0.1)


# ---------------------------------------------------------------- illegal


def busy() -> World:
    found = world_of(cluster(KIND, KIND))
    found.grant(found.engines[0], 0, 0.0)
    return found


@pytest.mark.parametrize(
    ("effect", "why"),
    [
        (bring("m0"), "brought in while ready"),
        (bring("m1"), "bytes on gpu0"),
        (bring("m1", Tier.HOST), "from host"),
        (out("m0"), "1 requests run and 0 are suspended, not 0"),
        (out("m0", in_flight=1), "1 requests run and 0 are suspended, not 1"),
        (out("m1"), "lowered to host, where it is"),
        (out("m1", Tier.DEVICE), "swapped out to device"),
    ],
)
def test_moves_that_cannot_be_are_refused(effect: BringIn | SwapOut, why: str) -> None:
    found = busy()
    act = found.bring_in if isinstance(effect, BringIn) else found.swap_out
    with pytest.raises(IllegalEffect, match=why):
        act(effect, 1.0)  # type: ignore[arg-type]


def test_two_moves_on_one_gpu_are_refused() -> None:
    found = world_of(cluster(KIND, KIND, KIND, gpu_gb=30))
    found.swap_out(out("m0"), 0.0)
    with pytest.raises(IllegalEffect, match="m0 moves on gpu0 already"):
        found.swap_out(out("m1"), 1.0)


def test_bytes_are_free_only_when_the_engine_has_left() -> None:
    found = world_of(cluster(KIND, KIND, gpu_gb=10))
    found.swap_out(out("m0"), 0.0)
    with pytest.raises(IllegalEffect, match="moves on gpu0 already"):
        found.bring_in(bring("m1"), 1.9)


def test_host_memory_is_not_promised_twice() -> None:
    found = world_of(cluster(KIND, KIND, KIND, gpu_gb=30, ram_gb=7))
    left(found, out("m0"))
    with pytest.raises(IllegalEffect, match="of host memory"):
        found.swap_out(out("m1"), 10.0)


@pytest.mark.parametrize(
    ("kind", "to"),
    [(SLEEPER, Tier.HOST), (replace(KIND, ways={}), Tier.DISK)],
)
def test_requests_are_never_lost_in_a_swap(kind: EngineKind, to: Tier) -> None:
    found = world_of(cluster(kind, KIND))
    found.grant(found.engines[0], 0, 0.0)
    found.suspend(found.engines[0], 0, 0.5)
    with pytest.raises(IllegalEffect, match="would not survive"):
        found.swap_out(out("m0", to, in_flight=1), 0.5)


def test_requests_of_an_engine_in_memory_are_not_lost_on_the_way_to_disk() -> None:
    kind = replace(KIND, down_s=None)
    found = world_of(cluster(kind, KIND))
    found.grant(found.engines[0], 0, 0.0)
    found.suspend(found.engines[0], 0, 0.5)
    left(found, out("m0", in_flight=1), 0.5)
    with pytest.raises(IllegalEffect, match="would not survive"):
        found.swap_out(out("m0", Tier.DISK, in_flight=1), 9.0)


def test_nobody_is_let_into_an_engine_that_is_away_or_drains() -> None:
    found = world_of(cluster(KIND, KIND))
    with pytest.raises(IllegalEffect, match="let in while swapped_out"):
        found.grant(found.engines[1], 0, 0.0)
    found.drain(Drain(engine=EngineName("m0"), on=True))
    with pytest.raises(IllegalEffect, match="let in while draining"):
        found.grant(found.engines[0], 0, 0.0)
    with pytest.raises(IllegalEffect, match="drain True while draining"):
        found.drain(Drain(engine=EngineName("m0"), on=True))


def test_no_more_requests_than_slots() -> None:
    found = world_of(cluster(KIND, slots=1))
    found.grant(found.engines[0], 0, 0.0)
    with pytest.raises(IllegalEffect, match="more than 1 requests"):
        found.grant(found.engines[0], 1, 0.0)


def test_requests_go_on_only_where_the_engine_is() -> None:
    found = busy()
    found.suspend(found.engines[0], 0, 0.5)
    left(found, out("m0", in_flight=1), 0.5)
    with pytest.raises(IllegalEffect, match="resumed while swapped_out"):
        found.resume(found.engines[0], 0)
