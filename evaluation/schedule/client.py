"""One streamed completion, with the time of each of its tokens."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import pairwise
from typing import Any

import aiohttp

from swapserve.states import Priority

PATH = "/v1/completions"
PRIORITY_HEADER = "x-swapserve-priority"
TIMEOUT_S = 600.0
"""Longest silence."""


@dataclass(slots=True)
class Stream:
    """What came of a request. Times are monotonic.

    Attributes:
        sent: just before it was sent.
        at: of each token.
        prompt_tokens: length of the prompt as the engine counts it; None: it did not say.
        error: why there is no whole answer.
    """

    sent: float = field(default_factory=time.monotonic)
    at: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.at[0] - self.sent

    @property
    def itl_s(self) -> float:
        """Mean seconds between two tokens."""
        return (self.at[-1] - self.at[0]) / max(1, len(self.at) - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between its tokens."""
        return [later - one for one, later in pairwise(self.at)]

    @property
    def longest_gap(self) -> tuple[float, float]:
        """Begin and end of the longest silence between two tokens.

        Raises:
            ValueError: there are no two.
        """
        return max(pairwise(self.at), key=lambda pair: pair[1] - pair[0])


def body(model: str, text: str, tokens: int, *, most: int = 0) -> dict[str, Any]:
    """Return a greedy request for exactly so many tokens.

    `most`: the longest answer that the front door is told of; 0: it is told none. The engine goes
    by another field, of its own.
    """
    told = {"max_tokens": most} if most else {}
    return {
        "model": model,
        "prompt": text,
        "n_predict": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
        **told,
    }


def http_client() -> aiohttp.ClientSession:
    """Return a client for any number of streams, to be closed by the caller."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_read=TIMEOUT_S),
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
    )


async def ask(
    http: aiohttp.ClientSession,
    address: str,
    request: dict[str, Any],
    *,
    priority: Priority = Priority.INTERACTIVE,
    stream: Stream | None = None,
    on_token: Callable[[Stream], None] = lambda _: None,
) -> Stream:
    """Send a request and read its answer to the end; errors are in the result.

    Args:
        http: the client.
        address: `host:port`.
        request: see `body`.
        priority: of the request.
        stream: filled as tokens come (None: a new one).
        on_token: called after each.
    """
    stream = stream or Stream()
    headers = {PRIORITY_HEADER: priority.name.lower()}
    try:
        async with http.post(f"http://{address}{PATH}", json=request, headers=headers) as response:
            if response.status != HTTPStatus.OK:
                stream.error = f"{response.status}: {await response.text()}"
                return stream
            await _read(response, stream, on_token)
    except (aiohttp.ClientError, TimeoutError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    return stream


async def _read(
    response: aiohttp.ClientResponse, stream: Stream, on_token: Callable[[Stream], None]
) -> None:
    done = False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        now = time.monotonic()
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            done = True
            break
        event = json.loads(data)
        if "error" in event:
            stream.error = json.dumps(event["error"])
            return
        if any(choice.get("text") for choice in event["choices"]):
            stream.at.append(now)
            on_token(stream)
        if usage := event.get("usage"):
            stream.prompt_tokens = usage["prompt_tokens"]
    if not done or not stream.at:
        stream.error = f"the stream ended after {len(stream.at)} tokens"
