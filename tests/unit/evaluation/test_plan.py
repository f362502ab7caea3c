from collections import Counter

from evaluation.engines import KINDS
from evaluation.plan import Block, Pace, guess, plan, seconds, setup_s
from evaluation.session import HugePages

BOTH = [KINDS["vllm"], KINDS["llamacpp"]]
SETTINGS: tuple[HugePages, ...] = ("off", "on")


def _plan(seed: int = 1, cycles: int = 5) -> list[Block]:
    return plan(BOTH, cycles=cycles, idles=(0.0, 30.0), huge_pages=SETTINGS, seed=seed)


def _pairs(blocks: list[Block], engine: str, idle_s: float) -> Counter[str]:
    count: Counter[str] = Counter()
    for block in blocks:
        for step in block.steps:
            if (step.kind.name, step.what, step.idle_s) == (engine, "pairs", idle_s):
                count[block.huge_pages] += len(step.legs)
    return count


def test_the_same_seed_gives_the_same_order_and_another_one_another() -> None:
    assert _plan(seed=4) == _plan(seed=4)
    assert _plan(seed=4) != _plan(seed=5)


def test_five_cycles_give_twenty_pairs_for_every_arm_without_idle_time() -> None:
    for engine in KINDS:
        assert _pairs(_plan(), engine, 0.0) == {"off": 20, "on": 20}


def test_arms_with_idle_time_come_with_every_engine_and_setting() -> None:
    for cycles in (1, 2, 5):
        for engine in KINDS:
            found = _pairs(_plan(cycles=cycles), engine, 30.0)
            assert set(found) == {"off", "on"}
            assert found["off"] == found["on"]


def test_cold_starts_come_with_the_same_idle_times_as_swaps() -> None:
    steps = [step for block in _plan() for step in block.steps if step.what == "cold"]
    count = Counter((step.kind.name, step.idle_s) for step in steps)
    assert count["vllm", 0.0] == count["llamacpp", 0.0] == 5
    assert count["vllm", 30.0] >= 2
    assert count["llamacpp", 30.0] >= 2


def test_every_cycle_preempts_every_engine_and_a_batch_where_there_is_one() -> None:
    for cycle in range(5):
        steps = [step for block in _plan() if block.cycle == cycle for step in block.steps]
        found = sorted((s.kind.name, s.what) for s in steps if s.what in {"preempt", "batch"})
        assert found == [("llamacpp", "preempt"), ("vllm", "batch"), ("vllm", "preempt")]


def test_both_legs_come_first_about_as_often() -> None:
    firsts = Counter(
        legs[0] for seed in range(20) for b in _plan(seed) for s in b.steps for legs in s.legs
    )
    assert 0.4 < firsts["bare"] / firsts.total() < 0.6


def test_blocks_of_both_settings_take_turns_in_random_order() -> None:
    orders = {tuple(block.huge_pages for block in _plan(seed, cycles=1)) for seed in range(20)}
    assert orders == {("off", "on"), ("on", "off")}


def test_one_setting_alone_still_has_cold_starts_in_every_cycle() -> None:
    blocks = plan(BOTH, cycles=3, idles=(0.0,), huge_pages=("on",), seed=1)
    assert [sum(s.what == "cold" for s in block.steps) for block in blocks] == [2, 2, 2]


def test_the_whole_run_is_expected_to_fit_in_thirty_five_minutes() -> None:
    paces = {kind.name: guess(kind) for kind in BOTH}
    expected = setup_s(BOTH, paces) + seconds(_plan(), paces)
    assert 15 * 60 < expected < 35 * 60


def test_slower_engines_make_the_estimate_longer() -> None:
    def pace(cold_s: float) -> Pace:
        return Pace(cold_s=cold_s, swap_in_s=0.1, live_s=0.1, stream_s=0.1)

    fast, slow = ({kind.name: pace(cold_s) for kind in BOTH} for cold_s in (1.0, 100.0))
    assert seconds(_plan(), slow) > seconds(_plan(), fast) + 99
