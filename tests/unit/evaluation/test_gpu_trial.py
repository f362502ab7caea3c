from typing import Any

import pytest

from evaluation.gpu.trial import Unequal, same
from evaluation.stream import Answer


def _answer(**changed: Any) -> Answer:
    said = {
        "pieces": [" a", " b", " c"],
        "tokens": [1, 2, 3],
        "logprobs": [-0.1, -0.2, -0.3],
        "finish": "length",
    }
    return Answer(started=0.0, **{**said, **changed})


def test_the_same_answer_is_the_same() -> None:
    same(_answer(), _answer())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pieces": [" a", " x", " c"]}, "pieces differ from place 1 of 3"),
        ({"pieces": [" a", " b"]}, "pieces differ from place 2 of 3"),
        ({"tokens": [1, 2, 4]}, "tokens differ from place 2 of 3"),
        ({"logprobs": [-0.1, -0.2, -0.30001]}, "logprobs differ from place 2 of 3"),
        ({"logprobs": []}, "logprobs differ from place 0 of 3"),
        ({"finish": "stop"}, "finish differ"),
    ],
)
def test_every_difference_is_noticed(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(Unequal, match=said):
        same(_answer(**changed), _answer())
