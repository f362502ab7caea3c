"""Traces of the Azure format: reading them, splitting them, and the generator's likeness."""

import random
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from evaluation.simulate.azure import (
    CODE,
    CONVERSATION,
    BadTrace,
    Row,
    Service,
    generate,
    read,
    replay,
)
from evaluation.simulate.load import Size
from tests.support.simulation import KIND, cluster

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def written(directory: Path, text: str) -> Path:
    path = directory / "trace.csv"
    path.write_text(text)
    return path


def test_rows_are_read_in_order_of_time_from_the_first_one(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        HEAD
        + "2023-11-16 18:17:05.0000000,20,0\n"
        + "2023-11-16 18:17:03.9799600,4808,10\n"
        + "2023-11-16 18:17:04,3180,8\n",
    )
    rows = read(path)
    assert [row.at for row in rows] == pytest.approx([0.0, 0.02004, 1.02004], abs=1e-6)
    assert [(row.tokens_in, row.tokens_out) for row in rows] == [(4808, 10), (3180, 8), (20, 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column TIMESTAMP"),
        ("TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        (HEAD, "no requests"),
        (HEAD + "2023-11-16 18:17:03.1,5,5\n2023-11-16 18:17:04,many,5\n", "trace.csv:3:.*'many'"),
        (HEAD + "yesterday,5,5\n", "trace.csv:2:.*'yesterday'"),
        (HEAD + "2023-11-16 18:17:04,5\n", "trace.csv:2: too few columns"),
        (HEAD + "2023-11-16 18:17:04,-5,5\n", "trace.csv:2: a negative number"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadTrace, match=said):
        read(written(tmp_path, text))


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match=r"nowhere\.csv"):
        read(tmp_path / "nowhere.csv")
    (tmp_path / "trace.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadTrace, match=r"trace\.csv"):
        read(tmp_path / "trace.csv")


# ------------------------------------------------------------------ replay


def test_two_traces_belong_to_models_in_turn_and_one_factor_changes_the_pace() -> None:
    found = cluster(KIND, KIND, KIND, KIND)
    traces = [
        [Row(float(n), 100, 10) for n in range(300)],
        [Row(n * 2.0, 7, 3) for n in range(150)],
    ]
    work = replay(traces, found, Size(requests=1000, load=0.5))
    assert len(work) == 450
    of_first = [n for n in range(450) if work.tokens_in[n] == 100]
    assert {work.model[n] for n in of_first} == {0, 2}
    gaps = {round(work.arrival[b] - work.arrival[a], 6) for a, b in pairwise(of_first)}
    assert len(gaps) == 1
    slower = replay(traces, found, Size(requests=1000, load=0.25))
    assert slower.arrival[-1] == pytest.approx(2 * work.arrival[-1])


def test_no_more_than_wanted_from_the_beginning_of_all() -> None:
    found = cluster(KIND)
    traces = [[Row(float(n), 100, 10) for n in range(300)]] * 2
    work = replay(traces, found, Size(requests=100))
    assert len(work) == 100
    assert set(work.model) == {0}


def test_a_trace_of_one_request_can_be_replayed() -> None:
    work = replay([[Row(0.0, 5, 5)]], cluster(KIND), Size())
    assert work.arrival == [0.0]
    assert work.tokens_in == [5]


# --------------------------------------------------------------- generator


def _share(values: list[int], share: float) -> float:
    return sorted(values)[int(share * len(values))]


@pytest.mark.parametrize(
    ("service", "tokens_in", "tokens_out"),
    [
        (CONVERSATION, (1020, 2735, 4142), (129, 424, 601)),
        (CODE, (1469, 5194, 7436), (13, 55, 252)),
    ],
)
def test_lengths_have_the_quantiles_of_the_trace(
    service: Service, tokens_in: tuple[int, ...], tokens_out: tuple[int, ...]
) -> None:
    rows = generate(service, 5.0, 30_000, random.Random(3))
    for column, wanted in (
        ([row.tokens_in for row in rows], tokens_in),
        ([row.tokens_out for row in rows], tokens_out),
    ):
        found = [_share(column, share) for share in (0.5, 0.9, 0.99)]
        assert found == [pytest.approx(value, rel=0.12) for value in wanted]


def _per_minute(rows: list[Row]) -> list[int]:
    minutes = [0] * (int(rows[-1].at // 60) + 1)
    for row in rows:
        minutes[int(row.at // 60)] += 1
    return minutes[:-1]


def test_conversation_is_steady_and_code_comes_in_bursts() -> None:
    # The trace: 5.53 and 2.57 requests per second; variance over mean of the requests in a
    # minute 20.6 and 160.5; 12 of 58 minutes of code without any.
    steady = _per_minute(generate(CONVERSATION, 5.53, 60_000, random.Random(5)))
    bursty = _per_minute(generate(CODE, 2.57, 60_000, random.Random(5)))
    assert fmean(steady) / 60 == pytest.approx(5.53, rel=0.1)
    assert fmean(bursty) / 60 == pytest.approx(2.57, rel=0.2)
    assert 10 < pstdev(steady) ** 2 / fmean(steady) < 40
    assert 90 < pstdev(bursty) ** 2 / fmean(bursty) < 260
    assert min(steady) > 0
    assert sum(not count for count in bursty) / len(bursty) == pytest.approx(0.2, abs=0.06)
