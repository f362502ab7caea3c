"""How long requests run: forecasts that hold, whatever the engines do."""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swapserve.ids import EngineName
from swapserve.messages import Ask, Used
from swapserve.scheduler.knowledge import Forecast, Service
from swapserve.scheduler.knowledge.service import ENGINES_MAX, ENOUGH_OF_ENGINE, KEYS_MAX

A, B = EngineName("a"), EngineName("b")
WARM_UP = 30
REQUESTS = 1200

Load = Callable[[random.Random, int], tuple[float, float]]
"""Tokens of the answer and seconds between them, of the request with that number."""


@dataclass(frozen=True)
class Served:
    ask: Ask
    used: Used
    ran_s: float


def served(
    tokens_out: float,
    itl_s: float = 0.03,
    *,
    ask: Ask | None = None,
    prefill_s: float = 0.2,
    stream: bool = True,
) -> Served:
    decode_s = max(0.0, tokens_out - 1) * itl_s
    wanted = ask or Ask()
    used = Used(
        tokens_in=wanted.tokens_in,
        tokens_out=tokens_out,
        prefill_s=prefill_s if stream else None,
        decode_s=decode_s if stream else None,
    )
    return Served(wanted, used, prefill_s + decode_s)


def learn(service: Service, *requests: Served, engine: EngineName = A) -> None:
    for one in requests:
        service.ended(engine, one.ask, one.used, one.ran_s)


# -------------------------------------------------------------- calibration


def lognormal(chance: random.Random, _: int) -> tuple[float, float]:
    return chance.lognormvariate(5, 0.8), 0.03


def heavy_tail(chance: random.Random, _: int) -> tuple[float, float]:
    return min(20 * chance.paretovariate(1.1), 1e5), 0.03


def slower_and_slower(chance: random.Random, number: int) -> tuple[float, float]:
    return chance.lognormvariate(5, 0.8), 0.01 * (1 + number / 100)


def other_speeds_in_turn(chance: random.Random, number: int) -> tuple[float, float]:
    return chance.lognormvariate(5, 0.8), 0.01 if number // 300 % 2 else 0.05


def longer_answers(chance: random.Random, number: int) -> tuple[float, float]:
    return chance.lognormvariate(3 + 4 * number / REQUESTS, 0.5), 0.03


def bimodal(chance: random.Random, _: int) -> tuple[float, float]:
    return (chance.gauss(20, 3) if chance.random() < 0.7 else chance.gauss(900, 50)), 0.03


def batching(chance: random.Random, number: int) -> tuple[float, float]:
    others = (math.sin(number / 40) + 1) * 2 * chance.random()
    return chance.lognormvariate(5, 0.8), 0.02 * (1 + others)


def uneven_speed(chance: random.Random, _: int) -> tuple[float, float]:
    return 200.0, 0.03 * chance.lognormvariate(0, 0.7)


def almost_constant(chance: random.Random, _: int) -> tuple[float, float]:
    return 200.0, 0.03 * chance.lognormvariate(0, 0.02)


LOADS = [
    lognormal,
    heavy_tail,
    slower_and_slower,
    other_speeds_in_turn,
    longer_answers,
    bimodal,
    batching,
    uneven_speed,
    almost_constant,
]


