from typing import Any

from evaluation.gpu.table import render, wrong

HEAD = {"commit": "abc", "started": "2026-01-01", "seconds": 12.0}


def _result(**parts: dict[str, Any]) -> dict[str, Any]:
    return {**HEAD, "parts": {k: {"state": "done", "why": "", **v} for k, v in parts.items()}}


def _lap(checkpoint_s: float, **changed: Any) -> dict[str, Any]:
    calls = {"lock_s": 0.001, "checkpoint_s": checkpoint_s, "restore_s": 0.5, "unlock_s": 0.002}
    return {"bytes": 8_000_000_000, "huge_pages": True, "content": "equal", **calls, **changed}


def test_parts_without_anything_are_a_line_each() -> None:
    result = _result(
        facts={"state": "impossible", "why": "no driver\nat all"},
        bandwidth={},
        calls={},
        engines={"state": "out of time", "why": "gone"},
    )
    assert render(result).splitlines()[2] == "facts: impossible (no driver)"
    assert "engines: out of time (gone)" in render(result)


def test_rates_are_of_the_median_lap_and_only_of_whole_ones() -> None:
    unfinished = {"bytes": 8_000_000_000, "huge_pages": True, "lock_s": 1.0}
    laps = [_lap(2.0), _lap(9.0), _lap(4.0), unfinished]
    text = render(_result(calls={"laps": laps}))
    assert "8.0 GB, huge pages on" in text
    assert "checkpoint 4.00 s (2.0 GB/s), restore 0.50 s (16.0 GB/s)" in text
    assert "n=3" in text


def test_an_engine_that_failed_says_so_and_one_that_worked_is_told_in_full() -> None:
    cycle = {"equal": True, "out_s": 1.0, "first_token_s": 0.5}
    engines: dict[str, Any] = {
        "torch": {
            "cold": [{"first_token_s": 20.0}],
            "cycles": [cycle, {**cycle, "out_s": 3.0}, {"out_s": 9.0}],
            "load": {"seconds": 40.0, "answers": 12, "lost": 0, "wrong": 0},
            "load_moves": [{"kind": "swap_in"}, {"kind": "swap_out"}],
        },
        "vllm": {"failures": [{"what": "making ready", "why": "python has no vllm"}]},
    }
    text = render(_result(engines=engines))
    assert "torch: cold start 20.00 s" in text
    assert "cycles: 2 of 3 with equal answers; out 2.00 s, back to the first token 0.50 s" in text
    assert "12 answers, 1 swaps in, 0 lost, 0 wrong" in text
    assert "making ready: python has no vllm" in text


def test_everything_that_came_back_different_is_wrong() -> None:
    right: dict[str, Any] = {"torch": {"load": {"wrong": 0}}}
    assert wrong(_result(calls={"laps": [_lap(1.0)]}, engines=right)) == []
    engines = {
        "torch": {
            "preempted": [{"equal": False, "why": "pieces differ"}, {"equal": True, "why": ""}],
            "load": {"wrong": 2},
        },
        "cuda": {"failures": [{"what": "cycle", "why": "Unequal: logprobs\ntrace"}]},
    }
    calls = {"failures": [{"what": "8 bytes", "why": "TargetFailed: WrongContent: chunk 0"}]}
    assert wrong(_result(calls=calls, engines=engines)) == [
        "8 bytes: TargetFailed: WrongContent: chunk 0",
        "a stream: pieces differ",
        "2 answers under load",
        "cycle: Unequal: logprobs",
    ]
