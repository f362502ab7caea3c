"""What is learnt outlives a daemon, and nothing that is stored can harm the next."""

import copy
import json
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swapserve.ids import EngineName
from swapserve.messages import Ask, Used
from swapserve.scheduler.knowledge import Knowledge
from swapserve.states import Tier

ENGINES = [EngineName("a"), EngineName("b"), EngineName("c")]
WALL_S = 1_700_000_000.0
ASKS = [Ask(), Ask(tokens_in=5_000.0, tokens_max=100, key="k"), Ask(key="nobody")]


def learnt(seed: int = 1) -> tuple[Knowledge, float]:
    chance = random.Random(seed)
    knowledge, now = Knowledge(WALL_S), 5_000.0
    for name in ENGINES:
        knowledge.costs.size(name, chance.randrange(10**9, 10**11))
    for _ in range(400):
        now += chance.expovariate(0.01)
        name = chance.choice(ENGINES)
        ask = Ask(
            tokens_in=chance.lognormvariate(6, 1),
            key=chance.choice(["", "k"]),
            conversation=chance.randrange(9),
        )
        prefill_s, tokens_out = 0.1 + 0.001 * ask.tokens_in, chance.lognormvariate(5, 1)
        used = Used(
            tokens_in=ask.tokens_in,
            tokens_out=tokens_out,
            prefill_s=prefill_s,
            decode_s=0.03 * tokens_out,
        )
        knowledge.arrivals.arrived(name, now)
        knowledge.service.ended(name, ask, used, prefill_s + 0.03 * tokens_out)
        knowledge.caches.served(name, ask, used, now)
        tier = chance.choice([Tier.HOST, Tier.DISK])
        knowledge.costs.left(name, tier, chance.uniform(1, 3), busy=chance.random() < 0.5)
        knowledge.costs.came(name, tier, chance.uniform(1, 3), busy=chance.random() < 0.5)
    return knowledge, now


def answers(knowledge: Knowledge, now: float) -> Iterator[float]:
    """Give everything it can be asked; each has to be a sensible figure."""
    for name in (*ENGINES, EngineName("stranger")):
        for tier in Tier:
            for busy in (False, True):
                yield knowledge.costs.in_s(name, tier, busy=busy)
                yield knowledge.costs.out_s(name, tier, busy=busy)
        for ask in ASKS:
            yield knowledge.service.first_s(name, ask)
            for forecast in (
                knowledge.service.forecast(name, ask),
                knowledge.service.remaining(name, ask, 7.0),
            ):
                yield forecast.p50_s
                yield forecast.p90_s
        yield knowledge.service.itl_s(name)
        yield knowledge.arrivals.rate(name, now)
        yield from (knowledge.arrivals.chance(name, now, span_s) for span_s in (1, 60, 3600, 1e6))
        yield knowledge.caches.worth_s(name, now)


def use(knowledge: Knowledge, now: float) -> None:
    """Learn a little more, as a daemon would, and look at everything."""
    for name in ENGINES:
        used = Used(tokens_in=10.0, tokens_out=20.0, prefill_s=0.1, decode_s=1.0)
        for part in range(3):
            knowledge.arrivals.arrived(name, now + part)
            knowledge.service.ended(name, ASKS[1], used, 1.1)
            knowledge.caches.served(name, Ask(key="k", conversation=3), used, now + part)
            knowledge.costs.came(name, Tier.HOST, 2.0, busy=False)
    assert all(0.0 <= answer < math.inf for answer in answers(knowledge, now + 10.0))
    json.dumps(knowledge.as_json(now + 10.0), allow_nan=False)


def test_a_successor_knows_what_was_known() -> None:
    knowledge, now = learnt()
    for name in ENGINES:
        knowledge.caches.emptied(name)  # what a cache holds is not stored
    stored = json.loads(json.dumps(knowledge.as_json(now), allow_nan=False))
    later = 17.0  # the clock has begun anew
    successor = Knowledge.from_json(stored, later, WALL_S + now - later)
    assert list(answers(successor, later)) == pytest.approx(list(answers(knowledge, now)))
    assert list(answers(successor, later + 3e3)) == pytest.approx(
        list(answers(knowledge, now + 3e3))
    )
    use(successor, later)


def test_a_successor_knows_the_worth_of_caches_to_come() -> None:
    knowledge, now = learnt()
    successor = Knowledge.from_json(knowledge.as_json(now), now)
    used = Used(tokens_in=4_000.0, tokens_out=50.0, prefill_s=None, decode_s=None)
    ask = Ask(key="k", conversation=77)
    fresh = Knowledge()
    for one in (fresh, successor):
        one.caches.served(ENGINES[0], ask, used, now)
    assert fresh.caches.worth_s(ENGINES[0], now) == 0.0
    assert successor.caches.worth_s(ENGINES[0], now) > 0.0


def test_storing_and_reading_loses_nothing_the_second_time() -> None:
    knowledge, now = learnt()
    once = Knowledge.from_json(knowledge.as_json(now), now).as_json(now)
    assert Knowledge.from_json(once, now).as_json(now) == once


