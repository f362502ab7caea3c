"""What a restored engine must answer."""

import pytest

from swapserve.engines.base import Canary, _canary
from swapserve.errors import CanaryFailed

GOOD = Canary(("a", "b"), (-1.0, -2.0))


def test_the_same_answer_passes_also_through_its_stored_form() -> None:
    Canary.from_json(GOOD.as_json()).check("x", Canary(("a", "b"), (-1.01, -1.99)))


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Canary(("a", "c"), (-1.0, -2.0)), "'ac', not 'ab'"),
        (Canary(("a",), (-1.0,)), "'a', not 'ab'"),
        (Canary(("a", "b"), (-1.0, -2.2)), "-2.0000 to -2.2000"),
    ],
)
def test_another_answer_fails_and_says_what_differs(now: Canary, words: str) -> None:
    with pytest.raises(CanaryFailed, match=words):
        GOOD.check("x", now)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (
            {"text": "ab", "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}},
            GOOD,
        ),
        (
            {
                "text": "ab",
                "logprobs": {
                    "content": [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -2.0}]
                },
            },
            GOOD,
        ),
        ({"text": "ab", "logprobs": None}, Canary(("ab",), ())),
        ({"text": ""}, None),
    ],
)
def test_every_known_shape_of_logprobs_is_read(
    choice: dict[str, object], expected: Canary | None
) -> None:
    assert _canary({"choices": [choice]}) == expected
