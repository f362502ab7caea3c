import pytest

from evaluation.preempt import judge
from evaluation.stream import Answer

BODY = {"max_tokens": 120}


def _answer(
    *, before: int = 60, after: int = 60, gap_s: float = 3.0, changed: int | None = None
) -> Answer:
    count = before + after
    at = [n * 0.01 + (gap_s if n >= before else 0.0) for n in range(count)]
    tokens = [n + 1000 if n == changed else n for n in range(count)]
    return Answer(
        started=0.0,
        at=at,
        pieces=[f" {token}" for token in tokens],
        tokens=tokens,
        tokens_at=at,
        offsets=[n * 3 for n in range(count)],
        finish="length",
        done=True,
    )


def test_a_stream_with_a_long_silence_in_its_middle_counts() -> None:
    case = judge(_answer(), BODY, _answer(gap_s=0.0), away_s=2.0, moved=True)
    assert (case.before, case.after) == (60, 60)
    assert (case.counted, case.equal, case.whole) == (True, True, True)


@pytest.mark.parametrize(
    ("answer", "moved"),
    [
        (_answer(before=49, after=71), True),
        (_answer(before=71, after=49), True),
        (_answer(gap_s=1.9), True),
        (_answer(), False),
    ],
)
def test_no_preemption_beyond_doubt_does_not_count(answer: Answer, moved: bool) -> None:
    assert not judge(answer, BODY, answer, away_s=2.0, moved=moved).counted


def test_one_other_token_is_noticed() -> None:
    assert judge(_answer(changed=90), BODY, _answer(), away_s=2.0, moved=True).equal is False


def test_an_engine_that_tells_no_token_ids_does_not_count() -> None:
    answer = _answer()
    answer.tokens, answer.tokens_at = [], []
    case = judge(answer, BODY, answer, away_s=2.0, moved=True)
    assert (case.counted, case.whole) == (False, False)


def test_lost_tokens_a_wrong_order_and_a_missing_end_are_noticed() -> None:
    short = _answer(after=59)
    swapped = _answer()
    swapped.offsets[80], swapped.offsets[81] = swapped.offsets[81], swapped.offsets[80]
    unended = _answer()
    unended.done = False
    stopped = _answer()
    stopped.finish = "stop"
    for answer in (short, swapped, unended, stopped):
        assert not judge(answer, BODY, None, away_s=2.0, moved=True).whole
