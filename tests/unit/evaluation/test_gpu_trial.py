from typing import Any

import pytest

from evaluation.gpu.trial import Unequal, in_background, same
from evaluation.stream import Answer


def _answer(**changed: Any) -> Answer:
    said = {
        "pieces": [" a", " b", " c"],
        "tokens": [1, 2, 3],
        "logprobs": [-0.1, -0.2, -0.3],
        "finish": "length",
    }
    return Answer(started=0.0, **{**said, **changed})


def test_the_same_answer_is_the_same_however_it_is_cut() -> None:
    same(_answer(), _answer(pieces=[" a b", " c"]))


def test_what_goes_wrong_in_the_background_is_raised_where_it_is_asked_for() -> None:
    assert in_background(lambda: 3).result(10) == 3
    failing = in_background(lambda: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        failing.result(10)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pieces": [" a", " x", " c"]}, "text differ from place 3 of 6"),
        ({"pieces": [" a", " b"]}, "text differ from place 4 of 6"),
        ({"tokens": [1, 2, 4]}, "tokens differ from place 2 of 3"),
        ({"logprobs": [-0.1, -0.2, -0.30001]}, "logprobs differ from place 2 of 3"),
        ({"logprobs": []}, "logprobs differ from place 0 of 3"),
        ({"finish": "stop"}, "finish differ"),
    ],
)
def test_every_difference_is_noticed(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(Unequal, match=said):
        same(_answer(**changed), _answer())
