"""The client's side of one request: what it has been sent, and what may still be sent."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from swapserve.errors import SwapServeError
from swapserve.router.headers import to_client
from swapserve.router.tokens import TAIL, TokenCount

SSE = "text/event-stream"
SSE_HEADERS = {"Content-Type": SSE, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"
BOUNDARIES = (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n")
"""Ends of an event. Source: the WHATWG HTML standard, server-sent events."""


class ClientLeft(Exception):
    """The client closed its connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    """An error as a client sees it; `body` is the OpenAI error object."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


Explain = Callable[[SwapServeError], ErrorAnswer]


class Downstream:
    """One answer to one client.

    Args:
        request: the client's request.
        stream: whether it asked for server-sent events; only then comments are possible.
        explain: turns an error into what the client is told.
    """

    def __init__(self, request: web.Request, *, stream: bool, explain: Explain) -> None:
        self.response: web.StreamResponse | None = None
        self.bytes_out = 0
        self.first_at: float | None = None
        """Loop time of the first byte of the engine's answer."""
        self.on_first: Callable[[], None] | None = None
        """Called at that moment, if the answer is a stream of events."""
        self.last_at: float | None = None
        """Loop time of the last one so far."""
        self.streamed = False
        """Whether the engine's answer is a stream of events."""
        self.tokens = TokenCount()
        self.status = 0
        self._request = request
        self._explain = explain
        self._sse = stream
        self._opened_early = False
        self._tail = BOUNDARIES[0]

    async def comment(self) -> None:
        """Send a comment that keeps the connection alive, the headers first if need be.

        Nothing is sent where a comment would fall inside an event or a body that is no stream.
        """
        if not self._sse or not self._tail.endswith(BOUNDARIES):
            return
        if self.response is None:
            self._opened_early = True
            await self._prepare(web.StreamResponse(status=200, headers=SSE_HEADERS))
        await self._send(b": waiting for the engine\n\n")

    async def relay(self, upstream: aiohttp.ClientResponse) -> None:
        """Pass the engine's answer on, chunk by chunk as it comes.

        Raises:
            ClientLeft: the client is gone.
            aiohttp.ClientError: the engine broke off.
        """
        content = upstream.content
        self.streamed = _is_sse(upstream)
        chunk = await content.readany()
        if self._opened_early and not self.streamed:
            await self._convert(upstream, chunk + await content.read())
            return
        if self.response is None:
            self._sse = self.streamed
            await self._prepare(
                web.StreamResponse(
                    status=upstream.status,
                    reason=upstream.reason,
                    headers=to_client(upstream.headers),
                )
            )
        while chunk:
            await self._pass(chunk)
            chunk = await content.readany()
        await self._end()

    async def fail(self, error: SwapServeError) -> None:
        """Tell the client, if it is still there, that an answer which has begun cannot go on."""
        if self._sse:
            with contextlib.suppress(ClientLeft):
                await self._send_error(self._explain(error).body)
        else:
            self.abort()

    def abort(self) -> None:
        """Break a connection that has begun to carry a body.

        Of a half-sent body only a broken connection says that the rest is missing.
        """
        transport = self._request.transport
        if self.response is not None and transport is not None:
            transport.abort()

    async def _convert(self, upstream: aiohttp.ClientResponse, body: bytes) -> None:
        """Put an answer that is no stream into the stream opened for it."""
        self.status = upstream.status
        if upstream.status != web.HTTPOk.status_code:
            await self._send_error(_error_body(upstream.status, body))
            return
        await self._pass(b"data: " + body.replace(b"\r", b"").replace(b"\n", b" ") + b"\n\n")
        await self._pass(DONE)
        await self._end()

    async def _send_error(self, body: Mapping[str, Any]) -> None:
        broken = b"" if self._tail.endswith(BOUNDARIES) else b"\n\n"
        event = b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
        await self._send(broken + event + DONE)
        await self._end()

    async def _prepare(self, response: web.StreamResponse) -> None:
        self.response = response
        self.status = response.status
        try:
            await response.prepare(self._request)
        except ConnectionError as error:
            raise ClientLeft from error

    async def _pass(self, chunk: bytes) -> None:
        self.last_at = asyncio.get_running_loop().time()
        if self.first_at is None:
            self.first_at = self.last_at
            if self.streamed and self.on_first is not None:
                self.on_first()
        self.tokens.saw(self._tail, chunk)
        tail = chunk[-TAIL:]
        if len(tail) < TAIL:
            tail = (self._tail + tail)[-TAIL:]
        self._tail = tail
        await self._send(chunk)

    async def _send(self, data: bytes) -> None:
        assert self.response is not None
        self.bytes_out += len(data)
        try:
            await self.response.write(data)
        except ConnectionError as error:
            raise ClientLeft from error

    async def _end(self) -> None:
        assert self.response is not None
        try:
            await self.response.write_eof()
        except ConnectionError as error:
            raise ClientLeft from error


def _is_sse(upstream: aiohttp.ClientResponse) -> bool:
    return upstream.content_type == SSE and "Content-Encoding" not in upstream.headers


def _error_body(status: int, body: bytes) -> Mapping[str, Any]:
    """Return an engine's error as an OpenAI error object, whatever shape it has."""
    text = body.decode("utf-8", "replace").strip()
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("error"), dict):
        return found
    message = found.get("message") if isinstance(found, dict) else None
    return {
        "error": {
            "message": message if isinstance(message, str) else text or f"Status {status}.",
            "type": "engine_error",
            "param": None,
            "code": status,
        }
    }
