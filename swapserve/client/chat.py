"""Ask a model for a completion, and note when each token arrived."""

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from swapserve.errors import SwapServeError

CONNECT_S = 5.0
SILENCE_S = 900.0
"""Longest wait for the next byte; an engine that is away sends comments meanwhile."""


class AnswerFailed(SwapServeError):
    """A request was refused, or its stream ended with an error; `code` is the daemon's own."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


@dataclass(slots=True)
class Answer:
    """A streamed completion; times are monotonic seconds.

    Attributes:
        tokens: token ids where the engine tells them, else one text for each event.
        at: when each event that carried text arrived.
        comments: SSE comments, which a stream gets while its engine is away.
    """

    started: float = field(default_factory=time.monotonic)
    text: str = ""
    tokens: list[int | str] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    comments: int = 0
    ended: bool = False

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.at[0] - self.started if self.at else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Rate after the first token, gaps included."""
        passed = self.at[-1] - self.at[0] if self.at else 0.0
        return (len(self.tokens) - 1) / passed if passed > 0 else 0.0

    @property
    def longest_gap_s(self) -> float:
        """Longest silence between two events."""
        return max((b - a for a, b in zip(self.at, self.at[1:], strict=False)), default=0.0)

    @property
    def tokens_before_gap(self) -> int:
        """Number of events before the longest silence."""
        gaps = [b - a for a, b in zip(self.at, self.at[1:], strict=False)]
        return gaps.index(max(gaps)) + 1 if gaps else len(self.at)


class ChatClient:
    """The front door's other side; use as an async context manager.

    Its method raises `AnswerFailed` for whatever goes wrong.
    """

    def __init__(self, base_url: str, key: str | None = None) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url.rstrip("/"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def complete(
        self,
        model: str,
        prompt: str,
        *,
        max_tokens: int,
        answer: Answer | None = None,
        on_token: Callable[[Answer], None] = lambda _: None,
        extra: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Stream a completion to its end.

        Args:
            model: name or alias.
            prompt: text to go on with.
            max_tokens: length of the answer.
            answer: filled as tokens come (None: a new one).
            on_token: called after each event that carried text.
            extra: further fields of the request.
        """
        answer = answer or Answer()
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        try:
            async with self._http.stream(
                "POST", "/v1/completions", json=body | dict(extra or {})
            ) as response:
                if not response.is_success:
                    await response.aread()
                    raise _failure(response.json())
                async for event in _events(response, answer):
                    if _take(event, answer):
                        on_token(answer)
        except httpx.HTTPError as error:
            raise AnswerFailed("connection", str(error) or type(error).__name__) from error
        except ValueError as error:
            raise AnswerFailed("not_json", f"the answer cannot be understood: {error}") from error
        if not answer.ended:
            raise AnswerFailed("cut_off", "the stream ended without [DONE]")
        return answer


async def _events(response: httpx.Response, answer: Answer) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith(":"):
            answer.comments += 1
        elif line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                answer.ended = True
                return
            yield json.loads(data)


def _take(event: dict[str, Any], answer: Answer) -> bool:
    """Add an event to the answer; return whether it carried text."""
    if "error" in event:
        raise _failure(event)
    if not event.get("choices"):
        return False
    choice = event["choices"][0]
    text = choice.get("text") or ""
    ids = choice.get("token_ids")
    if not text and not ids:
        return False
    answer.text += text
    answer.tokens += ids or [text]
    answer.at.append(time.monotonic())
    return True


def _failure(body: dict[str, Any]) -> AnswerFailed:
    error = body.get("error", {})
    return AnswerFailed(str(error.get("code")), str(error.get("message", body)))
