import pytest

from evaluation.schedule.figures import Request, Run, Verdict, compare, judge
from evaluation.schedule.table import missed, render


def _run(*requests: Request, swaps: int = 2) -> Run:
    return Run(
        requests=requests,
        seconds=10.0,
        swaps=swaps,
        moving_s=1.0,
        preemptions=0,
        forecasts=0,
        forecasts_met=0,
    )


def _request(sent: float, first: float, last: float, priority: str = "interactive") -> Request:
    return Request(model=0, priority=priority, tokens_out=5, sent=sent, first=first, last=last)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.0, 1.24], "met"),
        ([0.76, 1.24], "met"),
        ([1.26, 1.3], "not met"),
        ([1.26, 4.0], "not met"),
        ([0.5, 0.74], "not met"),
        ([1.2, 1.29], "met"),
        ([1.24, 1.29], "not met"),
        ([1.0, 1.3], "too noisy"),
        ([0.7, 1.3], "too noisy"),
        ([1.0, None], "too noisy"),
        ([None, None], "not met"),
    ],
)
def test_real_runs_are_judged_by_the_bound_and_by_each_other(
    ratios: list[float | None], verdict: Verdict
) -> None:
    assert judge(ratios) == verdict


def test_times_count_from_when_a_request_was_sent() -> None:
    found = _run(_request(1.0, 1.5, 3.0), _request(2.0, 5.0, 6.0)).figures()
    assert found["ttft_p50_s"] == pytest.approx(1.75)
    assert found["longest_wait_s"] == pytest.approx(3.0)
    assert found["e2e_mean_s"] == pytest.approx(3.0)
    assert found["overhead_share"] == pytest.approx(0.1)


def test_what_was_not_answered_is_counted_and_has_no_times() -> None:
    lost = Request(model=0, priority="batch", tokens_out=5, sent=0.0, first=9.0, last=None)
    cut = Request(
        model=0, priority="batch", tokens_out=5, sent=0.0, first=9.0, last=9.0, error="1 token"
    )
    found = _run(_request(0.0, 1.0, 2.0), lost, cut).figures()
    assert found["failed"] == 2
    assert found["longest_wait_s"] == pytest.approx(1.0)


def test_priorities_are_told_apart_where_there_are_several() -> None:
    one = _run(_request(0.0, 1.0, 2.0), _request(0.0, 4.0, 8.0))
    assert not any(name.startswith("interactive") for name in one.figures())
    two = _run(_request(0.0, 1.0, 2.0), _request(0.0, 4.0, 8.0, "batch")).figures()
    assert two["interactive_ttft_p50_s"] == pytest.approx(1.0)
    assert two["batch_e2e_p50_s"] == pytest.approx(8.0)


def test_each_real_run_is_compared_with_the_median_of_its_own_simulations() -> None:
    compared = compare(
        [{"swaps": 12.0, "preemptions": 3.0}, {"swaps": 20.0, "preemptions": 0.0}],
        [
            [{"swaps": each, "preemptions": 0.0} for each in (8.0, 10.0, 30.0)],
            [{"swaps": 20.0, "preemptions": 0.0}],
        ],
    )
    swaps, preemptions = compared
    assert swaps.simulated == [10.0, 20.0]
    assert swaps.ratios == pytest.approx([1.2, 1.0])
    assert (swaps.low, swaps.high, swaps.verdict) == (8.0, 30.0, "met")
    assert preemptions.ratios == [None, 1.0]
    assert preemptions.verdict is None


def test_the_table_names_what_is_not_met() -> None:
    figures = {
        name: {
            "real": [2.0],
            "simulated": [1.0],
            "low": 1.0,
            "high": 1.0,
            "ratios": [2.0],
            "verdict": "not met" if name == "swaps" else "met",
        }
        for name in _run(_request(0.0, 1.0, 2.0)).figures()
    }
    share = {"count": 10, "met": 9, "share": 0.9}
    result = {
        "calibration": {
            "prefill_tokens_per_s": 300.0,
            "itl_s": 0.013,
            "cold_s": 1.0,
            "idle": {"out_s": 0.01, "in_s": 0.2},
            "busy": {"out_s": 0.5, "in_s": 0.2},
        },
        "profiles": {
            "mixed, lru": {
                "figures": figures,
                "calibrated_only": figures,
                "runs": [{"pace": {"tokens": 1.3, "idle": 1.0, "busy": 1.1}}],
                "forecasts": share,
                "forecasts_simulated": {"count": 0, "met": 0, "share": None},
            }
        },
        "forecasts": share,
    }
    assert missed(result) == ["mixed, lru: swaps, not met"]
    text = render(result)
    assert "mixed, lru: real 90% of 10, simulated none" in text
    assert text.count("not met") == 1
    assert "mixed, lru: 1.30 1.00 1.10" in text
