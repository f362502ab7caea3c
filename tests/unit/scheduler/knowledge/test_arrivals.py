"""When an engine is asked for next."""

import itertools
import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swapserve.ids import EngineName
from swapserve.scheduler.knowledge import Arrivals
from swapserve.scheduler.knowledge.arrivals import ENGINES_MAX
from swapserve.scheduler.knowledge.gaps import LONGEST_S
from swapserve.scheduler.knowledge.sequence import SUCCESSORS_MAX

A, B, C = EngineName("a"), EngineName("b"), EngineName("c")
HOUR_S, DAY_S = 3600.0, 86_400.0


def told(arrivals: Arrivals, times: Mapping[EngineName, list[float]]) -> None:
    events = sorted((at, engine) for engine, some in times.items() for at in some)
    for at, engine in events:
        arrivals.arrived(engine, at)


def every(gap_s: float, count: int, start: float = 0.0) -> list[float]:
    return [start + gap_s * number for number in range(count)]


# ---------------------------------------------------------------------- rate


def test_the_rate_is_that_of_the_latest_requests() -> None:
    arrivals = Arrivals()
    told(arrivals, {A: [*every(100.0, 20), *every(2.0, 10, start=2000.0)]})
    assert arrivals.rate(A, 2018.0) == pytest.approx(0.5)


def test_silence_lowers_the_rate() -> None:
    arrivals = Arrivals()
    told(arrivals, {A: every(1.0, 10)})
    rates = [arrivals.rate(A, 9.0 + silent_s) for silent_s in (0.0, 10.0, 100.0, 1000.0)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01


def test_a_single_request_is_no_rush() -> None:
    arrivals = Arrivals()
    arrivals.arrived(A, 5.0)
    assert 0.0 < arrivals.rate(A, 5.0) < 0.1


def test_of_an_engine_nobody_asked_for_nothing_is_expected() -> None:
    arrivals = Arrivals()
    arrivals.arrived(A, 0.0)
    assert arrivals.rate(B, 10.0) == 0.0
    assert arrivals.chance(B, 10.0, DAY_S) == 0.0


# ---------------------------------------------------------------------- gaps


def test_a_period_is_noticed() -> None:
    arrivals = Arrivals()
    told(arrivals, {A: every(300.0, 30)})
    last = 300.0 * 29
    assert arrivals.chance(A, last + 10, 30) < 0.1, "it has just been"
    assert arrivals.chance(A, last + 275, 60) > 0.6, "it is due"
    assert arrivals.chance(A, last + 10, 400) > 0.9


def bursts(count: int, size: int, gap_s: float, pause_s: float) -> list[float]:
    return [
        at + gap_s * number for at in every(pause_s, count, start=1.0) for number in range(size)
    ]


def test_within_a_burst_the_next_is_near_after_it_it_is_not() -> None:
    arrivals = Arrivals()
    told(arrivals, {A: bursts(20, 50, 0.5, 1000.0)})
    last = 1.0 + 19 * 1000.0 + 49 * 0.5
    assert arrivals.chance(A, last + 0.1, 5.0) > 0.8
    assert arrivals.chance(A, last + 60.0, 5.0) < 0.1
    assert arrivals.chance(A, last + 60.0, 100.0) < 0.3
    assert arrivals.chance(A, last + 60.0, 1000.0) > 0.8, "many bursts do not hide the pauses"


def test_a_silence_longer_than_all_before_is_expected_to_last() -> None:
    arrivals = Arrivals()
    told(arrivals, {A: every(1.0, 1000)})
    chances = [arrivals.chance(A, 1000.0 + silent_s, 60.0) for silent_s in (1e3, 1e4, 1e5, 1e7)]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] < 0.2
    assert chances[-1] < 1e-4
    silent_s = 0.9 * LONGEST_S
    assert arrivals.chance(A, 1000.0 + silent_s, 10 * silent_s) == pytest.approx(0.9, abs=0.05)


def poisson(chance: random.Random, gap_s: float, until: float) -> list[float]:
    gaps = (chance.expovariate(1 / gap_s) for _ in itertools.count())
    return list(itertools.takewhile(lambda at: at < until, itertools.accumulate(gaps)))


def clustered(chance: random.Random, until: float) -> list[float]:
    found: list[float] = []
    for start in poisson(chance, 1800.0, until):
        steps = [chance.expovariate(0.5) for _ in range(chance.randrange(1, 40))]
        found += [start + at for at in itertools.accumulate(steps)]
    return sorted(found)


