"""What swaps cost: averages, outliers, and guesses where nothing was measured."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swapserve.ids import EngineName
from swapserve.scheduler.knowledge import Costs
from swapserve.scheduler.knowledge.costs import ENGINES_MAX
from swapserve.states import Tier

A, B, C = EngineName("a"), EngineName("b"), EngineName("c")
GB = 10**9


def test_the_first_measurement_is_taken_as_it_is() -> None:
    costs = Costs()
    costs.came(A, Tier.HOST, 3.25, busy=False)
    assert costs.in_s(A, Tier.HOST, busy=False) == 3.25


def test_what_was_measured_is_told_apart_by_direction_tier_and_requests_in_flight() -> None:
    costs = Costs()
    told: dict[tuple[bool, Tier, bool], float] = {}
    for number, tier in enumerate((Tier.HOST, Tier.DISK, Tier.NONE)):
        for busy in (False, True):
            costs.left(A, tier, 1.0 + number + 10 * busy, busy=busy)
            costs.came(A, tier, 101.0 + number + 10 * busy, busy=busy)
            told[False, tier, busy] = 1.0 + number + 10 * busy
            told[True, tier, busy] = 101.0 + number + 10 * busy
    for (inward, tier, busy), seconds in told.items():
        asked = costs.in_s if inward else costs.out_s
        assert asked(A, tier, busy=busy) == seconds


def test_an_outlier_moves_the_figure_by_a_bounded_step_however_far_it_is() -> None:
    for outlier in (50.0, 5_000.0, 5e8):
        costs = Costs()
        for _ in range(10):
            costs.came(A, Tier.HOST, 2.0, busy=True)
        costs.came(A, Tier.HOST, outlier, busy=True)
        assert 2.0 < costs.in_s(A, Tier.HOST, busy=True) <= 2.5


@pytest.mark.parametrize("after", [0.05, 0.8, 5.0, 400.0])
def test_a_lasting_change_is_followed(after: float) -> None:
    costs = Costs()
    for _ in range(30):
        costs.came(A, Tier.HOST, 2.0, busy=True)
    for _ in range(12):
        costs.came(A, Tier.HOST, after, busy=True)
    assert costs.in_s(A, Tier.HOST, busy=True) == pytest.approx(after, rel=0.1)


def test_a_first_measurement_that_was_an_outlier_is_soon_forgotten() -> None:
    costs = Costs()
    for seconds in (90.0, 2.0, 2.1, 1.9):
        costs.left(A, Tier.HOST, seconds, busy=False)
    assert costs.out_s(A, Tier.HOST, busy=False) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), -1.0])
def test_nonsense_is_not_learnt(nonsense: float) -> None:
    costs = Costs()
    costs.came(A, Tier.HOST, nonsense, busy=False)
    costs.came(A, Tier.HOST, 2.0, busy=False)
    costs.came(A, Tier.HOST, nonsense, busy=False)
    assert costs.in_s(A, Tier.HOST, busy=False) == 2.0


def test_an_engine_on_its_device_costs_nothing() -> None:
    assert Costs().in_s(A, Tier.DEVICE, busy=False) == 0.0


# ------------------------------------------------------------------ guesses


def test_the_same_move_with_other_load_is_the_nearest() -> None:
    costs = Costs()
    costs.came(A, Tier.HOST, 7.0, busy=False)
    costs.came(A, Tier.DISK, 1.0, busy=True)
    costs.came(B, Tier.HOST, 1.0, busy=True)
    assert costs.in_s(A, Tier.HOST, busy=True) == 7.0


def test_an_idle_engine_that_was_quickly_discarded_may_take_long_to_dump_when_busy() -> None:
    costs = Costs()
    costs.size(A, 20 * GB)
    costs.left(A, Tier.DISK, 0.1, busy=False)
    assert costs.out_s(A, Tier.DISK, busy=False) == 0.1
    assert costs.out_s(A, Tier.DISK, busy=True) > 2.0
    costs.size(B, 20 * GB)
    costs.left(B, Tier.DISK, 1.0, busy=True)
    assert costs.out_s(A, Tier.DISK, busy=True) == pytest.approx(1.0)
    costs.left(A, Tier.DISK, 0.5, busy=True)
    assert costs.out_s(A, Tier.DISK, busy=True) == 0.5


def test_the_next_tier_of_the_same_engine_comes_before_other_engines() -> None:
    slow, fast = Costs(), Costs()
    for costs, seconds in ((slow, 40.0), (fast, 4.0)):
        costs.size(A, 20 * GB)
        costs.size(B, 20 * GB)
        costs.came(A, Tier.DISK, seconds, busy=False)
        costs.came(B, Tier.HOST, 500.0, busy=False)
    for flag in (False, True):
        host = slow.in_s(A, Tier.HOST, busy=flag)
        assert host == pytest.approx(10 * fast.in_s(A, Tier.HOST, busy=flag))
        assert host < 40.0, "host memory is nearer than the disk"


def test_other_engines_are_scaled_by_their_size() -> None:
    costs = Costs()
    costs.size(A, 10 * GB)
    costs.size(B, 40 * GB)
    costs.left(A, Tier.HOST, 20.0, busy=False)
    assert costs.out_s(B, Tier.HOST, busy=False) == pytest.approx(80.0, rel=0.15)


def test_of_several_others_one_that_is_odd_does_not_count() -> None:
    costs = Costs()
    names = [EngineName(f"other{number}") for number in range(3)]
    for name, seconds in zip(names, (5.0, 5.5, 900.0), strict=True):
        costs.size(name, 10 * GB)
        costs.left(name, Tier.HOST, seconds, busy=False)
    costs.size(A, 10 * GB)
    assert 5.0 <= costs.out_s(A, Tier.HOST, busy=False) <= 6.0


def test_a_cold_start_is_guessed_from_cold_starts_alone() -> None:
    costs = Costs()
    before = costs.in_s(A, Tier.NONE, busy=False)
    costs.came(A, Tier.HOST, 0.1, busy=False)
    costs.came(A, Tier.DISK, 0.1, busy=False)
    assert costs.in_s(A, Tier.NONE, busy=False) == before
    costs.came(B, Tier.NONE, 3 * before, busy=False)
    assert costs.in_s(A, Tier.NONE, busy=False) == pytest.approx(3 * before)


def test_first_guesses_grow_with_bytes_and_are_there_without_them() -> None:
    costs = Costs()
    for tier in (Tier.HOST, Tier.DISK, Tier.NONE):
        unknown = costs.in_s(A, tier, busy=False)
        costs.size(A, 80 * GB)
        assert 0.0 < unknown < costs.in_s(A, tier, busy=False)
        costs.size(A, 0)
        assert costs.in_s(A, tier, busy=False) == unknown


def test_a_guess_gives_way_to_what_is_measured_later() -> None:
    costs = Costs()
    assert costs.in_s(A, Tier.HOST, busy=False) != 9.0
    costs.came(A, Tier.HOST, 9.0, busy=False)
    assert costs.in_s(A, Tier.HOST, busy=False) == 9.0


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([A, B, C]),
            st.sampled_from(list(Tier)),
            st.floats(allow_nan=True, allow_infinity=True),
            st.booleans(),
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_whatever_comes_costs_stay_finite_and_not_negative(
    moves: list[tuple[EngineName, Tier, float, bool, bool]],
) -> None:
    costs = Costs()
    for engine, tier, seconds, busy, inward in moves:
        (costs.came if inward else costs.left)(engine, tier, seconds, busy=busy)
    for engine in (A, B, C):
        for tier in Tier:
            for busy in (False, True):
                assert 0.0 <= costs.in_s(engine, tier, busy=busy) < 1e30
                assert 0.0 <= costs.out_s(engine, tier, busy=busy) < 1e30


def test_engines_do_not_pile_up() -> None:
    costs = Costs()
    for number in range(3 * ENGINES_MAX):
        name = EngineName(f"e{number}")
        costs.size(name, GB)
        costs.came(name, Tier.HOST, 1.0, busy=False)
    stored = costs.as_json()
    assert len(stored["engines"]) == len(stored["bytes"]) == ENGINES_MAX
