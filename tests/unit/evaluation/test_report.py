from typing import Any

import pytest

from evaluation.report import summarise, wrong_streams
from evaluation.table import render

SWAP = {"phases": {"restore": 0.5, "probe": 0.01}, "bytes": 7}


def _pair(number: int, *, swap_in: float, bare: float, **arm: Any) -> list[dict[str, Any]]:
    where = {"cycle": 0, "engine": "vllm", "huge_pages": "on", "idle_s": 0.0, **arm}
    return [
        {**where, "what": "bare", "pair": number, "seconds": bare, "kill_s": 0.01},
        {
            **where,
            "what": "swap_in",
            "pair": number,
            "seconds": swap_in,
            "image_bytes": 1 << 30,
            "swap": SWAP,
        },
        {**where, "what": "hot", "pair": number, "seconds": 0.05},
        {**where, "what": "discard", "pair": number, "seconds": 0.03},
    ]


def _cold(seconds: float, **arm: Any) -> dict[str, Any]:
    return {
        "cycle": 0,
        "engine": "vllm",
        "huge_pages": "off",
        "idle_s": 0.0,
        "what": "cold",
        "seconds": seconds,
        **arm,
    }


def _case(**changed: Any) -> dict[str, Any]:
    return {"counted": True, "equal": True, "whole": True, **changed}


def _preempted(what: str, *cases: dict[str, Any], cycle: int = 0) -> dict[str, Any]:
    return {
        "cycle": cycle,
        "engine": "vllm",
        "huge_pages": "on",
        "idle_s": 0.0,
        "what": what,
        "cases": list(cases),
        "swap_out_s": 2.0,
        "swap_in_s": 1.0,
        "swap_out": {"bytes": 5},
    }


def test_ratios_are_taken_within_pairs_and_not_between_medians() -> None:
    samples = _pair(1, swap_in=2.0, bare=1.0) + _pair(2, swap_in=9.0, bare=10.0)
    samples += _pair(3, swap_in=3.0, bare=2.0)
    found = summarise(samples)["vllm"]["swapin_over_bare"]
    assert found["n"] == 3
    assert found["median"] == 1.5


def test_twenty_pairs_just_above_the_mechanism_meet_the_bound() -> None:
    samples = [s for n in range(20) for s in _pair(n, swap_in=1.1 + n / 1000, bare=1.0)]
    summary = summarise(samples)["vllm"]
    assert summary["swapin_over_bare"]["verdict"] == "met"
    assert summary["discard_minus_kill_s"]["verdict"] == "met"
    assert summary["discard_minus_kill_s"]["median"] == pytest.approx(0.02)


def test_arms_with_idle_time_do_not_enter_the_ratio_over_all_pairs() -> None:
    samples = _pair(1, swap_in=1.0, bare=1.0) + _pair(2, swap_in=5.0, bare=1.0, idle_s=30.0)
    summary = summarise(samples)["vllm"]
    assert summary["swapin_over_bare"]["median"] == 1.0
    assert [arm["idle_s"] for arm in summary["arms"]] == [0.0, 30.0]
    assert summary["arms"][1]["swapin_over_bare"]["median"] == 5.0


def test_cold_starts_are_compared_with_swaps_of_the_same_cycle_and_idle_time() -> None:
    samples = [
        *_pair(1, swap_in=1.0, bare=1.0),
        *_pair(2, swap_in=4.0, bare=1.0, cycle=1),
        *_pair(3, swap_in=10.0, bare=1.0, idle_s=30.0),
        _cold(20.0),
        _cold(40.0, cycle=1),
        _cold(50.0, idle_s=30.0),
    ]
    without, with_idle = summarise(samples)["vllm"]["arms"]
    assert (without["cold_over_swapin"]["low"], without["cold_over_swapin"]["high"]) == (10.0, 20.0)
    assert without["cold_over_swapin"]["verdict"] == "met"
    assert with_idle["cold_over_swapin"]["median"] == 5.0


def test_a_cold_start_stands_for_both_huge_page_settings() -> None:
    samples = _pair(1, swap_in=1.0, bare=1.0)
    samples += [*_pair(2, swap_in=2.0, bare=1.0, huge_pages="off"), _cold(30.0)]
    off, on = summarise(samples)["vllm"]["arms"]
    assert off["cold_over_swapin"]["median"] == 15.0
    assert on["cold_over_swapin"]["median"] == 30.0
    assert "verdict" not in off["cold_over_swapin"]


@pytest.mark.parametrize(
    ("cases", "equal"),
    [
        ([_case(), _case()], True),
        ([_case(), _case(equal=False)], False),
        ([_case(), _case(counted=False)], False),
    ],
)
def test_tokens_are_equal_only_if_every_cycle_counts_and_is(
    cases: list[dict[str, Any]], equal: bool
) -> None:
    samples = [_preempted("preempt", case, cycle=n) for n, case in enumerate(cases)]
    assert summarise(samples)["vllm"]["preempt_tokens_equal"] is equal


def test_without_a_preempted_stream_nothing_is_equal() -> None:
    assert summarise(_pair(1, swap_in=1.0, bare=1.0))["vllm"]["preempt_tokens_equal"] is False


def test_a_batch_is_whole_or_not_and_its_tokens_are_not_compared() -> None:
    samples = [_preempted("batch", _case(equal=None), _case(equal=None, whole=False))]
    found = summarise(samples)["vllm"]["batched"]
    assert found["whole"] is False
    assert found["tokens_equal"] is None


def test_only_streams_that_count_can_be_wrong() -> None:
    good = [_case(), _case(equal=None), _case(counted=False, equal=False)]
    bad = [_case(equal=False), _case(whole=False)]
    assert wrong_streams([_preempted("preempt", *good), *_pair(1, swap_in=1.0, bare=1.0)]) == 0
    assert wrong_streams([_preempted("preempt", *good), _preempted("batch", *bad)]) == 2


def test_the_table_shows_every_arm_and_verdict() -> None:
    samples = [s for n in range(20) for s in _pair(n, swap_in=1.0, bare=1.0)]
    samples += [_cold(20.0), _preempted("preempt", _case(equal=False))]
    text = render(
        {
            "machine": {
                "cpu": "CPU",
                "cores": 2,
                "memory_bytes": 24 << 30,
                "os": "Debian",
                "kernel": "6",
            },
            "versions": {"criu": "4.2.1"},
            "commit": "abc",
            "minutes": 1.5,
            "summary": summarise(samples),
        }
    )
    assert "20 (20-20, n=1) met" in text
    assert "1 (1-1, n=20) met" in text
    assert "TOKENS NOT EQUAL" in text
    assert "1024 MiB" in text
