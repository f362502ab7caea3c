"""What is asked: the shapes, the load, popularity, closed loops, and wrong workloads."""

import random
from collections import Counter
from itertools import pairwise
from statistics import fmean

import pytest

from evaluation.simulate.cluster import Cluster
from evaluation.simulate.load import Size, popularity, portions, rate, swap_s
from evaluation.simulate.profiles import PROFILES
from evaluation.simulate.scenarios import JOB, JOB_S
from evaluation.simulate.shapes import balanced, bursty, dominant, interleave, single_model
from evaluation.simulate.workload import OPEN, Draw, Workload, zipf
from swapserve.states import Priority
from tests.support.simulation import KIND, cluster, requests

FOUR = cluster(KIND, KIND, KIND, KIND)
EIGHT_GPUS = cluster(*[KIND] * 32, gpus=8)


# ------------------------------------------------------------- all profiles


@pytest.mark.parametrize("name", list(PROFILES))
@pytest.mark.parametrize("found", [cluster(KIND), FOUR, EIGHT_GPUS], ids=["one", "four", "many"])
def test_each_profile_is_a_sound_workload_of_about_the_size_wanted(
    name: str, found: Cluster
) -> None:
    work = PROFILES[name](found, Size(requests=1000))
    work.check(len(found.models))
    assert 850 <= len(work) <= 1150
    again = PROFILES[name](found, Size(requests=1000))
    assert again == work
    # Every GPU gets its part, but the models' popularity differs.
    used = {gpu for model in work.model for gpu in found.models[model].gpus}
    assert len(used) == found.gpus


def test_a_seed_changes_what_is_drawn() -> None:
    for name in ("azure", "agents", "mixed"):
        first, second = (PROFILES[name](FOUR, Size(requests=100, seed=seed)) for seed in (1, 2))
        assert first != second


# ------------------------------------------------------------------ shapes


def test_the_rounds_of_llmux_shapes() -> None:
    models = [4, 5, 6]
    assert single_model(models, 7) == [(0.0, 4, 15)] * 40
    assert balanced(models, 1) == [(0.0, 6, 10), (0.1, 4, 10)]
    assert bursty(models, 4) == [(0.0, 5, 15)] * 10
    both = Counter(model for _, model, _ in interleave([4, 5], 0))
    assert both == {4: 30, 5: 30}
    volley = dominant(models, 0)
    assert len(volley) == 50
    assert Counter(model for _, model, _ in volley)[4] == 40
    assert all(volley[place][1] != 4 for place in range(4, 50, 5))
    assert all(b[0] - a[0] == pytest.approx(0.05) for a, b in pairwise(volley))


def test_a_round_comes_when_the_last_one_of_its_gpu_is_over() -> None:
    found = cluster(KIND, KIND, KIND, KIND, gpus=2)
    work = PROFILES["bursty"](found, Size(requests=80))
    for number, after in enumerate(work.after):
        gpu = found.models[work.model[number]].gpus
        if after != OPEN:
            before = [n for n, stage in enumerate(work.stage) if stage == after]
            assert {found.models[work.model[n]].gpus for n in before} == {gpu}
            assert {work.model[n] for n in before} != {work.model[number]}


# --------------------------------------------------------------- scenarios


def test_agents_alternate_between_two_models_and_repeat_all_that_was_said() -> None:
    work = PROFILES["agents"](FOUR, Size(requests=600))
    by_conversation: dict[int, list[int]] = {}
    for number, conversation in enumerate(work.conversation):
        by_conversation.setdefault(conversation, []).append(number)
    assert len(by_conversation) > 20
    for turns in by_conversation.values():
        assert len({work.model[number] for number in turns[::2]}) == 1
        assert len({work.model[number] for number in turns}) == min(2, len(turns))
        for before, number in pairwise(turns):
            said = work.tokens_in[before] + work.tokens_out[before]
            assert work.tokens_in[number] > said
            assert work.after[number] == work.stage[before]
            assert work.key[number] == work.key[before]


