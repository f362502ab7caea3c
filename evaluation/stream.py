"""Send one streaming completion and note when each piece came. The same code for every arm.

Plain `http.client`: nothing of the client depends on whom it talks to, and it costs little.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import pairwise
from typing import Any

TIMEOUT_S = 600.0
PATH = "/v1/completions"
_OK = 200


class StreamFailed(Exception):
    """A request was refused, or its stream ended in an error."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """A stream as it came.

    Attributes:
        started: when the request was about to be sent (monotonic clock, like all times here).
        at: when each piece came, for every piece with content.
        pieces: text of each.
        tokens: ids of the generated tokens; empty if the engine tells none.
        tokens_at: when each of them came.
        offsets: where each token begins in the text, as the engine says; empty if it does not.
        logprobs: of each token; empty if the engine tells none.
        finish: the engine's word for how it ended.
        done: whether the stream ended as it should.
    """

    started: float
    at: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    tokens_at: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    done: bool = False

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)

    @property
    def first_token_s(self) -> float:
        """Seconds from sending to the first piece with content."""
        return self.at[0] - self.started

    @property
    def longest_gap(self) -> tuple[int, float]:
        """How many tokens came before the longest silence between two, and its seconds."""
        gaps = [later - earlier for earlier, later in pairwise(self.tokens_at)]
        longest = max(gaps, default=0.0)
        return (gaps.index(longest) + 1 if gaps else len(self.tokens_at)), longest


def ask(
    address: str,
    body: dict[str, Any],
    *,
    started: float | None = None,
    seen: Callable[[int], None] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """Send the request and read its stream to the end.

    Args:
        address: `host:port`.
        body: of the request; `stream` is added.
        started: when the clock began to run; None: now.
        seen: told the number of pieces after each.
        timeout_s: longest silence.

    Raises:
        StreamFailed: with what was answered.
        OSError: the connection broke.
    """
    host, _, port = address.rpartition(":")
    answer = Answer(started=time.monotonic() if started is None else started)
    connection = HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", PATH, json.dumps({**body, "stream": True}), headers)
        response = connection.getresponse()
        if response.status != _OK:
            raise StreamFailed(f"{response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            if line.startswith(b"data:"):
                _take(answer, line.removeprefix(b"data:").strip())
                if seen is not None:
                    seen(len(answer.at))
    finally:
        connection.close()
    if not answer.at:
        raise StreamFailed("the stream held no text")
    return answer


def _take(answer: Answer, data: bytes) -> None:
    if data == b"[DONE]":
        answer.done = True
        return
    event = json.loads(data)
    if "error" in event:
        raise StreamFailed(json.dumps(event["error"]))
    for choice in event["choices"]:
        answer.finish = choice.get("finish_reason") or answer.finish
        if choice.get("text"):
            answer.at.append(time.monotonic())
            answer.pieces.append(choice["text"])
        _take_tokens(answer, choice)


def _take_tokens(answer: Answer, choice: dict[str, Any]) -> None:
    said = choice.get("logprobs") or {}
    ids = choice.get("token_ids") or [item["id"] for item in said.get("content") or ()]
    answer.tokens += ids
    answer.tokens_at += [time.monotonic()] * len(ids)
    answer.offsets += said.get("text_offset") or ()
    one_by_one = [item["logprob"] for item in said.get("content") or () if "logprob" in item]
    answer.logprobs += said.get("token_logprobs") or one_by_one
