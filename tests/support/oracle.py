"""Streams with a time for each token, and the proof that a preemption changed none of them."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

PROMPT = " buku dada"
SIDE = 50
"""Tokens that a stream must have on each side of a swap, or it proves nothing."""
TOLERANCE_S = 0.05
"""Between an engine's last byte and its arrival here."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of one streamed request: pieces of text, and when each came.

    llama-server sends a piece per token and no ids here; vLLM may send several tokens in a piece.
    """

    status: int = 0
    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    comments: int = 0
    error: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    done: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def longest_gap(self) -> tuple[int, float]:
        """Return the number of tokens before the longest pause, and its seconds."""
        gaps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        longest = max(range(len(gaps)), key=gaps.__getitem__)
        return sum(self.counts[: longest + 1]), gaps[longest]

    @property
    def tokens(self) -> int:
        return sum(self.counts)


def completion(model: str, tokens: int, *, prompt: str = PROMPT, **extra: Any) -> dict[str, Any]:
    """Return the body of a greedy request for exactly that many tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return {**body, "ignore_eos": True, **extra}


async def stream(
    http: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    *,
    on_piece: Callable[[Answer], None] | None = None,
) -> Answer:
    """Post a request as a stream and take it in to its end."""
    answer = Answer()
    async with http.post(url, json={**body, "stream": True}) as response:
        answer.status = response.status
        if response.status != 200:
            answer.error = (await response.json())["error"]
            return answer
        async for raw in response.content:
            before = len(answer.pieces)
            _take(answer, raw.decode().rstrip())
            if on_piece is not None and len(answer.pieces) > before:
                on_piece(answer)
    return answer


def _take(answer: Answer, line: str) -> None:
    if line.startswith(":"):
        answer.comments += 1
    if not line.startswith("data: "):
        return
    if line == "data: [DONE]":
        answer.done = True
        return
    data = json.loads(line.removeprefix("data: "))
    if "error" in data:
        answer.error = data["error"]
        return
    answer.usage = data.get("usage") or answer.usage
    for choice in data["choices"]:
        piece = choice.get("text") or choice.get("delta", {}).get("content")
        if piece:
            answer.pieces.append(piece)
            ids = choice.get("token_ids") or []
            answer.ids += ids
            answer.counts.append(len(ids) or 1)
            answer.times.append(time.monotonic())


def assert_same_tokens(answer: Answer, expected: Answer) -> None:
    """The answer is whole and holds the very tokens of the other one."""
    assert answer.status == expected.status == 200
    assert answer.error is None
    assert answer.done
    assert answer.ids == expected.ids
    assert answer.text == expected.text
    assert answer.tokens == expected.tokens


def assert_swapped_in_mid_stream(answer: Answer, *, away_s: float) -> None:
    """The longest pause is the swap: with enough on each side, and as long as the time away."""
    before, gap = answer.longest_gap()
    assert before >= SIDE, f"only {before} tokens before the swap"
    assert answer.tokens - before >= SIDE, f"{before} of {answer.tokens} before the swap"
    assert gap >= away_s - TOLERANCE_S, f"a pause of {gap:.3f} s, away for {away_s:.3f} s"