def requests(load: Load, seed: int, *, stream: bool = True) -> Iterator[Served]:
    chance = random.Random(seed)
    for number in range(REQUESTS):
        ask = Ask(
            tokens_in=chance.lognormvariate(6, 1),
            tokens_max=chance.choice([None, None, 128]),
            key=chance.choice(["", "batch"]),
        )
        tokens, itl_s = load(chance, number)
        tokens = max(1.0, tokens * (3 if ask.key else 1))
        prefill_s = (0.1 + ask.tokens_in * 0.0003) * chance.lognormvariate(0, 0.2)
        yield served(
            min(tokens, ask.tokens_max or math.inf),
            itl_s,
            ask=ask,
            prefill_s=prefill_s,
            stream=stream,
        )


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("load", LOADS)
def test_nine_in_ten_take_no_longer_than_their_p90(load: Load, *, stream: bool) -> None:
    service = Service()
    within = half = 0
    for number, one in enumerate(requests(load, 1, stream=stream)):
        forecast = service.forecast(A, one.ask)
        if number >= WARM_UP:
            within += one.ran_s <= forecast.p90_s
            half += one.ran_s <= forecast.p50_s
        learn(service, one)
    assert 0.87 <= within / (REQUESTS - WARM_UP) <= 0.93
    assert 0.42 <= half / (REQUESTS - WARM_UP) <= 0.58
    hits, counted = service.coverage()
    assert counted == REQUESTS - ENOUGH_OF_ENGINE
    assert 0.87 <= hits / counted <= 0.93


def ever_slower(chance: random.Random, number: int) -> tuple[float, float]:
    return chance.lognormvariate(5, 0.3), 0.01 * 1.03 ** (number % 100)


@pytest.mark.parametrize("load", [*LOADS, ever_slower])
def test_so_do_those_that_run_side_by_side(load: Load) -> None:
    service, now = Service(), 0.0
    running: list[tuple[float, int, Served, Forecast]] = []
    within = 0
    for number, one in enumerate(requests(load, 2)):
        if len(running) == 12:
            now, _, over, said = heapq.heappop(running)
            service.ended(A, over.ask, over.used, over.ran_s, promised=said)
        promised = service.forecast(A, one.ask)
        if number >= WARM_UP:
            within += one.ran_s <= promised.p90_s
        heapq.heappush(running, (now + one.ran_s, number, one, promised))
    assert 0.87 <= within / (REQUESTS - WARM_UP) <= 0.93
    hits, counted = service.coverage()
    assert 0.87 <= hits / counted <= 0.93


def test_first_guesses_are_not_counted() -> None:
    service = Service()
    slow = served(200, 5.0)
    guess = service.forecast(A, slow.ask)
    assert not guess.learnt
    assert guess.p90_s < slow.ran_s
    for _ in range(20):  # all of them were granted before the first had ended
        service.ended(A, slow.ask, slow.used, slow.ran_s, promised=guess)
    assert service.coverage() == (0, 0)
    learnt = service.forecast(A, slow.ask)
    assert learnt.learnt
    service.ended(A, slow.ask, slow.used, slow.ran_s, promised=learnt)
    service.ended(A, slow.ask, slow.used, learnt.p90_s + 1, promised=learnt)
    assert service.coverage() == (1, 2)


@pytest.mark.parametrize("load", [lognormal, heavy_tail, bimodal, batching, uneven_speed])
@pytest.mark.parametrize("reached", [0.3, 1.0, 1.8])
def test_what_is_left_of_a_request_under_way_is_foreseen_as_well(
    load: Load, reached: float
) -> None:
    service = Service()
    within = half = counted = 0
    for number, one in enumerate(requests(load, 3)):
        ran_s = reached * service.forecast(A, one.ask).p50_s
        if number >= 200 and one.ran_s > ran_s:
            left = service.remaining(A, one.ask, ran_s)
            counted += 1
            within += one.ran_s - ran_s <= left.p90_s
            half += one.ran_s - ran_s <= left.p50_s
        learn(service, one)
    assert counted > 100
    assert 0.85 <= within / counted <= 0.95
    assert 0.4 <= half / counted <= 0.6


def test_a_few_requests_are_enough_for_a_start() -> None:
    hits = counted = 0
    for seed in range(20):
        service = Service()
        learn(service, *itertools.islice(requests(lognormal, seed), 40))
        within, all_ = service.coverage()
        hits, counted = hits + within, counted + all_
    assert 0.85 <= hits / counted <= 0.95


def test_a_forecast_does_not_buy_its_hits_with_width() -> None:
    service = Service()
    learn(service, *requests(almost_constant, 4))
    forecast = service.forecast(A, Ask(tokens_in=400))
    assert forecast.p90_s < 1.5 * forecast.p50_s


