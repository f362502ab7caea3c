"""What the demonstration decides by itself: its arguments, its checks, its table."""

import io
from pathlib import Path

import pytest

from swapserve.client.control import Received
from swapserve.config.load import load
from swapserve.quickstart import times
from swapserve.quickstart.__main__ import parse
from swapserve.quickstart.acts import away_s
from swapserve.quickstart.daemon import Place
from swapserve.quickstart.models import HUB, Model, hub_answers, pulled, write_config
from swapserve.quickstart.screen import Screen, table
from swapserve.states import Tier
from swapserve.status import SwapSummary
from tests.support.hub_server import running_hub


def changed(engine: str, new: str, at: float) -> Received:
    return Received(kind="engine_changed", at=at, data={"engine": engine, "new": new})


def move(kind: str, mechanism: str, seconds: float, **phases: float) -> SwapSummary:
    return SwapSummary(
        kind=kind,  # type: ignore[arg-type]
        mechanism=mechanism,
        from_tier=Tier.DISK,
        to_tier=Tier.DEVICE,
        cause="demand",
        seconds=seconds,
        phases=phases,
        unaccounted_s=0.0,
        bytes=0,
        finished_at=0.0,
    )


def test_one_engine_named_means_both() -> None:
    assert parse(["--engines", "vllm"]).engines == ("vllm", "vllm")
    assert parse(["--engines", "vllm,llamacpp"]).engines == ("vllm", "llamacpp")


@pytest.mark.parametrize("engines", ["ollama", "vllm,vllm,vllm", ""])
def test_other_engines_are_refused(engines: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--engines", engines])
    assert caught.value.code == 2
    assert "--engines" in capsys.readouterr().err


def test_the_longest_absence_counts() -> None:
    events = [
        changed("a", "swapped_out", 1.0),
        changed("a", "swapping_in", 9.0),
        changed("a", "swapped_out", 11.0),
        changed("b", "swapped_out", 11.5),
        changed("a", "swapping_in", 12.0),
        changed("b", "swapping_in", 13.5),
        changed("a", "ready", 13.0),
        changed("a", "swapped_out", 20.0),
        changed("a", "swapping_in", 22.5),
    ]
    assert away_s(events, "a", since=10.0) == 2.5
    assert away_s(events, "b", since=10.0) == 2.0
    assert away_s(events, "a", since=21.0) == 0.0


def test_a_failed_check_is_remembered_and_shown() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.check(True, "this is so")
    screen.check(False, "that is so")
    assert screen.failures == ["that is so"]
    assert out.getvalue() == "  [ok] this is so\n  [FAIL] that is so\n"


@pytest.mark.anyio
async def test_a_failure_in_what_is_watched_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with Screen(io.StringIO()).watching(lambda: "dividing"):
            raise ZeroDivisionError


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table([["", "n", "of"], ["long", "1.25", "x"]]) == "           n  of\n  long  1.25  x"


def test_the_table_compares_with_a_cold_start_and_an_earlier_one_if_need_be(tmp_path: Path) -> None:
    place = Place(tmp_path)
    first, second = io.StringIO(), io.StringIO()
    cold = move(
        "cold_start", "cold", 9.0, spawn=0.5, health=3.5, warm_up=1.0, **{"golden.dump": 4.0}
    )
    golden = move("swap_in", "golden", 0.5, restore=0.4)
    times.show([("a", cold), ("a", golden)], place, Screen(first))
    assert "health 3.50, spawn 0.50" in first.getvalue()
    assert "8.0 x  restore 0.40" in first.getvalue()
    times.show([("a", golden)], place, Screen(second))
    assert "an earlier run's" in second.getvalue()
    assert "8.0 x" in second.getvalue()


def test_a_move_that_failed_is_told() -> None:
    summary = move("swap_in", "live", 1.0).__class__.from_json(
        {
            "kind": "swap_in",
            "mechanism": "live",
            "from_tier": "disk",
            "to_tier": "none",
            "cause": "demand",
            "seconds": 1.0,
            "phases": {},
            "unaccounted_s": 0.0,
            "bytes": 0,
            "finished_at": 0.0,
            "error": "CRIU exited with 1",
        }
    )
    assert times.failed([("a", summary)]) == ["a: swap_in failed: CRIU exited with 1"]


def test_the_configuration_it_writes_has_room_for_one_model_and_not_for_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "llama-server").write_text("#!/bin/sh\n")
    (programs / "llama-server").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    models = []
    for name in ("model-a", "model-b"):
        path = tmp_path / f'{name} "quoted".gguf'
        path.write_bytes(b"GGUF" * 1000)
        models.append(Model(name=name, recipe="llamacpp", path=path, generated=True))
    place = Place(tmp_path)
    write_config(place, models, port=0, subnet="10.231.0.0/16", profile="auto")
    config = load(place.config)
    sizes = [model.memory_bytes or 0 for model in config.models.values()]
    (device,) = config.devices.values()
    assert max(sizes) <= device.memory_bytes < sum(sizes)
    assert [model.model for model in config.models.values()] == [str(m.path) for m in models]


def test_no_keeper_is_found_where_none_runs(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.keeper_pid() is None
    place.run_dir.mkdir()
    (place.run_dir / "keeper.lock").write_text("1\n")
    assert place.keeper_pid() is None


@pytest.mark.anyio
async def test_a_model_comes_from_the_hub_once_and_its_absence_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repo, file), (other, _) = HUB["llamacpp"]
    monkeypatch.setenv("SWAPSERVE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    out = io.StringIO()
    with running_hub(repo, {file: b"GGUF", "other.gguf": b"no"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert await hub_answers()
        path = await pulled(repo, file, Screen(out))
        assert await pulled(other, "x.gguf", Screen(out)) is None
    assert path is not None
    assert path.read_bytes() == b"GGUF"
    assert [one.name for one in path.parent.iterdir()] == [file]
    assert other in out.getvalue()
    assert not await hub_answers()
    assert await pulled(repo, file, Screen(out)) == path
