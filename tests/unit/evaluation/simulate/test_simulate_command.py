"""`python -m evaluation simulate`, with real small runs."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from evaluation.__main__ import cli

SMALL = ["--gpus", "1", "--models", "2", "--requests", "60", "--policies", "adaptive,fifo-drain"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profiles", "azure,nonsense"], "'nonsense' is none of single_model"),
        (["--profiles", "azure,azure"], "names something twice"),
        (["--policies", "best"], "found 'best'; expected one of adaptive"),
        (["--gpus", "1,two"], "no list of numbers"),
        (["--gpus", "0"], "not between 1 and 64"),
        (["--models", "2,2"], "names something twice"),
        (["--requests", "0"], "0 is not in the range"),
        (["--load", "0"], "0 is not in the range"),
        (["--held", "0.5"], "0.5 is not in the range"),
        (["--profiles", "trace"], "give the trace with --trace"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["simulate", *arguments])
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--costs", "h1000"], "'h1000' is none of"),
        (["--costs", "/nowhere.yaml"], "No such file"),
        (["--results", "/nowhere.json"], "No such file"),
        (["--trace", "/nowhere.csv"], "No such file"),
        (["--json", "/nowhere/at/all.json"], "is no directory to write all.json in"),
    ],
)
def test_bad_files_are_named(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["simulate", *SMALL, *arguments])
    assert done.exit_code == 1
    assert said in done.output


def test_a_run_writes_table_json_and_charts(tmp_path: Path) -> None:
    trace = tmp_path / "mine.csv"
    rows = "".join(f"2023-11-16 18:{n:02d}:00,{100 + n},{5 + n}\n" for n in range(40))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    out = tmp_path / "out.json"
    done = CliRunner().invoke(
        cli,
        [
            "simulate",
            *SMALL,
            "--profiles=mixed",
            f"--trace={trace}",
            f"--json={out}",
            f"--plots={tmp_path / 'charts'}",
            "--seeds=2",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "mixed: 1 GPU, 2 models" in done.stdout
    result = json.loads(out.read_text())
    assert [(row["profile"], row["policy"]) for row in result["rows"]] == [
        ("mixed", "adaptive"),
        ("mixed", "fifo-drain"),
        ("trace", "adaptive"),
        ("trace", "fifo-drain"),
    ]
    assert result["options"]["traces"] == ["mine.csv"]
    assert result["costs"]["sources"]["dynamo"]["url"].startswith("https://")
    assert result["rows"][2]["requests"] == 2 * 40
    assert (tmp_path / "charts" / "ttft-trace.svg").is_file()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    found = []
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.json"
        arguments = ["simulate", *SMALL, "--profiles=agents", f"--json={out}", f"--jobs={jobs}"]
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
        rows = json.loads(out.read_text())["rows"]
        found.append([{k: v for k, v in row.items() if k != "cpu_s"} for row in rows])
    assert found[0] == found[1]
