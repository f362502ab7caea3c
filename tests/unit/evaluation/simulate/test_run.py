"""Whole runs: by hand, the same twice, and what happens if the core goes wrong."""

from dataclasses import replace
from typing import ClassVar

import pytest

from evaluation.simulate import simulate
from evaluation.simulate.cluster import build
from evaluation.simulate.costs import named
from evaluation.simulate.load import Size
from evaluation.simulate.outcome import UNSET
from evaluation.simulate.profiles import PROFILES
from evaluation.simulate.run import RULES, Stuck
from evaluation.simulate.workload import Workload
from swapserve.messages import Rules
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.policies.base import NEVER, Leave, View, Wish
from swapserve.scheduler.policies.registry import POLICIES
from swapserve.states import Priority
from tests.support.simulation import KIND, SLEEPER, cluster, requests

SWAPPING = [name for name, policy in POLICIES.items() if policy.swaps]


@pytest.mark.parametrize("policy", list(POLICIES))
def test_alone_a_request_takes_what_the_engine_takes(policy: str) -> None:
    outcome = simulate(cluster(KIND), requests((1.0, 0, 500, 101)), policy)
    assert outcome.ttft_s(0) == pytest.approx(0.5)
    assert outcome.e2e_s(0) == pytest.approx(1.5)
    assert outcome.alone_s == [pytest.approx(1.5)]
    assert outcome.activity.serving_s == pytest.approx(1.5)
    assert outcome.activity.seconds == pytest.approx(1.5)


@pytest.mark.parametrize("policy", SWAPPING)
def test_an_idle_engine_leaves_for_the_one_that_is_wanted(policy: str) -> None:
    work = requests((0.0, 0, 500, 101), (100.0, 1, 500, 101))
    outcome = simulate(cluster(KIND, KIND), work, policy)
    # Two seconds out and one in, without caches; both have rested in host memory before.
    assert outcome.ttft_s(1) == pytest.approx(3.5)
    assert outcome.activity.swaps_in == outcome.activity.swaps_out == 1
    assert outcome.activity.moving_s == pytest.approx(3.0)
    assert outcome.activity.preemptions == 0


def test_static_holds_everything_at_once() -> None:
    work = requests((0.0, 0, 500, 101), (100.0, 1, 500, 101))
    outcome = simulate(cluster(KIND, KIND), work, "static")
    assert outcome.ttft_s(1) == pytest.approx(0.5)
    assert outcome.activity.swaps_in == 0


def test_a_long_answer_is_interrupted_and_goes_on() -> None:
    work = requests((0.0, 0, 0, 20_001), (1.0, 1, 0, 11))
    outcome = simulate(cluster(KIND, KIND), work, "lru", rules=replace(RULES, quantum_s=5.0))
    records = outcome.records
    assert records.spells[0] == 1
    assert outcome.activity.preemptions == 1
    assert outcome.activity.tokens_preempted > 400
    assert records.suspended_s[0] == records.spell_s[0] > 4.0 + 1.0
    # It takes its 200 seconds and the time that it was away, no more.
    assert outcome.e2e_s(0) == pytest.approx(200.0 + records.suspended_s[0])
    assert outcome.e2e_s(1) is not None


def test_with_drain_the_long_answer_comes_first() -> None:
    work = requests((0.0, 0, 0, 1001), (1.0, 1, 0, 11))
    outcome = simulate(cluster(KIND, KIND), work, "fifo-drain")
    assert outcome.activity.preemptions == 0
    assert outcome.activity.drains == 1
    assert outcome.ttft_s(1) == pytest.approx(9.0 + 3.0)


def test_requests_of_a_closed_loop_come_when_the_last_ones_are_over() -> None:
    work = Workload(name="loop")
    work.add(1.0, 0, 0, 101, stage=0)
    work.add(0.0, 0, 0, 51, stage=0)
    work.add(5.0, 0, 0, 1, stage=1, after=0)
    outcome = simulate(cluster(KIND), work, "adaptive")
    assert outcome.records.arrived == [1.0, 0.0, pytest.approx(2.0 + 5.0)]
    assert outcome.records.ended[2] == pytest.approx(7.0)


def test_who_is_refused_ends_its_round_too() -> None:
    work = Workload(name="loop")
    work.add(0.0, 0, 0, 20_001, stage=0)
    work.add(0.5, 1, 0, 11, stage=1)
    work.add(1.0, 0, 0, 1, stage=2, after=1)
    rules = replace(RULES, queue_timeout_s=2.0)
    outcome = simulate(cluster(SLEEPER, SLEEPER, gpu_gb=12), work, "fifo-drain", rules=rules)
    assert outcome.records.refused == {1: "QueueTimeout"}
    assert outcome.records.ended[1] == UNSET
    assert outcome.records.arrived[2] == pytest.approx(0.5 + 2.0 + 1.0)


