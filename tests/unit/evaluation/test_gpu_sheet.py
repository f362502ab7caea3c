import json
import time
from pathlib import Path

import pytest

from evaluation.gpu import sheet
from evaluation.gpu.sheet import Budget, Impossible, OutOfTime, Page, Part, Sheet


def _read(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found


def _run(tmp_path: Path, *works: object, total_s: float = 60.0) -> dict[str, dict[str, object]]:
    out = tmp_path / "out.json"
    parts = [
        Part(name=f"part {number}", seconds=10.0, work=work)  # type: ignore[arg-type]
        for number, work in enumerate(works)
    ]
    sheet.run(Sheet(out, {"experiment": "gpu"}), parts, total_s=total_s)
    found = _read(out)["parts"]
    assert isinstance(found, dict)
    return found


def test_a_part_that_fails_says_why_and_does_not_stop_the_next(tmp_path: Path) -> None:
    def fails(page: Page, _budget: Budget) -> None:
        page.add("samples", value=1)
        raise RuntimeError("the bus is gone")

    def cannot(_page: Page, _budget: Budget) -> None:
        raise Impossible("no GPU here")

    def late(_page: Page, budget: Budget) -> None:
        budget.need(1e6, "everything")

    def works(page: Page, _budget: Budget) -> None:
        page.note(value=2)

    found = _run(tmp_path, fails, cannot, late, works)
    states = [part["state"] for part in found.values()]
    assert states == ["failed", "impossible", "out of time", "done"]
    assert "RuntimeError: the bus is gone" in str(found["part 0"]["why"])
    assert found["part 0"]["samples"] == [{"value": 1}]
    assert found["part 1"]["why"] == "no GPU here"
    assert "everything takes about" in str(found["part 2"]["why"])


def test_what_was_measured_is_in_the_file_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    page = Sheet(out, {}).page("calls")
    sample = page.add("laps", bytes=1)
    sample["restore_s"] = 2.0
    page.note()
    assert _read(out)["parts"] == {
        "calls": {"state": "running", "why": "", "laps": [{"bytes": 1, "restore_s": 2.0}]}
    }


def test_a_section_is_part_of_its_page(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    Sheet(out, {}).page("engines").section("torch").add("cold", seconds=3)
    parts = _read(out)["parts"]
    assert isinstance(parts, dict)
    assert parts["engines"]["torch"] == {"cold": [{"seconds": 3}]}


def test_time_that_a_part_leaves_over_is_the_next_ones(tmp_path: Path) -> None:
    budgets = []
    for _ in range(2):
        _run(tmp_path, *[lambda _page, budget: budgets.append(budget.seconds)] * 3, total_s=30)
    assert budgets[0] == pytest.approx(10, abs=0.5)
    assert budgets[1] == pytest.approx(20, abs=0.5)
    assert budgets[2] == pytest.approx(30, abs=0.5)


def test_an_interrupted_part_is_marked_and_ends_the_run(tmp_path: Path) -> None:
    def stopped(_page: Page, _budget: Budget) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, stopped)
    parts = _read(tmp_path / "out.json")["parts"]
    assert isinstance(parts, dict)
    assert parts["part 0"]["state"] == "interrupted"


def test_an_attempt_that_fails_is_noted_and_the_part_goes_on(tmp_path: Path) -> None:
    def work(page: Page, _budget: Budget) -> None:
        with page.attempt("the first"):
            int("no number")
        with page.attempt("the second"):
            page.note(value=3)

    part = _run(tmp_path, work)["part 0"]
    assert part["state"] == "with failures"
    assert part["value"] == 3
    failures = part["failures"]
    assert isinstance(failures, list)
    assert failures[0]["what"] == "the first"
    assert failures[0]["why"].startswith("ValueError: invalid literal")


def test_what_takes_too_long_is_left_out_and_shorter_things_are_done(tmp_path: Path) -> None:
    def work(page: Page, budget: Budget) -> None:
        with page.attempt("one of many"):
            budget.need(1e6, "this")
        page.note(went="on")

    part = _run(tmp_path, work)["part 0"]
    assert (part["state"], part["went"]) == ("with failures", "on")


def test_being_stuck_ends_a_part_and_no_attempt_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheet, "GUARD_S", 0.05)

    def work(page: Page, budget: Budget) -> None:
        with page.attempt("one of many"), Budget(0.05).guard():
            time.sleep(30)
        page.note(went="on")

    part = _run(tmp_path, work)["part 0"]
    assert part["state"] == "out of time"
    assert "went" not in part


def test_a_stuck_call_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet, "GUARD_S", 0.05)
    begun = time.monotonic()
    with pytest.raises(OutOfTime, match="stuck"), Budget(0.05).guard():
        time.sleep(30)
    assert time.monotonic() - begun < 10


def test_a_guard_is_over_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet, "GUARD_S", 0.01)
    with Budget(0.01).guard():
        pass
    time.sleep(0.1)


def test_a_share_is_of_what_is_left() -> None:
    clock = [0.0]
    budget = Budget(10.0, now=lambda: clock[0])
    clock[0] = 6.0
    assert budget.share(0.5).left_s == 2.0
    clock[0] = 60.0
    assert budget.left_s == 0.0
    assert not budget.allows(0.1)