def by_turns(chance: random.Random, until: float) -> list[float]:
    busy = poisson(chance, 30.0, until)
    return [at for at in busy if int(at // 7200) % 2 == 0 or chance.random() < 0.01]


@pytest.mark.parametrize("process", ["steady", "clustered", "by turns"])
def test_chances_come_true_as_often_as_they_say(process: str) -> None:
    chance = random.Random(11)
    until = 15 * DAY_S
    times = {
        "steady": lambda: poisson(chance, 600.0, until),
        "clustered": lambda: clustered(chance, until),
        "by turns": lambda: by_turns(chance, until),
    }[process]()
    asked = sorted(chance.uniform(0.3 * until, 0.97 * until) for _ in range(3000))
    for within_s in (60.0, 600.0, 3600.0):
        arrivals, following = Arrivals(), iter([*times, math.inf])
        upcoming = next(following)
        score = expected = happened = 0.0
        for now in asked:
            while upcoming <= now:
                arrivals.arrived(A, upcoming)
                upcoming = next(following)
            said, came = arrivals.chance(A, now, within_s), upcoming - now <= within_s
            expected, happened = expected + said, happened + came
            score += (said - came) ** 2
        share = happened / len(asked)
        assert expected / len(asked) == pytest.approx(share, abs=0.06)
        assert score / len(asked) <= share * (1 - share) + 0.012, "the mean alone would do better"


# ----------------------------------------------------------- hours, sequences


def test_the_hour_of_day_is_noticed() -> None:
    arrivals = Arrivals(wall_offset_s=1_700_006_400.0)  # a midnight
    chance = random.Random(5)
    mornings = [
        day * DAY_S + 9 * HOUR_S + at for day in range(10) for at in poisson(chance, 600, HOUR_S)
    ]
    told(arrivals, {A: mornings})
    tomorrow = 10 * DAY_S
    assert arrivals.chance(A, tomorrow + 8.9 * HOUR_S, 1800.0) > 0.5
    assert arrivals.chance(A, tomorrow + 3.0 * HOUR_S, 1800.0) < 0.15
    assert arrivals.chance(A, tomorrow + 15.0 * HOUR_S, 1800.0) < 0.15


def test_a_burst_at_some_time_of_an_hour_does_not_make_all_of_it_busy() -> None:
    arrivals, chance = Arrivals(), random.Random(6)
    for day in range(10):
        start = day * DAY_S + 9 * HOUR_S + chance.uniform(0, HOUR_S)
        told(arrivals, {A: every(0.1, 200, start=start)})
    nine = 10 * DAY_S + 9 * HOUR_S
    assert arrivals.chance(A, nine, 300.0) < 0.3


def test_a_day_that_is_not_like_the_others_is_seen_to_be_so() -> None:
    arrivals = Arrivals()
    days = [day * DAY_S + 9 * HOUR_S + at for day in range(10) for at in every(120.0, 30)]
    told(arrivals, {A: days})
    nine = 10 * DAY_S + 9 * HOUR_S
    assert arrivals.chance(A, nine + 1, 300.0) > 0.5
    assert arrivals.chance(A, nine + 1800, 300.0) < 0.2, "nobody came this morning"


def test_the_hours_of_long_ago_are_forgotten() -> None:
    arrivals = Arrivals()
    told(arrivals, {A: [day * DAY_S + 9 * HOUR_S for day in range(10)]})
    assert arrivals.chance(A, 40 * DAY_S + 9 * HOUR_S - 60, 600.0) < 0.1


def test_who_always_follows_is_expected() -> None:
    arrivals = Arrivals()
    chance = random.Random(3)
    calls = poisson(chance, 900.0, 2 * DAY_S)
    told(arrivals, {A: calls, B: [at + chance.uniform(1.0, 5.0) for at in calls]})
    now = 2 * DAY_S + HOUR_S
    assert arrivals.chance(B, now, 5.0) < 0.1
    arrivals.arrived(A, now)
    assert arrivals.chance(B, now, 5.0) > 0.7
    assert arrivals.chance(B, now + 3.0, 5.0) > 0.7, "it is about to"
    assert arrivals.chance(B, now + 60.0, 5.0) < 0.3, "this time it has not"


def test_who_follows_one_engine_need_not_follow_another() -> None:
    arrivals, chance = Arrivals(), random.Random(4)
    for at in poisson(chance, 900.0, 39_000.0):
        told(arrivals, {A: [at], B: [at + 2.0], C: [at + chance.uniform(5.0, 50.0)]})
    arrivals.arrived(C, 40_000.0)
    assert arrivals.chance(B, 40_000.0, 5.0) < 0.1
    arrivals.arrived(A, 40_100.0)
    assert arrivals.chance(B, 40_100.0, 5.0) > 0.7


def test_an_engine_that_is_followed_by_just_anybody_promises_nothing() -> None:
    arrivals = Arrivals()
    for number in range(200):
        other = B if number % 10 == 0 else EngineName(f"other{number}")
        told(arrivals, {A: [1000.0 * number], other: [1000.0 * number + 2.0]})
    arrivals.arrived(A, 200_000.0)
    assert arrivals.chance(B, 200_000.0, 5.0) < 0.3


def test_a_habit_that_is_given_up_is_forgotten() -> None:
    arrivals = Arrivals()
    for number in range(100):
        other = B if number < 40 else C
        told(arrivals, {A: [1000.0 * number], other: [1000.0 * number + 2.0]})
    arrivals.arrived(A, 100_000.0)
    assert arrivals.chance(B, 100_000.0, 5.0) < 0.1
    assert arrivals.chance(C, 100_000.0, 5.0) > 0.7


# ---------------------------------------------------------------- invariants


@st.composite
def histories(draw: st.DrawFn) -> tuple[Arrivals, float]:
    arrivals = Arrivals(wall_offset_s=draw(st.floats(0, 2e9)))
    now = draw(st.floats(0, 1e6))
    for _ in range(draw(st.integers(1, 40))):
        arrivals.arrived(draw(st.sampled_from([A, B, C])), now)
        now += draw(st.one_of(st.just(0.0), st.floats(0, 10), st.floats(0, 1e6)))
    return arrivals, now


@settings(deadline=None)
@given(histories(), st.lists(st.floats(0, 1e7), min_size=2, max_size=8))
def test_a_chance_grows_with_the_time_and_is_one(
    history: tuple[Arrivals, float], spans: list[float]
) -> None:
    arrivals, now = history
    for engine in (A, B, C):
        chances = [arrivals.chance(engine, now, within_s) for within_s in sorted(spans)]
        assert all(0.0 <= chance <= 1.0 for chance in chances)
        assert all(one <= two + 1e-12 for one, two in itertools.pairwise(chances))
        assert 0.0 <= arrivals.rate(engine, now) < math.inf


@settings(deadline=None)
@given(histories(), st.floats(0, 1e7))
def test_asking_changes_nothing(history: tuple[Arrivals, float], within_s: float) -> None:
    arrivals, now = history
    before = arrivals.as_json(now)
    for engine in (A, B, C, EngineName("stranger")):
        arrivals.chance(engine, now + within_s, within_s)
        arrivals.rate(engine, now + within_s)
    assert arrivals.as_json(now) == before


@pytest.mark.parametrize("silent_s", [0.0, 0.06, 0.0625, 1.0, LONGEST_S, 3 * LONGEST_S])
def test_no_length_of_silence_is_out_of_bounds(silent_s: float) -> None:
    arrivals = Arrivals()
    told(arrivals, {A: [0.0, silent_s, 2 * silent_s]})
    for edge in (math.nextafter(silent_s, 0.0), silent_s, math.nextafter(silent_s, math.inf)):
        for within_s in (0.0, 1e-9, silent_s, 1e9, math.inf):
            assert 0.0 <= arrivals.chance(A, 2 * silent_s + edge, within_s) <= 1.0


def test_a_clock_that_steps_back_does_no_harm() -> None:
    arrivals = Arrivals()
    told(arrivals, {A: every(10.0, 20)})
    arrivals.arrived(A, 50.0)
    arrivals.arrived(B, 20.0)
    assert 0.0 <= arrivals.chance(A, 10.0, 5.0) <= 1.0
    assert arrivals.rate(A, 10.0) >= 0.0


def test_engines_and_sequences_do_not_pile_up() -> None:
    arrivals = Arrivals()
    for number in range(3 * ENGINES_MAX):
        arrivals.arrived(EngineName(f"e{number}"), float(number))
    for number in range(10 * SUCCESSORS_MAX):
        arrivals.arrived(A, 1e6 + 2 * number)
        arrivals.arrived(EngineName(f"e{number}"), 1e6 + 2 * number + 1)
    stored = arrivals.as_json(2e6)
    assert len(stored["engines"]) == ENGINES_MAX
    assert len(stored["sequence"]["after"]) <= ENGINES_MAX
    assert len(stored["sequence"]["after"][A]) == SUCCESSORS_MAX
    assert len(stored["engines"][A]["ago_s"]) <= 8