def test_the_same_arguments_give_the_same_outcome_and_another_seed_another_one() -> None:
    found = cluster(KIND, SLEEPER, KIND, gpu_gb=12)
    size = Size(requests=300)

    def run(seed: int) -> list[float]:
        work = PROFILES["azure"](found, replace(size, seed=seed))
        return simulate(found, work, "adaptive", noise=0.2, seed=seed).records.ended

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("profile", list(PROFILES))
@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_policy_serves_every_profile_without_an_illegal_effect(
    profile: str, policy: str
) -> None:
    found = cluster(KIND, KIND, SLEEPER, KIND, KIND, SLEEPER, gpus=2, gpu_gb=12, ram_gb=20)
    work = PROFILES[profile](found, Size(requests=120))
    outcome = simulate(found, work, policy)
    assert not outcome.records.refused
    assert UNSET not in outcome.records.ended
    assert all(a >= 0 for a in outcome.records.suspended_s)
    for number in range(len(work)):
        took = outcome.e2e_s(number)
        assert took is not None
        # A warm cache can only spare the prompt.
        spared = work.tokens_in[number] / KIND.speed.prefill_tokens_per_s
        assert took >= outcome.alone_s[number] - spared - 1e-6


@pytest.mark.parametrize("policy", list(POLICIES))
def test_engines_on_two_gpus_take_turns_with_those_on_one(policy: str) -> None:
    found = build(named("h100-driver"), gpus=3, models=9, spread=3)
    work = PROFILES["mixed"](found, Size(requests=150))
    outcome = simulate(found, work, policy)
    assert UNSET not in outcome.records.ended


def test_priorities_keys_and_lengths_reach_the_core() -> None:
    seen: list[tuple[Priority, str, float, int | None]] = []

    class Curious:
        name: ClassVar[str] = "curious"
        swaps: ClassVar[bool] = True
        bounded: ClassVar[bool] = False

        def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
            del view
            if wish.engine is not None:
                for lease in wish.engine.waiting:
                    ask = lease.ask
                    seen.append((ask.priority, ask.key, ask.tokens_in, ask.tokens_max))
            return (0.0,)

        def leave(self, view: View, victim: object, wish: Wish) -> Leave:
            del victim, wish
            return Leave(at=view.now, cut_at=NEVER, rank=(0.0,))

    work = requests((0.0, 0, 0, 11))
    work.add(1.0, 1, 70, 5, priority=Priority.BATCH, key="me", tokens_max=9)
    simulate(cluster(KIND, KIND), work, Curious())
    assert set(seen) == {(Priority.BATCH, "me", 70, 9)}


def test_what_was_learnt_before_is_used_and_grows() -> None:
    found = cluster(KIND, KIND)
    work = PROFILES["azure"](found, Size(requests=100))
    knowledge = Knowledge(0.0)
    first = simulate(found, work, "adaptive", knowledge=knowledge).covered
    second = simulate(found, work, "adaptive", knowledge=knowledge).covered
    assert second[1] == first[1] + len(work)


# ------------------------------------------------------------------ wrong


def test_an_unknown_policy_and_a_wrong_workload_are_named() -> None:
    with pytest.raises(ValueError, match="'best' is none of adaptive"):
        simulate(cluster(KIND), requests((0.0, 0, 1, 1)), "best")
    with pytest.raises(ValueError, match="there is no model 3"):
        simulate(cluster(KIND), requests((0.0, 3, 1, 1)), "lru")


def test_a_policy_that_lets_nobody_in_is_found_out() -> None:
    class Stubborn:
        name: ClassVar[str] = "stubborn"
        swaps: ClassVar[bool] = True
        bounded: ClassVar[bool] = False

        def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
            del view, wish
            return (0.0,)

        def leave(self, view: View, victim: object, wish: Wish) -> Leave:
            del view, victim, wish
            return Leave(at=NEVER, cut_at=NEVER, rank=(0.0,))

    patient: Rules = replace(RULES, queue_timeout_s=float("inf"))
    with pytest.raises(Stuck, match="1 requests are left"):
        simulate(cluster(KIND, KIND), requests((0.0, 1, 0, 11)), Stubborn(), rules=patient)
