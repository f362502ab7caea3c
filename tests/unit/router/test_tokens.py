"""Counting the tokens of an answer."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swapserve.router.tokens import TokenCount

START = b"\n\n"


def count(*chunks: bytes, stream: bool = True) -> float:
    """Return the tokens of an answer that comes in these chunks."""
    tokens, tail = TokenCount(), START
    for chunk in chunks:
        tokens.saw(tail, chunk)
        tail = (tail + chunk)[-5:]
    return tokens.total(stream=stream)


def sse(*data: object, compact: bool = True) -> bytes:
    spaces = (",", ":") if compact else (", ", ": ")
    texts = [one if isinstance(one, str) else json.dumps(one, separators=spaces) for one in data]
    return b"".join(b"data: " + text.encode() + b"\n\n" for text in texts)


def delta(**fields: object) -> dict[str, object]:
    return {"id": "x", "choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def words(*texts: str) -> list[dict[str, object]]:
    return [delta(content=text) for text in texts]


ROLE = delta(role="assistant", content="")
ROLE_NULL = delta(role="assistant", content=None)
END = {"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
END_TEXT = {"id": "x", "choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 77, "total_tokens": 86}}
DONE = "[DONE]"


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        ([*words("a", "b", "c"), DONE], 3),
        ([ROLE, *words("a", "b", "c"), END, DONE], 3),
        ([ROLE_NULL, *words("a", "b", "c"), END, DONE], 3),
        ([*words("a", "b", "c"), END], 3),
        ([{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, END_TEXT, DONE], 2),
        ([ROLE, *words("a", "b", "c"), END, USAGE, DONE], 77),
        ([ROLE, END, DONE], 0),
        ([DONE], 0),
    ],
)
def test_each_event_with_content_is_a_token_unless_the_usage_says(
    data: list[object], tokens: int, compact: bool
) -> None:
    whole = sse(*data, compact=compact)
    assert count(whole) == tokens
    assert count(*(sse(one, compact=compact) for one in data)) == tokens


@given(
    texts=st.lists(st.text(min_size=1), max_size=20),
    cuts=st.lists(st.integers(min_value=0, max_value=3000)),
)
def test_it_does_not_matter_how_a_stream_is_cut(texts: list[str], cuts: list[int]) -> None:
    whole = sse(*words(*texts), DONE)
    borders = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
    chunks = [whole[a:b] for a, b in itertools.pairwise(borders)]
    # Where the end mark itself is cut small it may be taken for a token.
    assert len(texts) <= count(*chunks) <= len(texts) + 1


@pytest.mark.parametrize(
    "text",
    ['"completion_tokens": 5', "\ndata: x", "[DONE]", 'data: {"delta":{}}', '"content":""'],
)
def test_a_model_s_own_words_are_not_taken_for_the_protocol_s(text: str) -> None:
    assert count(sse(*words("a", text, "b"), DONE)) == 3
    answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
    assert count(answer, stream=False) == len(answer) / 4


def test_an_answer_without_a_stream_says_its_usage_last() -> None:
    answer = {"choices": [{"message": {"content": "x" * 100_000}}], "usage": USAGE["usage"]}
    raw = json.dumps({**answer, "prompt_logprobs": None}).encode()
    assert count(raw, stream=False) == 77
    half = len(raw) - 20
    assert count(raw[:half], raw[half:], stream=False) == 77


def test_without_usage_the_size_tells() -> None:
    assert count(b"x" * 300, b"x" * 100, stream=False) == 100
    assert TokenCount().total(stream=False) == 0
    assert TokenCount().total(stream=True) == 0


def test_comments_and_other_fields_are_no_tokens() -> None:
    assert count(b": hello\n\nevent: x\ndata: {}\n\n" + sse(*words("a"), DONE)) == 2
