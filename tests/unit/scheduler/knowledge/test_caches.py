"""What an engine's cache of prompts is worth."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swapserve.ids import EngineName
from swapserve.messages import Ask, Used
from swapserve.scheduler.knowledge import Caches
from swapserve.scheduler.knowledge.caches import ENGINES_MAX, KEYS_MAX

A, B = EngineName("a"), EngineName("b")
TOKENS = 10_000.0
PREFILL_S = 10.0


def turn(
    caches: Caches,
    conversation: int,
    now: float,
    *,
    engine: EngineName = A,
    key: str = "",
    tokens: float = TOKENS,
    prefill_s: float | None = PREFILL_S,
) -> None:
    ask = Ask(tokens_in=tokens, key=key, conversation=conversation)
    used = Used(tokens_in=tokens, tokens_out=100.0, prefill_s=prefill_s, decode_s=5.0)
    caches.served(engine, ask, used, now)


def chat(caches: Caches, turns: int, *, pause_s: float = 20.0, conversation: int = 1) -> float:
    for number in range(turns):
        turn(caches, conversation, pause_s * number)
    return pause_s * (turns - 1)


def test_a_long_conversation_is_worth_its_prefill() -> None:
    caches = Caches()
    now = chat(caches, 6)
    assert 0.5 * PREFILL_S < caches.worth_s(A, now) <= 1.02 * PREFILL_S


def test_before_anything_was_learnt_a_cache_is_worth_nothing() -> None:
    caches = Caches()
    assert caches.worth_s(A, 0.0) == 0.0
    turn(caches, 1, 0.0, prefill_s=None)
    assert caches.worth_s(A, 0.0) == 0.0, "nobody knows what a prefill takes"


def test_conversations_that_never_come_back_are_worth_little() -> None:
    caches = Caches()
    for number in range(1, 80):
        turn(caches, number, 30.0 * number)
    assert caches.worth_s(A, 30.0 * 79) < 0.1 * PREFILL_S


def test_several_conversations_are_worth_more_than_one() -> None:
    one, many = Caches(), Caches()
    chat(one, 4)
    for number in range(4):
        for conversation in (1, 2, 3):
            turn(many, conversation, 20.0 * number)
    assert many.worth_s(A, 60.0) > 2 * one.worth_s(A, 60.0)


def test_the_turns_of_one_conversation_are_not_counted_twice() -> None:
    caches = Caches()
    now = chat(caches, 200)
    assert caches.worth_s(A, now) <= 1.02 * PREFILL_S


def test_a_conversation_that_has_often_come_back_is_expected_more_than_a_new_one() -> None:
    worths = []
    for conversation in (1, 99):
        caches = Caches()
        for number in range(40):
            turn(caches, 1 if number % 8 == 0 else 100 + number, 20.0 * number)
        caches.emptied(A)
        turn(caches, conversation, 800.0)
        worths.append(caches.worth_s(A, 800.0))
    assert worths[0] > 2 * worths[1]


def test_a_conversation_that_goes_on_outlasts_those_that_do_not() -> None:
    caches = Caches()
    for number in range(2000):
        turn(caches, 1 if number % 20 == 0 else 100 + number, float(number))
    caches.emptied(A)
    turn(caches, 1, 2000.0)
    assert caches.worth_s(A, 2000.0) > 0.9 * PREFILL_S


def test_turns_in_quick_succession_are_not_counted_twice_either() -> None:
    caches = Caches()
    turn(caches, 1, 0.0)
    for number in range(1, 50):
        caches.worth_s(A, 0.01 * number)
        turn(caches, 1, 0.01 * number)
    assert caches.worth_s(A, 0.5) <= 1.02 * PREFILL_S


def test_silence_takes_its_worth() -> None:
    caches = Caches()
    now = chat(caches, 10, pause_s=20.0)
    worths = [caches.worth_s(A, now + silent_s) for silent_s in (1.0, 60.0, 600.0, 1e4)]
    assert worths == sorted(worths, reverse=True)
    assert worths[0] > 0.5 * PREFILL_S
    assert worths[-1] < 0.01 * PREFILL_S


def test_long_pauses_are_learnt() -> None:
    quick, slow = Caches(), Caches()
    for caches, pause_s in ((quick, 5.0), (slow, 900.0)):
        now = chat(caches, 30, pause_s=pause_s)
        turn(caches, 2, now + 1.0)
        caches.worth_s(A, now + 1.0)
    assert quick.worth_s(A, 29 * 5.0 + 300) < 0.1 * PREFILL_S
    assert slow.worth_s(A, 29 * 900.0 + 300) > 0.5 * PREFILL_S


def test_keys_differ() -> None:
    caches = Caches()
    for number in range(60):
        turn(caches, 100 + number // 6, 20.0 * number, key="chat")
        turn(caches, 1000 + number, 20.0 * number, key="batch")
    worths: dict[str, float] = {}
    for key in ("chat", "batch"):
        caches.emptied(A)
        turn(caches, 5000 + len(worths), 1200.0, key=key)
        worths[key] = caches.worth_s(A, 1200.0)
    assert worths["chat"] > 3 * worths["batch"]


def test_an_emptied_cache_is_worth_nothing_until_it_is_used_again() -> None:
    caches = Caches()
    now = chat(caches, 5)
    caches.emptied(A)
    caches.emptied(B)
    assert caches.worth_s(A, now) == caches.worth_s(B, now) == 0.0
    turn(caches, 1, now)
    assert caches.worth_s(A, now) > 0.5 * PREFILL_S, "that it comes back is not forgotten"


def test_prefills_that_the_cache_has_shortened_do_not_count() -> None:
    caches = Caches()
    turn(caches, 1, 0.0)
    for number in range(1, 30):
        turn(caches, 1, 20.0 * number, prefill_s=0.01)
    assert caches.worth_s(A, 580.0) > 0.5 * PREFILL_S


def test_one_prefill_that_hung_does_not_make_it_precious() -> None:
    caches = Caches()
    for number in range(1, 20):
        turn(caches, number, 10.0 * number)
    before = caches.worth_s(A, 200.0)
    turn(caches, 20, 200.0, prefill_s=1e5)
    assert caches.worth_s(A, 200.0) < 2 * before


def test_unknown_conversations_teach_the_cost_of_a_prefill_only() -> None:
    caches = Caches()
    turn(caches, 0, 0.0)
    assert caches.worth_s(A, 0.0) == 0.0
    turn(caches, 1, 0.0, prefill_s=None)
    assert caches.worth_s(A, 0.0) > 0.0


def test_engines_do_not_share_a_cache() -> None:
    caches = Caches()
    now = chat(caches, 5)
    turn(caches, 1, now, engine=B, tokens=10.0, prefill_s=0.001)
    assert caches.worth_s(B, now) < 0.01
    caches.emptied(B)
    assert caches.worth_s(A, now) > 0.5 * PREFILL_S


figures = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 1e5))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.sampled_from(["", "k"]),
            figures,
            figures,
            st.one_of(st.none(), figures),
            st.floats(-10, 1e6),
            st.booleans(),
        ),
        max_size=40,
    ),
    st.floats(0, 1e9),
)
def test_whatever_comes_the_worth_is_finite_and_not_negative(
    told: list[tuple[int, str, float, float, float | None, float, bool]], later_s: float
) -> None:
    caches, now = Caches(), 0.0
    for conversation, key, tokens_in, tokens_out, prefill_s, passed_s, emptied in told:
        now += passed_s
        used = Used(tokens_in=tokens_in, tokens_out=tokens_out, prefill_s=prefill_s, decode_s=None)
        caches.served(A, Ask(key=key, conversation=conversation), used, now)
        if emptied:
            caches.emptied(A)
            assert caches.worth_s(A, now) == 0.0
        assert 0.0 <= caches.worth_s(A, now) < math.inf
        assert 0.0 <= caches.worth_s(A, now + later_s) < math.inf


def test_what_is_remembered_is_bounded() -> None:
    caches = Caches()
    for number in range(2 * ENGINES_MAX):
        turn(caches, 1, 0.0, engine=EngineName(f"e{number}"))
    for number in range(1, 5000):
        turn(caches, number, float(number), key=f"k{number}")
    assert len(caches.as_json()) == ENGINES_MAX
    assert len(caches.as_json()[A]["keys"]) == KEYS_MAX
    assert caches.worth_s(A, 5000.0) < 32 * 1.02 * PREFILL_S


@pytest.mark.parametrize("silent_s", [1.0, 10.0, 500.0])
def test_a_figure_is_never_far_from_what_a_new_look_would_give(silent_s: float) -> None:
    often, once = Caches(), Caches()
    now = chat(often, 5)
    assert chat(once, 5) == now
    for part in range(100):
        often.worth_s(A, now + silent_s * part / 100)
    looked = often.worth_s(A, now + silent_s)
    assert looked == pytest.approx(once.worth_s(A, now + silent_s), rel=0.1)
