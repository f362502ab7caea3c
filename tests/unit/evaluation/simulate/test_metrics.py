"""What is reported, on records made by hand; verdicts, tables and charts of them."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from evaluation.simulate.grid import CURVE
from evaluation.simulate.metrics import Targets, fairness, jain, quantiles, summarise
from evaluation.simulate.outcome import Activity, Outcome, Records
from evaluation.simulate.plots import draw
from evaluation.simulate.svg import Panel, figure
from evaluation.simulate.table import render
from evaluation.simulate.verdict import judge
from evaluation.simulate.workload import Workload
from swapserve.states import Priority

TARGETS = Targets(ttft_s=2.0, itl_s=0.1, batch_slowdown=3.0)


def outcome() -> Outcome:
    """Four requests: served well; with too long gaps; a batch in time; refused."""
    work = Workload(name="by hand")
    work.add(0.0, 0, 10, 11)
    work.add(1.0, 0, 10, 11)
    work.add(2.0, 1, 10, 101, priority=Priority.BATCH)
    work.add(3.0, 1, 10, 11)
    records = Records(4)
    records.arrived = [0.0, 1.0, 2.0, 3.0]
    records.granted = [0.0, 1.5, 6.0, -1.0]
    records.first_at = [0.5, 2.0, 7.0, -1.0]
    records.ended = [1.5, 4.0, 22.0, -1.0]
    records.spell_s = [0.0, 1.25, 0.0, 0.0]
    records.refused = {3: "QueueTimeout"}
    return Outcome(
        workload=work,
        policy="adaptive",
        records=records,
        activity=Activity(
            gpus=2, seconds=20.0, serving_s=10.0, moving_s=4.0, swaps_in=2, cold_starts=1
        ),
        alone_s=[1.0, 1.0, 7.0, 1.0],
        covered=(9, 10),
        cpu_s=1.0,
    )


def test_times_are_by_priority_and_of_those_that_had_them() -> None:
    found = summarise([outcome()], TARGETS)
    assert found["ttft_s"]["all"]["n"] == 3
    assert found["ttft_s"]["all"]["max"] == 5.0
    assert found["ttft_s"]["interactive"]["p50"] == 1.0
    assert found["ttft_s"]["batch"]["p99"] == 5.0
    assert found["e2e_s"]["batch"]["mean"] == 20.0
    assert found["tpot_s"]["interactive"]["p50"] == pytest.approx(0.2)
    assert "urgent" not in found["ttft_s"]
    assert (found["requests"], found["answered"]) == (4, 3)


def test_a_request_is_good_by_the_rules_of_its_priority() -> None:
    found = summarise([outcome()], TARGETS)
    # The second one has gaps of 0.2 s; the batch took 20 of 2 + 3 x 7 s; one was refused.
    assert found["attainment"] == pytest.approx(2 / 4)
    assert found["goodput_per_s"] == pytest.approx(2 / 20)
    assert found["attainment_by_priority"] == {"interactive": pytest.approx(1 / 3), "batch": 1.0}
    assert found["refused"] == {"QueueTimeout": 1}
    strict = summarise([outcome()], Targets(ttft_s=2.0, itl_s=0.1, batch_slowdown=2.0))
    assert strict["attainment_by_priority"]["batch"] == 0.0
    patient = summarise([outcome()], Targets(ttft_s=2.0, itl_s=0.2, batch_slowdown=3.0))
    assert patient["attainment"] == pytest.approx(3 / 4)


def test_a_reader_of_its_own_counts_before_the_target_of_all() -> None:
    patient = outcome()
    patient.workload.reader_itl_s[1] = 0.25
    assert summarise([patient], TARGETS)["attainment"] == pytest.approx(3 / 4)


def test_shares_are_of_all_gpus_time() -> None:
    found = summarise([outcome(), outcome()], TARGETS)
    assert found["serving_share"] == pytest.approx(10 / 40)
    assert found["overhead_share"] == pytest.approx(4 / 40)
    assert found["swaps_in"] == 4
    assert found["swaps_per_request"] == pytest.approx(6 / 8)
    assert found["longest_wait_s"] == 4.0
    assert found["longest_suspension_s"] == 1.25
    assert found["p90_covers"] == {"share": 0.9, "n": 20}
    assert found["ttft_p99_s_by_seed"] == [5.0, 5.0]


def test_fairness_is_of_the_models_mean_speeds() -> None:
    assert jain([1.0, 1.0]) == 1.0
    assert jain([1.0, 0.0]) == 0.5
    assert jain([0.0, 0.0]) == 1.0
    first = (1.0 / 1.5 + 1.0 / 3.0) / 2
    second = (7.0 / 20.0 + 0.0) / 2
    assert fairness([outcome()]) == pytest.approx(jain([first, second]))


def test_quantiles_are_nearest_ranks() -> None:
    found = quantiles(range(1, 101))
    assert (found["p50"], found["p90"], found["p99"], found["max"]) == (51, 91, 100, 100)
    assert quantiles([]) == {"n": 0}


def test_nothing_to_report_is_an_error() -> None:
    with pytest.raises(ValueError, match="no runs"):
        summarise([], TARGETS)


# ---------------------------------------------------------------- verdicts


def row(policy: str, p99: float, **changed: Any) -> dict[str, Any]:
    found = summarise([outcome()], TARGETS)
    found["ttft_s"] = {name: {"n": 1, "p99": p99} for name in ("all", "interactive")}
    return {
        "profile": "azure",
        "gpus": 1,
        "models": 2,
        "policy": policy,
        "round_s": 20.0,
        **found,
        "goodput_per_s": 1.0,
        "longest_wait_s": 5.0,
        "ttft_curve_s": [p99] * len(CURVE),
        **changed,
    }


def test_the_default_is_measured_by_the_best_other_with_as_much_goodput() -> None:
    rows = [
        row("adaptive", 10.4),
        row("lru", 10.0),
        row("lfu", 5.0, goodput_per_s=0.9),
        row("static", 0.1),
    ]
    found = judge(rows, max_wait_s=30.0)["groups"][0]["against_best"]
    assert found == {"best": "lru", "ratio": pytest.approx(1.04), "met": True}
    rows[0] = row("adaptive", 10.6)
    assert judge(rows, max_wait_s=30.0)["against_best"] is False


def test_nobody_waits_for_the_first_token_of_a_batch() -> None:
    batches_wait = {"all": {"n": 1, "p99": 500.0}, "interactive": {"n": 1, "p99": 10.0}}
    rows = [row("adaptive", 0.0, ttft_s=batches_wait), row("lru", 10.0)]
    assert judge(rows, max_wait_s=30.0)["against_best"] is True
    only = [row("adaptive", 0.0, ttft_s={"all": {"n": 1, "p99": 500.0}}), row("lru", 10.0)]
    assert judge(only, max_wait_s=30.0)["against_best"] is False


def test_times_that_nobody_can_tell_apart_are_equal() -> None:
    rows = [row("adaptive", 0.09), row("lru", 0.01)]
    assert judge(rows, max_wait_s=30.0)["against_best"] is True


def test_in_mixed_the_default_is_three_times_better_than_draining() -> None:
    rows = [row("adaptive", 10.0, profile="mixed"), row("fifo-drain", 31.0, profile="mixed")]
    assert judge(rows, max_wait_s=30.0)["against_drain"] is True
    rows[1] = row("fifo-drain", 29.0, profile="mixed")
    assert judge(rows, max_wait_s=30.0)["against_drain"] is False
    everything_fits = [{**each, "round_s": 0.0} for each in rows]
    assert judge(everything_fits, max_wait_s=30.0)["against_drain"] is None


def test_waits_are_judged_where_a_round_of_swaps_fits_into_them() -> None:
    late = row("adaptive", 1.0, longest_wait_s=31.0)
    assert judge([late], max_wait_s=30.0)["waits"] is False
    assert judge([{**late, "round_s": 31.0}], max_wait_s=30.0)["waits"] is None
    assert judge([row("lru", 1.0)], max_wait_s=30.0)["groups"] == []


# --------------------------------------------------------- table and charts


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    options = {
        "load": 0.7,
        "seeds": 1,
        "held": 1.0,
        "max_wait": 30.0,
        "slo_ttft": 10.0,
        "slo_itl": 0.2,
    }
    return {
        "options": options,
        "costs": {"name": "imagined"},
        "commit": "abc",
        "seconds": 3.0,
        "rows": rows,
        "verdicts": judge(rows, max_wait_s=30.0),
    }


def test_the_table_has_a_line_for_each_policy_and_says_what_is_missed() -> None:
    rows = [row("adaptive", 12.34, longest_wait_s=77.0), row("lru", 10.0)]
    text = render(result(rows))
    lines = text.splitlines()
    assert "costs of imagined" in lines[0]
    assert any(line.startswith("azure: 1 GPU, 2 models") for line in lines)
    mine = next(line for line in lines if line.strip().startswith("adaptive"))
    assert "12.3" in mine
    assert "50.0 %" in mine
    assert "NOT MET" in text
    assert "azure, 1 GPUs, 2 models: 1.23 of lru" in text
    assert "somebody waited 77.0 s" in text


def test_charts_are_whole_svg_files(tmp_path: Path) -> None:
    rows = [
        row("adaptive", 1.0),
        row("lru", 200.0, gpus=2),
        row("lru", 0.0, models=8),
        {**row("lfu", 1.0), "ttft_s": {"all": {"n": 0}}, "ttft_curve_s": []},
    ]
    files = draw(rows, tmp_path / "charts")
    assert {path.name for path in files} == {
        "ttft-p99.svg",
        "attainment.svg",
        "overhead.svg",
        "ttft-azure.svg",
    }
    for path in files:
        root = ET.fromstring(path.read_text())
        assert root.tag.endswith("svg")
        assert "adaptive" in path.read_text()


def test_points_lie_where_they_belong() -> None:
    panel = Panel(
        title="<t>",
        x_label="x",
        y_label="y",
        series={"a": [(1.0, 0.0), (10.0, 0.5), (100.0, 1.0)]},
        log_x=True,
    )
    text = figure("f", [panel], columns=1)
    assert "M0.0 200.0L150.0 100.0L300.0 0.0" in text
    assert "&lt;t&gt;" in text
    empty = Panel(title="e", x_label="x", y_label="y", series={})
    assert "nothing" in figure("f", [empty], columns=1)
    flat = Panel(title="e", x_label="x", y_label="y", series={"a": [(1.0, 1.0)]}, names=["one"])
    assert "<circle" in figure("f", [flat], columns=1)