def test_another_version_is_learnt_anew() -> None:
    knowledge, now = learnt()
    stored = knowledge.as_json(now)
    for version in (0, 2, "1", None, True, [1], math.nan):
        other = Knowledge.from_json({**stored, "version": version}, now)
        assert list(answers(other, now)) == list(answers(Knowledge(), now))


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**400), 10**400),
        st.integers(-3, 100),
        st.floats(allow_nan=True, allow_infinity=True),
        st.floats(0, 1000),
        st.text(max_size=6),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(JSON)
def test_anything_may_be_stored(data: object) -> None:
    use(Knowledge.from_json(data, 5.0), 5.0)


def places(data: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the way to everything inside."""
    if path:
        yield path
    if isinstance(data, dict):
        for key, item in data.items():
            yield from places(item, (*path, key))
    elif isinstance(data, list):
        for number, item in enumerate(data):
            yield from places(item, (*path, number))


KNOWN, NOW = learnt()
STORED = json.loads(json.dumps(KNOWN.as_json(NOW)))
PLACES = [path for path in places(STORED) if path != ("version",)]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=4))
def test_any_part_may_be_spoilt(spoilt: list[tuple[tuple[Any, ...], object]]) -> None:
    data = copy.deepcopy(STORED)
    for path, value in spoilt:
        inner = data
        try:
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = value
        except (KeyError, TypeError, IndexError):
            continue  # an earlier one has taken that part away
    use(Knowledge.from_json(data, 5.0, WALL_S), 5.0)


SPOILT: list[tuple[tuple[str, ...], object]] = [
    (("caches", "a", "prefill_tokens"), 1e-300),
    (("caches", "a", "keys", "k", "reuse"), 7.0),
    (("caches", "a", "keys", "k", "log_variance"), 0.0),
    (("service", "a", "prefill", "sums"), [1.0, 5.0, 1.0, 1e-300, 1e9]),
    (("service", "a", "prefill", "sums"), [1.0, 1.0, 1.0, 1.0, 1e12]),
    (("service", "a", "prefill", "sums"), [1e12, 1e12, 1.0, 1e12, 1.0]),
    (("service", "a", "prefill", "count"), 2.5),
    (("service", "a", "itl", "value"), True),
    (("service", "a", "lengths"), [10**400]),
    (("service", "a", "free", "p90", "ratios"), [0.0, 0.0]),
    (("arrivals", "engines", "a", "ago_s"), [1.0, 5.0, 3.0]),
    (("arrivals", "engines", "a", "ago_s"), []),
    (("arrivals", "engines", "a", "hours", "day"), 1e12),
    (("arrivals", "engines", "a", "gaps", "ended"), [1e12] * 44),
    (("arrivals", "sequence", "after", "a", "b", "weight"), 1e12),
    (("arrivals", "sequence", "after", "a", "b", "log_variance"), 0.0),
    (("arrivals", "sequence", "ago_s"), -5),
    (("costs", "bytes", "a", "bytes"), 1e-300),
    (("costs", "engines", "a"), {"sideways host busy": {"value": 1.0, "count": 1}}),
]


@pytest.mark.parametrize(("path", "value"), SPOILT)
def test_figures_that_cannot_be_do_no_harm(path: tuple[str, ...], value: object) -> None:
    data = copy.deepcopy(STORED)
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    assert path[-1] in inner
    inner[path[-1]] = value
    known = Knowledge.from_json(data, 5.0, WALL_S)
    used = Used(tokens_in=100.0, tokens_out=10.0, prefill_s=None, decode_s=None)
    known.caches.served(ENGINES[0], Ask(key="k", conversation=1), used, 5.0)
    assert known.caches.worth_s(ENGINES[0], 5.0) < 1e3
    assert known.service.first_s(ENGINES[0], Ask()) < 1e3
    assert known.service.itl_s(ENGINES[0]) < 0.1
    use(known, 5.0)


def test_a_stored_habit_beyond_measure_is_unlearnt_all_the_same() -> None:
    a, b, c = ENGINES
    data = copy.deepcopy(STORED)
    data["arrivals"]["sequence"]["after"]["a"]["b"]["weight"] = 1e12
    known = Knowledge.from_json(data, 0.0, WALL_S)
    for number in range(60):
        known.arrivals.arrived(a, 1e5 * number)
        known.arrivals.arrived(c, 1e5 * number + 2.0)
    known.arrivals.arrived(a, 1e7)
    assert known.arrivals.chance(c, 1e7, 5.0) > 0.5 > known.arrivals.chance(b, 1e7, 5.0)


def test_one_bad_part_does_not_cost_the_others() -> None:
    data = copy.deepcopy(STORED)
    data["arrivals"] = "nonsense"
    data["costs"]["engines"]["a"] = [1, 2, 3]
    data["service"]["b"]["prefill"] = {"count": -1, "sums": [math.nan] * 5}
    known = Knowledge.from_json(data, NOW)
    b = ENGINES[1]
    assert known.costs.in_s(b, Tier.HOST, busy=True) == KNOWN.costs.in_s(b, Tier.HOST, busy=True)
    assert known.service.itl_s(b) == KNOWN.service.itl_s(b)
    assert known.service.first_s(b, Ask()) == Knowledge().service.first_s(b, Ask())
    assert known.arrivals.rate(b, NOW) == 0.0