def test_in_mixed_batches_take_minutes_and_people_ask_other_models() -> None:
    work = PROFILES["mixed"](FOUR, Size(requests=2000))
    batch = [n for n, priority in enumerate(work.priority) if priority is Priority.BATCH]
    chats = [n for n, priority in enumerate(work.priority) if priority is Priority.INTERACTIVE]
    assert {work.model[n] for n in batch} == {3}
    assert {work.model[n] for n in chats} == {0, 1, 2}
    alone = [KIND.speed.alone_s(work.tokens_in[n], work.tokens_out[n]) for n in batch]
    assert JOB_S[0] <= min(alone)
    assert max(alone) <= JOB_S[1] + 3
    assert Counter(work.arrival[n] for n in batch).most_common(1)[0][1] == JOB
    span = max(work.arrival)
    assert max(work.arrival[n] for n in chats) > span / 2
    assert max(work.arrival[n] for n in batch) > span / 2


# -------------------------------------------------------------------- load


def test_popularity_falls_with_the_power_of_the_rank() -> None:
    assert zipf(3, 1.0) == [pytest.approx(part / 11) for part in (6, 3, 2)]
    assert zipf(2, 0.0) == [0.5, 0.5]
    rng = random.Random(1)
    drawn = Counter(Draw([7, 8, 9], zipf(3, 1.0))(rng) for _ in range(20_000))
    assert drawn[7] / 20_000 == pytest.approx(6 / 11, abs=0.02)
    assert drawn[9] / 20_000 == pytest.approx(2 / 11, abs=0.02)


def test_load_one_is_what_serving_one_by_one_with_all_swaps_can_bear() -> None:
    found = cluster(KIND, KIND)
    # Out and in from host memory, idle: 3 s. Half of the requests are for the other model.
    assert swap_s(found, 0) == pytest.approx(3.0)
    shares, alone = {0: 0.5, 1: 0.5}, {0: 1.0, 1: 2.0}
    assert rate(found, shares, alone, 1.0) == pytest.approx(1 / (1.5 + 0.5 * 3.0))
    assert rate(found, shares, alone, 0.5) == pytest.approx(0.5 / 3.0)


def test_the_hottest_gpu_decides_and_where_all_fit_nobody_swaps() -> None:
    found = cluster(KIND, KIND, KIND, gpus=2, gpu_gb=20)
    shares = popularity(found, 1.0)
    alone = dict.fromkeys(shares, 1.0)
    # The first and the third model share a GPU, which holds both.
    assert rate(found, shares, alone, 1.0) == pytest.approx(11 / 8)


def test_state_that_does_not_fit_into_memory_is_expected_on_disk() -> None:
    found = cluster(KIND, KIND, ram_gb=4)
    assert swap_s(found, 0) == pytest.approx((3.0 + 9.5) / 2)


def test_portions_add_up() -> None:
    assert portions(10, 4) == [3, 3, 2, 2]


# ------------------------------------------------------------------- wrong


def test_workloads_that_cannot_be_are_named() -> None:
    for row, why in (
        ((0.0, 2, 1, 1), "request 0: there is no model 2"),
        ((-1.0, 0, 1, 1), "arrives before the beginning"),
        ((0.0, 0, 1, 0), "no answer without a token"),
    ):
        with pytest.raises(ValueError, match=why):
            requests(row).check(2)


def test_stages_that_nobody_is_in_or_that_wait_for_themselves_are_named() -> None:
    work = Workload(name="x")
    work.add(0.0, 0, 1, 1, after=3)
    with pytest.raises(ValueError, match="comes after stage 3, which nobody is in"):
        work.check(1)
    work = Workload(name="x")
    work.add(0.0, 0, 1, 1, stage=1, after=2)
    work.add(0.0, 0, 1, 1, stage=2, after=1)
    with pytest.raises(ValueError, match="in a circle"):
        work.check(1)


def test_half_of_the_load_is_half_of_the_pace() -> None:
    spans = [
        max(PROFILES["azure"](FOUR, Size(requests=4000, load=load)).arrival) for load in (0.35, 0.7)
    ]
    assert spans[0] / spans[1] == pytest.approx(2.0, rel=0.1)
    assert fmean(spans) > 0
