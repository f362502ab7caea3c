from typing import Any

import pytest
from click.testing import CliRunner

from evaluation.__main__ import cli
from evaluation.mechanisms import ARMS, TABLES, judge, out_and_in, render
from swapserve.states import Tier
from swapserve.status import SwapSummary

COSTS = {"checkpoint": 1.0, "lean": 0.8, "sleep": 0.6, "deep_sleep": 0.4, "restart": 3.0}


def _samples(auto: list[str]) -> list[dict[str, Any]]:
    found = []
    for turn, chosen in enumerate(auto, start=1):
        for arm in ARMS:
            mechanism = chosen if arm == "auto" else arm
            half = COSTS[mechanism] / 2
            found.append(
                {"turn": turn, "arm": arm, "mechanism": mechanism, "out_s": half, "in_s": half}
            )
    return found


def test_what_auto_costs_beyond_the_best_counts_in_full_after_the_first_turns() -> None:
    auto = ["restart", "restart", *["deep_sleep"] * 9, "checkpoint"]
    found = judge(_samples(auto), after=2)
    assert (found["best"], found["turns"]) == ("deep_sleep", 10)
    assert found["ratio"] == pytest.approx((9 * 0.4 + 1.0) / (10 * 0.4))
    assert found["met"] is False
    assert found["within_turns"]["median"] == pytest.approx(1.0)
    assert found["used"] == {"deep_sleep": 9, "checkpoint": 1}


def test_an_auto_that_does_what_the_best_does_meets_the_bound() -> None:
    found = judge(_samples(["checkpoint", *["deep_sleep"] * 9]), after=1)
    assert found["ratio"] == pytest.approx(1.0)
    assert found["met"] is True
    assert "auto costs 1.000 of deep_sleep (met" in render({"some table": found})


def _move(kind: str, mechanism: str, error: str | None = None) -> SwapSummary:
    return SwapSummary(
        kind=kind,  # type: ignore[arg-type]
        mechanism=mechanism,
        from_tier=Tier.DEVICE,
        to_tier=Tier.HOST,
        cause="demand",
        seconds=1.0,
        phases={},
        unaccounted_s=0.0,
        bytes=0,
        finished_at=0.0,
        error=error,
    )


def test_each_way_out_has_the_way_back_that_followed_it() -> None:
    moves = [
        _move("cold_start", "cold"),  # nothing came before it
        _move("swap_out", "sleep"),
        _move("swap_in", "wake"),
        _move("swap_out", "lean", "refused"),
        _move("swap_out", "kill"),
        _move("cold_start", "cold"),
        _move("swap_out", "sleep"),  # still away
    ]
    pairs = [(out.mechanism, back.mechanism) for out, back in out_and_in(moves)]
    assert pairs == [("sleep", "wake"), ("kill", "cold")]


def test_every_table_names_the_calls_of_the_engine() -> None:
    assert {"driver", "sleep", "deep sleep", "restart"} <= set(TABLES)
    assert '"/sleep?level=2&mode=keep": 0.05' in TABLES["deep sleep"].habits


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tables", "weather"], "'weather' is none of driver, lean"),
        (["--turns", "5", "--after", "5"], "--after: 5 is not less than the 5 turns"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["mechanisms", *arguments])
    assert done.exit_code == 2
    assert said in done.output
