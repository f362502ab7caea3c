import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any, cast

from evaluation.gpu.server import Engine, Generator
from evaluation.stream import ask

SAID = ((7, " a", -0.5), (9, " b", -1.25), (7, " a", -0.125))


class Parrot:
    """Says the same whatever it is asked; stands in for a model."""

    def tokens(self, prompt: str, count: int) -> Iterator[tuple[int, str, float]]:
        assert prompt == "A river"
        yield from SAID[:count]


@contextmanager
def _engine() -> Iterator[str]:
    with Engine(("127.0.0.1", 0), cast("Generator", Parrot()), "parrot") as engine:
        thread = threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{engine.server_address[1]}"
        finally:
            engine.shutdown()
            thread.join()


def _call(address: str, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    host, _, port = address.partition(":")
    connection = HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request(method, path, json.dumps(body) if body else None)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_a_stream_tells_ids_and_logprobs_of_its_tokens() -> None:
    with _engine() as address:
        answer = ask(address, {"prompt": "A river", "max_tokens": 3})
    assert answer.pieces == [" a", " b", " a"]
    assert answer.tokens == [7, 9, 7]
    assert answer.logprobs == [-0.5, -1.25, -0.125]
    assert (answer.finish, answer.done) == ("length", True)


def test_an_answer_in_one_piece_is_the_same_text() -> None:
    with _engine() as address:
        status, body = _call(address, "POST", "/v1/completions", {"prompt": "A river"})
    assert status == 200
    assert body["choices"][0]["text"] == " a b a"


def test_it_says_that_it_is_up_and_what_it_does_not_have() -> None:
    with _engine() as address:
        assert _call(address, "GET", "/health") == (200, {"status": "ok"})
        assert _call(address, "GET", "/v1/models")[1]["data"][0]["id"] == "parrot"
        assert _call(address, "GET", "/metrics")[0] == 404
        assert _call(address, "POST", "/v1/chat/completions", {"messages": []})[0] == 404
