"""Cost tables and measured costs: what is in them, and what is said of wrong ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.simulate.cluster import build
from evaluation.simulate.costs import DEFAULT, GB, TABLES, BadCosts, Way, named, read_costs
from evaluation.simulate.measured import read_results
from swapserve.states import Tier

ROOT = Path(__file__).parents[4]
NAMES = sorted(path.stem for path in TABLES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_are_sound(name: str) -> None:
    costs = named(name)
    assert costs.about
    for source in costs.sources.values():
        assert source["title"]
    for kind in costs.kinds:
        assert kind.lean_bytes <= kind.bytes <= costs.gpu_bytes
        for tier in (Tier.HOST, Tier.DISK):
            keep, drop = (kind.ways.get((tier, kept)) for kept in (True, False))
            if keep is not None and drop is not None:
                assert drop.out_s <= keep.out_s
                assert drop.in_s <= keep.in_s
        if kind.dumps and kind.preempts:
            assert kind.ways[(Tier.DISK, True)].in_s > kind.ways[(Tier.HOST, True)].in_s
    assert DEFAULT in NAMES


def test_a_published_figure_is_in_its_table() -> None:
    small = next(kind for kind in named("b200-driver").kinds if kind.name == "Qwen3-8B")
    assert small.cold_s == 58.3
    assert small.ways[(Tier.DISK, False)].in_s == pytest.approx(8.07)
    # 60 GB took 18 s on the way out.
    assert small.ways[(Tier.HOST, True)].out_s == pytest.approx(small.bytes / GB * 18 / 60)


def _table() -> dict[str, Any]:
    figure = {"is": 1.0, "source": "me"}
    return {
        "sources": {"me": {"title": "somebody"}},
        "machine": {"gpu_gb": figure, "ram_gb_per_gpu": figure},
        "engines": [
            {
                "name": "a",
                "gpu_gb": figure,
                "lean_gb": figure,
                "cold_s": figure,
                "kill_s": figure,
                "host": {"keep": {"out_s": figure, "in_s": {"is": 2, "source": "me"}}},
                "serving": {
                    "prefill_tokens_per_s": figure,
                    "itl_s": figure,
                    "itl_growth": figure,
                    "max_seqs": figure,
                    "cache_tokens": figure,
                },
            }
        ],
    }


def _read(directory: Path, data: Any) -> Any:
    path = directory / "table.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return read_costs(path)


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    costs = _read(tmp_path, _table())
    kind = costs.kinds[0]
    assert kind.ways == {(Tier.HOST, True): Way(out_s=1.0, in_s=2.0)}
    assert (kind.preempts, kind.dumps, kind.down_s) == (True, False, None)
    assert kind.cheapest(Tier.HOST, kept=False) == kind.ways[(Tier.HOST, True)]


def _without_source(table: dict[str, Any]) -> None:
    table["engines"][0]["cold_s"] = {"is": 3.0}


def _unknown_source(table: dict[str, Any]) -> None:
    table["engines"][0]["host"]["keep"]["in_s"] = {"is": 3.0, "source": "hearsay"}


def _bare_number(table: dict[str, Any]) -> None:
    table["engines"][0]["serving"]["itl_s"] = 0.1


def _word(table: dict[str, Any]) -> None:
    table["machine"]["gpu_gb"] = {"is": "big", "source": "me"}


def _negative(table: dict[str, Any]) -> None:
    table["engines"][0]["kill_s"] = {"is": -1, "source": "me"}


def _missing(table: dict[str, Any]) -> None:
    del table["engines"][0]["lean_gb"]


def _nameless(table: dict[str, Any]) -> None:
    del table["engines"][0]["name"]


def _empty(table: dict[str, Any]) -> None:
    table["engines"] = []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without_source, r"engines\[0\].cold_s: None is none of the table's sources"),
        (_unknown_source, r"engines\[0\].host.keep.in_s: 'hearsay' is none"),
        (_bare_number, r"engines\[0\].serving.itl_s: is no mapping"),
        (_word, "machine.gpu_gb: 'big' is no figure"),
        (_negative, r"engines\[0\].kill_s: -1 is no figure"),
        (_missing, r"engines\[0\]: has no lean_gb"),
        (_nameless, r"engines\[0\]: has no name"),
        (_empty, "engines: is no list of engines"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path: Path, spoil: Any, said: str) -> None:
    table = _table()
    spoil(table)
    with pytest.raises(BadCosts, match=said):
        _read(tmp_path, table)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadCosts, match="'h1000' is none of"):
        named("h1000")
    with pytest.raises(BadCosts, match="No such file"):
        read_costs(tmp_path / "nowhere.yaml")
    with pytest.raises(BadCosts, match="is no mapping"):
        _read(tmp_path, "- 1\n")
    with pytest.raises(BadCosts, match=r"table\.yaml"):
        _read(tmp_path, "{")


# ---------------------------------------------------------------- measured


def test_costs_from_a_run_with_real_engines() -> None:
    costs = read_results(ROOT / "evaluation/results/2026-11-20-2-core-vm/swap.json")
    kinds = {kind.name: kind for kind in costs.kinds}
    vllm = kinds["vllm"]
    assert vllm.cold_s == pytest.approx(33.2, abs=0.1)
    assert vllm.ways[(Tier.DISK, True)].out_s == pytest.approx(8.6, abs=0.1)
    assert vllm.ways[(Tier.DISK, False)].in_s < 1.84
    assert not vllm.has(Tier.HOST)
    assert costs.ram_bytes == 0


def _gpu_result() -> dict[str, Any]:
    def cycle(out_s: float, back_s: float) -> dict[str, Any]:
        return {
            "equal": True,
            "resident_bytes": 10 * GB,
            "out_s": out_s,
            "first_token_s": back_s,
            "hot_first_token_s": 0.1,
        }

    return {
        "experiment": "gpu",
        "parts": {
            "engines": {
                "state": "done",
                "torch": {
                    "cold": [{"first_token_s": 20.1, "hot_first_token_s": 0.1}],
                    "cycles": [cycle(2.0, 1.1), cycle(4.0, 1.3), {"out_s": 99.0}],
                    "lean_cycles": [cycle(1.0, 0.6)],
                    "sleep_cycles": [cycle(0.5, 0.5)],
                    "disk_cycles": [cycle(9.0, 5.1)],
                    "kills": [{"seconds": 0.3}],
                },
                "vllm": {"failures": [{"what": "x", "why": "y"}]},
            }
        },
    }


def test_costs_from_a_run_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(_gpu_result()))
    (kind,) = read_results(path).kinds
    ways = {place: (way.out_s, way.in_s) for place, way in kind.ways.items()}
    assert ways[(Tier.HOST, True)] == pytest.approx((3.0, 1.1))
    assert ways[(Tier.HOST, False)] == pytest.approx((0.5, 0.4))
    assert ways[(Tier.DISK, True)] == pytest.approx((9.0, 5.0))
    assert (kind.cold_s, kind.kill_s, kind.down_s) == pytest.approx((20.0, 0.3, 6.0))
    assert kind.bytes == 10 * GB


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "result.json"),
        ("[]", "this is None"),
        ('{"experiment": "mechanisms"}', "this is 'mechanisms'"),
        ('{"experiment": "swap"}', "not a whole result"),
        ('{"experiment": "swap", "summary": {}}', "no engine in it was measured whole"),
        ('{"experiment": "gpu", "parts": {"engines": {"vllm": {}}}}', "no engine in it"),
    ],
)
def test_results_that_are_none_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(BadCosts, match=said):
        read_results(path)


# ----------------------------------------------------------------- cluster


def test_engines_are_dealt_out_so_that_each_gpu_gets_all_kinds() -> None:
    costs = named("h100-driver")
    found = build(costs, gpus=3, models=9)
    for gpu in range(3):
        kinds = {found.models[number].kind.name for number in found.on_gpu(gpu)}
        assert len(kinds) == 3
    assert found.ram_bytes == 3 * costs.ram_bytes


def test_a_gpu_holds_its_largest_engine_and_never_more_than_there_is() -> None:
    costs = named("h100-driver")
    two = build(costs, gpus=1, models=2)
    assert two.gpu_bytes == (44 * GB,)
    assert two.contended(0)
    assert build(costs, gpus=1, models=2, held=2.0).gpu_bytes == (80 * GB,)
    assert not build(costs, gpus=2, models=2).contended(0)
    with pytest.raises(ValueError, match="holds none"):
        build(costs, gpus=1, models=2, held=0.5)
    with pytest.raises(ValueError, match="GPT-9"):
        build(costs, gpus=1, models=2, kinds=["GPT-9"])


def test_some_models_can_need_two_gpus() -> None:
    found = build(named("h100-driver"), gpus=3, models=9, spread=3)
    assert [model.gpus for model in found.models][:6] == [(0,), (1,), (2, 0), (0,), (1,), (2, 0)]
    alone = build(named("h100-driver"), gpus=1, models=3, spread=3)
    assert {model.gpus for model in alone.models} == {(0,)}


def test_a_boundless_cluster_has_room_for_all() -> None:
    found = build(named("h100-driver"), gpus=2, models=8).boundless()
    assert not any(found.contended(gpu) for gpu in range(2))
    assert [found.round_s(gpu) for gpu in range(2)] == [0.0, 0.0]


def test_sleeping_engines_have_room_for_what_they_keep() -> None:
    found = build(named("a100-sleep"), gpus=1, models=4)
    assert found.gpu_bytes == (round(46 * GB) + 4 * round(1.41 * GB),)
