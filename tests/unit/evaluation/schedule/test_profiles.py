import statistics

import pytest

from evaluation.schedule.calibrate import Calibration
from evaluation.schedule.ground import CONTEXT
from evaluation.schedule.predict import predict
from evaluation.schedule.profiles import PROFILES
from evaluation.schedule.prompts import BEGIN_TOKENS, prompt
from evaluation.simulate import Cluster, Model
from swapserve.ids import EngineName
from swapserve.messages import Rules
from swapserve.scheduler.knowledge import Knowledge
from swapserve.states import Priority

RULES = Rules(max_wait_s=30.0, queue_limit=256, queue_timeout_s=600.0, retry_backoff_s=2.0)


def _cluster(slower: float = 1.0) -> Cluster:
    kind = Calibration(
        cold=[1.0],
        first={tokens: [slower * (0.02 + tokens / 330.0)] for tokens in (8, 32, 128)},
        itl=[slower * 0.013],
        out_idle=[0.01],
        out_busy=[0.5],
        in_idle=[0.25],
        in_busy=[0.2],
    ).kind()
    models = tuple(
        Model(name=EngineName(f"m{number}"), kind=kind, gpus=(0,), slots=1) for number in range(3)
    )
    return Cluster(models=models, gpu_bytes=(kind.bytes,), ram_bytes=0)


@pytest.mark.parametrize("name", list(PROFILES))
def test_the_same_seed_makes_the_same_trace_and_another_one_fits_the_engines(name: str) -> None:
    here = _cluster()
    trace = PROFILES[name].trace(here, part=1.0, seed=1)
    assert trace == PROFILES[name].trace(here, part=1.0, seed=1)
    assert len(trace) == PROFILES[name].requests
    longest = max(a + b for a, b in zip(trace.tokens_in, trace.tokens_out, strict=True))
    assert longest < CONTEXT
    assert all(
        not most or most >= out
        for out, most in zip(trace.tokens_out, trace.tokens_max, strict=True)
    )
    assert len(set(trace.conversation)) == len(trace)


@pytest.mark.parametrize("name", list(PROFILES))
def test_a_profile_takes_a_minute_or_two_and_every_request_is_answered(name: str) -> None:
    here = _cluster()
    trace = PROFILES[name].trace(here, part=1.0, seed=1)
    runs = predict(here, trace, "adaptive", RULES, noise=0.1, learnt=None, seeds=range(3))
    figures = [run.figures() for run in runs]
    assert all(each["failed"] == 0 for each in figures)
    assert 30.0 < statistics.median(each["seconds"] for each in figures) < 200.0
    assert all(each["swaps"] > 3 for each in figures)


def test_a_slower_machine_is_asked_less_often() -> None:
    fast = PROFILES["agents"].trace(_cluster(), part=1.0, seed=1)
    slow = PROFILES["agents"].trace(_cluster(2.0), part=1.0, seed=1)
    assert fast.tokens_in == slow.tokens_in
    assert sum(slow.arrival) > 1.2 * sum(fast.arrival)


def test_batch_work_and_chats_are_for_different_models() -> None:
    trace = PROFILES["mixed"].trace(_cluster(), part=1.0, seed=1)
    batch = [number for number in range(len(trace)) if trace.priority[number] is Priority.BATCH]
    assert {trace.model[number] for number in batch} == {2}
    assert 2 not in {trace.model[number] for number in range(len(trace)) if number not in batch}


def test_other_moves_make_another_simulation_and_what_was_learnt_counts() -> None:
    here = _cluster()
    trace = PROFILES["chats"].trace(here, part=0.5, seed=1)
    first, second = predict(here, trace, "adaptive", RULES, noise=0.3, learnt=None, seeds=range(2))
    assert first.figures() != second.figures()
    assert first.forecasts < len(trace)
    known = Knowledge()
    (run,) = predict(
        here, trace, "adaptive", RULES, noise=0.3, learnt=known.as_json(0.0), seeds=[0]
    )
    assert run.figures() == first.figures()


def test_a_prompt_has_a_word_for_each_token_but_the_one_the_engine_adds() -> None:
    text = prompt(20, 7)
    assert len(text.split()) == 20 - BEGIN_TOKENS
    assert text == prompt(20, 7)
    assert text != prompt(20, 8)
    assert prompt(1, 1)
