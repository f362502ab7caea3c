"""The share of time that swaps take, and from when another one keeps it."""

from math import exp, inf, log

import pytest

from swapserve.scheduler.overhead import LEAST_HORIZON_S, Overhead

HORIZON = 600.0


def test_swaps_are_forgotten_with_time() -> None:
    overhead = Overhead(HORIZON)
    overhead.works(0.0)
    overhead.add(60.0, 100.0)
    assert overhead.share(100.0) == pytest.approx(0.1)
    assert overhead.share(100.0 + HORIZON) == pytest.approx(0.1 * exp(-1.0))


def test_a_quiet_device_swaps_several_times_in_a_row() -> None:
    overhead = Overhead(HORIZON)
    overhead.works(0.0)
    for _ in range(5):
        assert overhead.allowed_at(10.0, 0.2, 50.0) == 50.0
        overhead.add(10.0, 50.0)


def test_a_device_beyond_its_share_swaps_when_enough_is_forgotten() -> None:
    overhead = Overhead(HORIZON)
    overhead.works(0.0)
    overhead.add(240.0, 0.0)
    cost, share = 20.0, 0.2
    at = overhead.allowed_at(cost, share, 0.0)
    assert at == pytest.approx(HORIZON * log(240.0 / 100.0))
    assert overhead.allowed_at(cost, share, at + 1e-6) == at + 1e-6
    assert overhead.share(at) + cost / HORIZON == pytest.approx(share)


def test_a_swap_that_takes_more_than_the_share_comes_when_others_are_half_forgotten() -> None:
    overhead = Overhead(HORIZON)
    overhead.works(0.0)
    overhead.add(120.0, 0.0)
    at = overhead.allowed_at(500.0, 0.2, 0.0)
    assert at == pytest.approx(HORIZON * log(2.0))


def test_swaps_that_fit_into_idle_time_are_free() -> None:
    overhead = Overhead(HORIZON)
    overhead.works(0.0)
    overhead.add(240.0, 0.0)
    busy = overhead.allowed_at(20.0, 0.2, 300.0)
    assert busy > 300.0
    overhead.rests(0.0)
    overhead.works(300.0)
    assert overhead.allowed_at(20.0, 0.2, 300.0) == 300.0


def test_one_swap_counts_no_longer_than_the_horizon() -> None:
    overhead = Overhead(HORIZON)
    overhead.add(1e6, 0.0)
    assert overhead.share(0.0) == 1.0


def test_with_no_share_there_is_never_a_second_swap() -> None:
    overhead = Overhead(HORIZON)
    assert overhead.allowed_at(5.0, 0.0, 1.0) == 1.0
    overhead.works(0.0)
    overhead.add(5.0, 1.0)
    assert overhead.allowed_at(5.0, 0.0, 2.0) == inf


def test_a_horizon_of_nothing_is_a_short_one() -> None:
    """`max_wait: 0s` is a setting like any other."""
    overhead = Overhead(0.0)
    overhead.add(6.0, 0.0)
    assert overhead.share(0.0) == pytest.approx(6.0 / LEAST_HORIZON_S)
    assert overhead.allowed_at(1.0, 0.2, 10.0) == 10.0
