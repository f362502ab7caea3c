import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from evaluation.stream import StreamFailed, ask


@contextmanager
def _engine(lines: list[str], *, status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            for line in lines:
                self.wfile.write(line.encode() + b"\n\n")

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def _event(**choice: Any) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, **choice}]})


def test_the_first_token_is_the_first_piece_with_text() -> None:
    lines = [
        ": keep-alive",
        _event(text=""),
        _event(text=" a", token_ids=[5], logprobs={"text_offset": [0], "tokens": [" a"]}),
        _event(text=" b c", token_ids=[6, 7], logprobs={"text_offset": [2, 4]}),
        _event(text="", finish_reason="length"),
        "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 3}}),
        "data: [DONE]",
    ]
    seen: list[int] = []
    with _engine(lines) as (address, asked):
        answer = ask(address, {"model": "m"}, seen=seen.append)
    assert asked == [{"model": "m", "stream": True}]
    assert (answer.text, answer.pieces) == (" a b c", [" a", " b c"])
    assert answer.tokens == [5, 6, 7]
    assert answer.offsets == [0, 2, 4]
    assert len(answer.tokens_at) == 3
    assert (answer.finish, answer.done) == ("length", True)
    assert answer.first_token_s == answer.at[0] - answer.started > 0
    assert seen[-1] == 2


def test_llama_servers_token_ids_are_read_from_its_logprobs() -> None:
    said = {"content": [{"id": 9, "token": " a", "logprob": -0.5}]}
    with _engine([_event(text=" a", logprobs=said), "data: [DONE]"]) as (address, _):
        answer = ask(address, {})
    assert (answer.tokens, answer.logprobs) == ([9], [-0.5])


def test_logprobs_are_kept_in_order() -> None:
    lines = [
        _event(text=" a", logprobs={"token_logprobs": [-0.25]}),
        _event(text=" b c", logprobs={"token_logprobs": [-1.5, -2.0]}),
    ]
    with _engine(lines) as (address, _):
        assert ask(address, {}).logprobs == [-0.25, -1.5, -2.0]


def test_the_clock_may_have_begun_to_run_before() -> None:
    with _engine([_event(text="a"), "data: [DONE]"]) as (address, _):
        answer = ask(address, {}, started=0.0)
    assert answer.first_token_s == answer.at[0]


def test_a_stream_that_breaks_off_is_not_done() -> None:
    with _engine([_event(text="a")]) as (address, _):
        assert not ask(address, {}).done


@pytest.mark.parametrize(
    ("lines", "status", "said"),
    [
        (["no room"], 503, "503: no room"),
        (['data: {"error": {"message": "it broke"}}'], 200, "it broke"),
        ([_event(text=""), "data: [DONE]"], 200, "no text"),
    ],
)
def test_refusals_errors_and_silence_are_failures(lines: list[str], status: int, said: str) -> None:
    with _engine(lines, status=status) as (address, _), pytest.raises(StreamFailed, match=said):
        ask(address, {})