# ------------------------------------------------------------------- details


def test_before_anything_is_known_there_is_a_guess() -> None:
    service = Service()
    forecast = service.forecast(A, Ask())
    assert 0.0 < forecast.p50_s <= forecast.p90_s
    assert service.itl_s(A) > 0.0
    assert service.first_s(A, Ask(tokens_in=10_000)) > service.first_s(A, Ask())
    assert service.coverage() == (0, 0)


def test_prefill_follows_the_length_of_the_prompt() -> None:
    service = Service()
    for tokens in (100.0, 4_000.0, 900.0, 2_000.0, 300.0, 8_000.0):
        ask = Ask(tokens_in=tokens)
        learn(service, served(50, ask=ask, prefill_s=0.1 + 0.001 * tokens))
    assert service.first_s(A, Ask(tokens_in=6_000)) == pytest.approx(6.1, rel=0.1)
    assert service.first_s(A, Ask(tokens_in=200)) == pytest.approx(0.3, abs=0.1)


def test_prompts_of_one_length_tell_of_longer_ones_too() -> None:
    service = Service()
    for _ in range(20):
        learn(service, served(50, ask=Ask(tokens_in=1_000), prefill_s=2.0))
    assert service.first_s(A, Ask(tokens_in=1_000)) == pytest.approx(2.0, rel=0.1)
    assert service.first_s(A, Ask(tokens_in=4_000)) == pytest.approx(8.0, rel=0.25)


def test_prefill_that_grows_faster_than_the_prompt_does_not_start_below_nothing() -> None:
    service = Service()
    for tokens in (100.0, 1_000.0, 10_000.0):
        learn(service, served(5, ask=Ask(tokens_in=tokens), prefill_s=tokens**2 / 1e6))
    assert service.first_s(A, Ask(tokens_in=1)) >= 0.0
    assert service.first_s(A, Ask(tokens_in=10_000)) == pytest.approx(100.0, rel=0.1)


def test_one_prefill_that_hung_does_not_count_for_more_than_a_slow_one() -> None:
    service = Service()
    for tokens in (100.0, 400.0, 800.0) * 5:
        learn(service, served(50, ask=Ask(tokens_in=tokens), prefill_s=0.001 * tokens))
    learn(service, served(50, ask=Ask(tokens_in=400), prefill_s=3_000.0))
    assert service.first_s(A, Ask(tokens_in=400)) < 0.8


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(1, 1e6), st.floats(0, 1e5)),
        min_size=1,
        max_size=30,
    ),
    st.floats(1, 1e7),
)
def test_prefill_is_never_negative(readings: list[tuple[float, float]], tokens: float) -> None:
    service = Service()
    for tokens_in, seconds in readings:
        learn(service, served(5, ask=Ask(tokens_in=tokens_in), prefill_s=seconds))
    shorter = service.first_s(A, Ask(tokens_in=tokens))
    assert 0.0 <= shorter <= service.first_s(A, Ask(tokens_in=2 * tokens)) < math.inf


def test_the_gap_between_tokens_is_measured_per_engine() -> None:
    service = Service()
    for _ in range(10):
        learn(service, served(101, 0.01), engine=A)
        learn(service, served(101, 0.2), engine=B)
    assert service.itl_s(A) == pytest.approx(0.01)
    assert service.itl_s(B) == pytest.approx(0.2)


def test_answers_that_come_at_once_tell_the_gap_as_well_as_they_can() -> None:
    service = Service()
    for _ in range(10):
        learn(service, served(200, 0.5, stream=False))
    assert service.itl_s(A) == pytest.approx(0.5, rel=0.1)
    learn(service, served(200, 0.6, stream=True))
    known = service.itl_s(A)
    learn(service, served(200, 5.0, stream=False))
    assert service.itl_s(A) == known, "a stream knows better"


