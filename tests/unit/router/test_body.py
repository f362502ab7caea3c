"""Reading and changing request bodies."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swapserve.errors import InvalidRequest
from swapserve.router.body import RequestBody

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("model"), inner)
    ),
    max_leaves=8,
)
OTHERS = st.dictionaries(
    st.text().filter(lambda key: key not in {"model", "stream", "temperature", "seed"}), VALUES
)


@given(
    others=OTHERS,
    model=st.text(min_size=1),
    ascii_only=st.booleans(),
    indent=st.none() | st.just(2),
)
def test_only_the_top_level_model_is_replaced(
    others: dict[str, Any], model: str, ascii_only: bool, indent: int | None
) -> None:
    body = {**others, "model": model, "metadata": {"model": model}}
    raw = json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode()
    read = RequestBody(raw)
    assert read.model == model
    assert read.rewritten() == raw
    assert json.loads(read.rewritten(model="x/y")) == {**body, "model": "x/y"}
    assert json.loads(read.rewritten(model="x", seed=5)) == {**body, "model": "x", "seed": 5}


def test_what_is_not_replaced_stays_byte_for_byte() -> None:
    raw = b' {"a" : 1.50e3,\t"mod\\u0065l": "tin\\u0079" , "model2":"tiny"}\n'
    assert RequestBody(raw).rewritten(model="big") == (
        b' {"a" : 1.50e3,\t"mod\\u0065l": "big" , "model2":"tiny"}\n'
    )


def test_a_repeated_model_is_the_last_one_and_replaced_everywhere() -> None:
    read = RequestBody(b'{"model": "a", "model": "b"}')
    assert read.model == "b"
    assert read.rewritten(model="c") == b'{"model": "c", "model": "c"}'


def test_a_null_seed_is_replaced_because_it_would_win_over_one_before_it() -> None:
    assert RequestBody(b'{"model": "a", "seed": null}').rewritten(seed=3) == (
        b'{"model": "a", "seed": 3}'
    )


@pytest.mark.parametrize(
    ("more", "samples"),
    [
        ("", True),
        (', "temperature": null', True),
        (', "temperature": 0.7', True),
        (', "temperature": 0', False),
        (', "temperature": 0.0', False),
        (', "seed": 1', False),
        (', "seed": null', True),
    ],
)
def test_a_request_samples_unless_greedy_or_seeded(more: str, samples: bool) -> None:
    assert RequestBody(f'{{"model": "a"{more}}}'.encode()).samples is samples


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": "a",}', "not valid JSON"),
        (b'{"model": "a"} x', "not valid JSON"),
        (b'{"model" "a"}', "not valid JSON"),
        (b"{'model': 'a'}", "not valid JSON"),
        (b'{"model": "a"', "not valid JSON"),
        (b'{"model": "a" "b": 1}', "not valid JSON"),
        (b"[1] x", "not valid JSON"),
        (b'"model"', "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b"12", "must be a JSON object"),
        (b'{"model": "\xff"}', "not UTF-8 (byte 11)"),
        (b"{}", "'model' is missing"),
        (b'{"model": null}', "'model' is missing"),
        (b'{"model": 3}', "'model' must be"),
        (b'{"model": ""}', "'model' must be"),
        (b'{"model": "a", "stream": "yes"}', "'stream' must be"),
        (b'{"model": "a", "temperature": "hot"}', "'temperature' must be"),
        (b'{"model": "a", "temperature": true}', "'temperature' must be"),
        (b'{"model": "a", "seed": 1.5}', "'seed' must be"),
        (b'{"model": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"model": "a", "max_tokens": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_body_that_cannot_be_understood_says_what_is_wrong(raw: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        RequestBody(raw)
    assert says in str(caught.value)


def test_turns_of_one_chat_share_a_prefix_and_other_chats_do_not() -> None:
    def prefix(*messages: tuple[str, str]) -> int:
        turns = [{"role": role, "content": content} for role, content in messages]
        return RequestBody(json.dumps({"model": "m", "messages": turns}).encode()).prefix

    system = ("system", "be kind")
    first = prefix(system, ("user", "hi"))
    assert prefix(system, ("user", "hi"), ("assistant", "hello"), ("user", "why")) == first
    assert prefix(system, ("user", "ho")) != first


def test_prompts_have_prefixes_whatever_their_type() -> None:
    bodies = [b'"x"', b'["x", "y"]', b"[1, 2]", b"null"]
    found = {RequestBody(b'{"model": "m", "prompt": ' + one + b"}").prefix for one in bodies}
    assert len(found) == len(bodies)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ("", None),
        (', "max_tokens": 7', 7),
        (', "max_completion_tokens": 8', 8),
        (', "max_tokens": 7, "max_completion_tokens": 8', 8),
        (', "max_completion_tokens": null, "max_tokens": 7', 7),
        (', "max_completion_tokens": "x", "max_tokens": 7', 7),
        (', "max_tokens": 0', None),
        (', "max_tokens": -1', None),
        (', "max_tokens": true', None),
        (', "max_tokens": 7.0', None),
        (', "max_tokens": "7"', None),
        (', "max_tokens": [7]', None),
        (', "max_tokens": 5, "max_tokens": 6', 6),
        (f', "max_tokens": {10**400}', 1 << 31),
    ],
)
def test_the_longest_answer_is_read_where_it_can_be_understood(
    fields: str, limit: int | None
) -> None:
    raw = f'{{"model": "a"{fields}}}'.encode()
    read = RequestBody(raw)
    assert read.tokens_max == limit
    assert read.rewritten() == raw


def test_the_prompt_s_length_is_estimated_from_the_body_s_size() -> None:
    short = RequestBody(b'{"model": "a"}')
    long = RequestBody(json.dumps({"model": "a", "prompt": "word " * 400}).encode())
    assert short.tokens_in >= 1.0
    assert 400 <= long.tokens_in <= 800


@given(odd=VALUES)
def test_odd_tiers_and_limits_are_left_to_the_engine(odd: object) -> None:
    raw = json.dumps({"model": "a", "max_tokens": odd, "service_tier": odd}).encode()
    read = RequestBody(raw)
    assert read.tokens_max is None or read.tokens_max > 0
    assert read.rewritten() == raw


def test_an_image_counts_as_one_whatever_its_size() -> None:
    def tokens(*images: int) -> float:
        parts: list[object] = [{"type": "text", "text": "what is this?"}]
        for size in images:
            url = {"url": "data:image/png;base64," + "A" * size, "detail": "high"}
            parts.append({"type": "image_url", "image_url": url})
        body = {"model": "a", "messages": [{"role": "user", "content": parts}]}
        return RequestBody(json.dumps(body).encode()).tokens_in

    assert tokens() < 100
    assert tokens(10_000) == tokens(1_000_000) > 1000
    assert 2000 < tokens(10_000, 20_000) < 2200
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 100_000, "format": "wav"}}
    body = {"model": "a", "messages": [{"role": "user", "content": [sound, 3, {"x": [1]}]}]}
    assert RequestBody(json.dumps(body).encode()).tokens_in < 1100


def test_a_long_text_is_no_image() -> None:
    text = {"type": "text", "text": "x" * 40_000}
    body = {"model": "a", "messages": [{"role": "user", "content": [text]}]}
    assert RequestBody(json.dumps(body).encode()).tokens_in > 10_000


@given(odd=VALUES)
def test_messages_of_any_shape_have_a_length(odd: object) -> None:
    raw = json.dumps({"model": "a", "messages": [odd, {"content": odd}, {"content": [odd]}]})
    assert RequestBody(raw.encode()).tokens_in >= 1.0
