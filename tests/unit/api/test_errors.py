"""The table of errors."""

import pytest

from swapserve import errors
from swapserve.api.errors import TABLE, explain
from swapserve.errors import SwapServeError


def every_class(base: type[SwapServeError] = SwapServeError) -> list[type[SwapServeError]]:
    """Return the classes of `swapserve.errors`; those of clients never reach our own API."""
    found = [base]
    for child in base.__subclasses__():
        if child.__module__ == SwapServeError.__module__:
            found += every_class(child)
    return found


@pytest.mark.parametrize("kind", every_class(), ids=lambda kind: kind.__name__)
def test_every_error_of_ours_is_in_the_table(kind: type[SwapServeError]) -> None:
    assert kind in TABLE


@pytest.mark.parametrize("kind", every_class(), ids=lambda kind: kind.__name__)
def test_clients_are_told_to_retry_what_may_be_retried_and_nothing_else(
    kind: type[SwapServeError],
) -> None:
    shown = TABLE[kind]
    assert 400 <= shown.status <= 599
    if shown.retry_after_s is not None:
        assert shown.status in {429, 502, 503}
    if kind.retryable:
        assert shown.retry_after_s is not None


def test_an_error_is_an_openai_error_object() -> None:
    answer = explain(errors.InvalidRequest("bad", param="stream"))
    assert answer.status == 400
    assert answer.body == {
        "error": {
            "message": "bad",
            "type": "invalid_request_error",
            "param": "stream",
            "code": "invalid_request",
        }
    }
    assert answer.headers == {}


def test_a_class_that_the_table_lacks_is_shown_as_its_base_is() -> None:
    class Odd(errors.QueueFull):
        code = "odd"

    answer = explain(Odd("e", 1))
    assert (answer.status, answer.body["error"]["code"]) == (429, "odd")
    assert answer.headers == {"Retry-After": "5"}


@pytest.mark.parametrize(
    ("predicted_s", "header"),
    [(0.0, "1"), (0.2, "1"), (7.0, "7"), (7.01, "8"), (1e9, "3600"), (float("inf"), "3600")],
)
def test_a_client_is_told_the_predicted_wait_in_whole_seconds(
    predicted_s: float, header: str
) -> None:
    for error in (
        errors.QueueFull("e", 1, retry_after_s=predicted_s),
        errors.QueueFull("e", 1, total=True, retry_after_s=predicted_s),
        errors.QueueTimeout("e", 2.0, predicted_s),
        errors.DeadlineUnmeetable("e", 1.0, 2.0, predicted_s),
        errors.EngineUnavailable("e", "away", predicted_s),
    ):
        assert explain(error).headers == {"Retry-After": header}


@pytest.mark.parametrize("predicted_s", [None, float("nan")])
def test_without_a_prediction_the_table_says_when_to_retry(predicted_s: float | None) -> None:
    error = errors.QueueTimeout("e", 2.0, retry_after_s=predicted_s)
    assert explain(error).headers == {"Retry-After": "10"}


def test_a_full_queue_says_whose_it_is() -> None:
    assert "'e'" in str(errors.QueueFull("e", 3))
    assert "all models together" in str(errors.QueueFull("e", 3, total=True))


def test_an_unmeetable_deadline_says_both_times() -> None:
    text = str(errors.DeadlineUnmeetable("e", 1.5, 12.34))
    assert "1.5 s" in text
    assert "12.3 s" in text