def test_answers_to_different_keys_differ() -> None:
    service = Service()
    for _ in range(20):
        learn(service, served(20, ask=Ask(key="chat")), served(2_000, ask=Ask(key="report")))
    chat = service.forecast(A, Ask(key="chat"))
    assert chat.p90_s < service.forecast(A, Ask(key="report")).p50_s / 10
    stranger = service.forecast(A, Ask(key="stranger"))
    assert chat.p90_s < stranger.p90_s, "it may be like either of them"


def test_no_more_tokens_are_expected_than_the_request_allows() -> None:
    service = Service()
    for _ in range(30):
        learn(service, served(1_000, 0.1))
    free, short = service.forecast(A, Ask()), service.forecast(A, Ask(tokens_max=10))
    assert free.p50_s > 50.0
    assert short.p90_s < 5.0


def test_times_that_nobody_knows_leave_what_is_known() -> None:
    service = Service()
    for _ in range(10):
        learn(service, served(100, 0.05, prefill_s=0.5))
    first_s, itl_s = service.first_s(A, Ask()), service.itl_s(A)
    for _ in range(10):
        used = Used(tokens_in=1.0, tokens_out=900.0, prefill_s=None, decode_s=None)
        service.ended(A, Ask(), used, 300.0)
    assert (service.first_s(A, Ask()), service.itl_s(A)) == (first_s, itl_s)
    assert service.forecast(A, Ask()).p90_s > 100.0


def test_the_whole_time_is_what_is_left_at_the_start() -> None:
    service = Service()
    for one in itertools.islice(requests(lognormal, 6), 300):
        assert service.remaining(A, one.ask, 0.0) == service.forecast(A, one.ask)
        learn(service, one)


def test_a_request_that_has_outlasted_all_others_still_takes_a_while() -> None:
    service = Service()
    learn(service, *requests(lognormal, 7))
    left = service.remaining(A, Ask(), 1e6)
    assert 0.0 < left.p50_s < left.p90_s < 1e6


figures = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 1e4))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(1, 1e6),
            st.one_of(st.none(), st.integers(0, 10**6)),
            figures,
            st.one_of(st.none(), figures),
            st.one_of(st.none(), figures),
            figures,
        ),
        max_size=40,
    ),
    st.floats(0, 1e6),
)
def test_whatever_comes_forecasts_stay_finite_ordered_and_not_negative(
    told: list[tuple[float, int | None, float, float | None, float | None, float]], ran_s: float
) -> None:
    service = Service()
    for tokens_in, most, tokens_out, prefill_s, decode_s, whole_s in told:
        ask = Ask(tokens_in=tokens_in, tokens_max=most)
        used = Used(
            tokens_in=tokens_in, tokens_out=tokens_out, prefill_s=prefill_s, decode_s=decode_s
        )
        service.ended(A, ask, used, whole_s)
        for forecast in (service.forecast(A, ask), service.remaining(A, ask, ran_s)):
            assert 0.0 <= forecast.p50_s <= forecast.p90_s < math.inf
    within, counted = service.coverage()
    assert 0 <= within <= counted <= len(told)


def test_the_same_requests_give_the_same_forecasts() -> None:
    def forecasts() -> list[Forecast]:
        service = Service()
        learn(service, *requests(batching, 8))
        return [service.remaining(A, Ask(key=key), 3.0) for key in ("", "batch", "new")]

    assert forecasts() == forecasts()


def test_engines_and_keys_do_not_pile_up() -> None:
    service = Service()
    for number in range(2 * ENGINES_MAX):
        learn(service, served(5), engine=EngineName(f"e{number}"))
    for number in range(4 * KEYS_MAX):
        for _ in range(300):
            learn(service, served(5, ask=Ask(key=f"k{number}")), engine=A)
    stored = service.as_json()
    assert len(stored) == ENGINES_MAX
    assert len(stored[A]["keys"]) == KEYS_MAX
    assert len(stored[A]["lengths"]) <= 256
