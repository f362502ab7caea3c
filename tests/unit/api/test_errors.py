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
