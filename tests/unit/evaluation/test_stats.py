import random
import statistics

import pytest

from evaluation.stats import Interval, above, below, interval, percentile


def test_the_interval_holds_the_median_and_is_the_same_every_time() -> None:
    values = [1.0, 1.2, 0.9, 1.1, 1.05, 3.0]
    found = interval(values)
    assert found == interval(values)
    assert found.n == 6
    assert found.median == statistics.median(values)
    assert 0.9 <= found.low <= found.median <= found.high <= 3.0


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng = random.Random(7)
    hits = 0
    for _ in range(60):
        found = interval([rng.gauss(10, 1) for _ in range(25)])
        hits += found.low <= 10 <= found.high
    assert hits >= 51


def test_more_values_give_a_narrower_interval() -> None:
    rng = random.Random(3)
    few = interval([rng.gauss(10, 1) for _ in range(10)])
    many = interval([rng.gauss(10, 1) for _ in range(300)])
    assert many.relative_width < few.relative_width / 2


def test_one_value_is_its_own_interval() -> None:
    assert interval([2.0]) == Interval(n=1, median=2.0, low=2.0, high=2.0)


@pytest.mark.parametrize("work", [interval, lambda values: percentile(values, 0.5)])
def test_nothing_has_no_median(work) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="no values"):
        work([])


@pytest.mark.parametrize(
    ("low", "median", "high", "verdict"),
    [
        (1.0, 1.1, 1.25, "met"),
        (0.2, 0.9, 1.2, "met"),  # wide, but below the bound all the same
        (1.2, 1.24, 1.3, "not met"),  # narrow around the bound
        (0.9, 1.1, 1.9, "too noisy"),  # holds the bound and is wide
        (1.3, 2.0, 4.0, "not met"),  # wide, but above the bound all the same
    ],
)
def test_a_bound_is_judged_by_the_interval(
    low: float, median: float, high: float, verdict: str
) -> None:
    assert below(Interval(n=20, median=median, low=low, high=high), 1.25) == verdict


def test_few_pairs_support_no_verdict() -> None:
    assert below(Interval(n=19, median=1.0, low=1.0, high=1.0), 1.25) == "too few samples"


def test_a_least_ratio_is_judged_by_the_median() -> None:
    assert above(Interval(n=3, median=15.0, low=9.0, high=20.0), 15.0) == "met"
    assert above(Interval(n=3, median=14.9, low=9.0, high=20.0), 15.0) == "not met"


def test_percentiles_are_values_that_were_measured() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(values, 0.0) == 1.0
    assert percentile(values, 0.5) == 3.0
    assert percentile(values, 1.0) == 5.0
