"""Priorities and deadlines of requests."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from swapserve.config.schema import ApiKey, PriorityName
from swapserve.errors import Forbidden, InvalidRequest
from swapserve.messages import Ask
from swapserve.router.asks import DEADLINE_HEADER, PRIORITY_HEADER, ask_of
from swapserve.router.body import RequestBody
from swapserve.states import Priority

URGENT, INTERACTIVE, BATCH = Priority.URGENT, Priority.INTERACTIVE, Priority.BATCH


def ask(
    *,
    priority: str | None = None,
    deadline: str | None = None,
    key: PriorityName | None = None,
    deadline_s: float | None = None,
    **body: object,
) -> Ask:
    """Return what a request asks with these headers, key and body."""
    headers = CIMultiDict[str]()
    if priority is not None:
        headers["X-SwapServe-Priority"] = priority
    if deadline is not None:
        headers["X-SwapServe-Deadline"] = deadline
    read = RequestBody(json.dumps({"model": "m", **body}).encode())
    given = None if key is None else ApiKey(secret="hush", name="chat", priority=key)
    return ask_of(headers, read, key=given, deadline_s=deadline_s)


@pytest.mark.parametrize(
    ("header", "tier", "key", "priority"),
    [
        (None, None, None, INTERACTIVE),
        ("urgent", None, None, URGENT),
        (" Batch ", None, None, BATCH),
        (None, "priority", None, URGENT),
        (None, "flex", None, BATCH),
        (None, "auto", None, INTERACTIVE),
        ("interactive", "priority", None, INTERACTIVE),
        # The key's own, and what it may claim.
        (None, None, "urgent", URGENT),
        (None, None, "batch", BATCH),
        (None, "default", "batch", BATCH),
        (None, "priority", "batch", BATCH),
        (None, "priority", "interactive", INTERACTIVE),
        (None, "priority", "urgent", URGENT),
        (None, "flex", "urgent", BATCH),
        ("interactive", None, "urgent", INTERACTIVE),
        ("batch", "priority", "interactive", BATCH),
        ("batch", None, "batch", BATCH),
    ],
)
def test_a_priority_comes_from_header_then_tier_then_key(
    header: str | None, tier: str | None, key: PriorityName | None, priority: Priority
) -> None:
    assert ask(priority=header, key=key, service_tier=tier).priority is priority


@pytest.mark.parametrize(
    ("header", "key"), [("urgent", "interactive"), ("urgent", "batch"), ("interactive", "batch")]
)
def test_a_header_that_claims_more_than_its_key_may_is_refused(
    header: str, key: PriorityName
) -> None:
    with pytest.raises(Forbidden) as caught:
        ask(priority=header, key=key)
    text = str(caught.value)
    assert all(word in text for word in ("'chat'", key, header, PRIORITY_HEADER))
    assert "hush" not in text


@pytest.mark.parametrize("header", ["", "high", "0", "urgent, batch", "URGENT!"])
def test_a_priority_that_is_none_names_those_there_are(header: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(priority=header)
    assert caught.value.param == PRIORITY_HEADER
    assert "urgent, interactive, batch" in str(caught.value)


@pytest.mark.parametrize(
    ("header", "seconds"), [("2", 2.0), ("2.5", 2.5), (" 10 ", 10.0), (".5", 0.5), ("0.001", 0.001)]
)
def test_a_deadline_is_a_number_of_seconds(header: str, seconds: float) -> None:
    assert ask(deadline=header, deadline_s=60.0).deadline_s == seconds


def test_without_a_header_the_deadline_is_the_model_s() -> None:
    assert ask().deadline_s is None
    assert ask(deadline_s=60.0).deadline_s == 60.0


@pytest.mark.parametrize(
    "header", ["", "0", "0.0", "-1", "2s", "1e3", "nan", "inf", "1_0", "٣", "1.", "9" * 400]
)
def test_a_deadline_that_is_none_says_what_it_must_be(header: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(deadline=header)
    assert caught.value.param == DEADLINE_HEADER
    assert "a number of seconds over 0" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_rest_is_the_body_s_and_the_key_s_name() -> None:
    found = ask(key="batch", max_tokens=20, prompt="x" * 400)
    assert found.tokens_max == 20
    assert found.tokens_in > 100
    assert found.conversation != 0
    assert found.key == "chat"
    assert ask().key == ""


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(
    priority=st.none() | st.text(max_size=20) | st.sampled_from(["urgent", "batch", "interactive"]),
    deadline=st.none() | st.text(max_size=20) | st.floats().map(str),
    tier=ODD | st.sampled_from(["priority", "flex"]),
    limit=ODD,
    key=st.none() | st.sampled_from(["urgent", "interactive", "batch"]),
)
def test_whatever_a_client_sends_it_is_understood_or_told_why(
    priority: str | None,
    deadline: str | None,
    tier: object,
    limit: object,
    key: PriorityName | None,
) -> None:
    try:
        found = ask(
            priority=priority, deadline=deadline, key=key, service_tier=tier, max_tokens=limit
        )
    except (InvalidRequest, Forbidden):
        assert priority is not None or deadline is not None
        return
    assert found.priority in Priority
    assert key is None or found.priority >= Priority[key.upper()]
    assert found.deadline_s is None or 0 < found.deadline_s < 1e10
    assert found.tokens_max is None or found.tokens_max > 0
