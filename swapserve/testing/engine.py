"""A small engine that speaks OpenAI's protocol: `python -m swapserve.testing.engine --port P`.

Its text depends only on prompt, seed and temperature, so a test can say what a stream must hold.
It has the habits of real engines: a slow start, one write per token, generations that end when
their client leaves, crashes and deafness to SIGTERM on request.
"""

import argparse
import asyncio
import hashlib
import json
import os
import secrets
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

DIMENSIONS = 8
CRASH_STATUS = 70
WORDS = ("swap", "serve", "freeze", "thaw", "lease", "device", "image", "token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How an engine answers."""

    host: str
    port: int
    name: str
    tokens: int
    delay_per_token: float
    startup_delay: float
    crash_after: int | None
    ignore_term: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Habits):
    """How this engine behaves."""

    memory_mb: int


def expected_tokens(prompt: str, seed: int | None, count: int) -> list[str]:
    """Return the tokens that the engine answers with; `seed` None is temperature 0."""
    tokens = []
    for index in range(count):
        digest = hashlib.sha256(f"{prompt}\0{seed}\0{index}".encode()).digest()
        tokens.append(f" {WORDS[digest[0] % len(WORDS)]}{index}")
    return tokens


class Engine:
    """The endpoints and what they count."""

    def __init__(self, options: Habits) -> None:
        self._options = options
        self._random = secrets.randbits(31)
        self._written = 0
        self.counts: dict[str, Any] = {
            "requests": 0,
            "finished": 0,
            "aborted": 0,
            "running": 0,
            "connections": 0,
            "last_body": None,
            "last_headers": None,
        }
        self._peers: set[object] = set()

    def app(self) -> web.Application:
        """Return the application."""
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(self.routes())
        return app

    def routes(self) -> list[web.AbstractRouteDef]:
        """Return what it serves."""
        return [
            web.get("/health", self.health),
            web.get("/stats", self.stats),
            web.get("/v1/models", self.models),
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/embeddings", self.embeddings),
            web.post("/sleep", self.health),
        ]

    async def health(self, _request: web.Request) -> web.StreamResponse:
        """Say that it is up."""
        return web.json_response({"status": "ok"})

    async def stats(self, _request: web.Request) -> web.StreamResponse:
        """Tell what it has done so far."""
        return web.json_response({**self.counts, "pid": os.getpid()})

    async def models(self, _request: web.Request) -> web.StreamResponse:
        """List the one model."""
        data = [{"id": self._options.name, "object": "model"}]
        return web.json_response({"object": "list", "data": data})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Continue a prompt."""
        body = await self._accept(request)
        return await self._answer(request, body, str(body.get("prompt", "")), chat=False)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer a conversation."""
        body = await self._accept(request)
        prompt = json.dumps(body.get("messages", []), sort_keys=True)
        return await self._answer(request, body, prompt, chat=True)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """Return a vector for each input."""
        body = await self._accept(request)
        given = body.get("input", "")
        texts = given if isinstance(given, list) else [given]
        data = [
            {"object": "embedding", "index": index, "embedding": _vector(str(text))}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        self.counts["finished"] += 1
        return web.json_response(
            {"object": "list", "data": data, "model": self._options.name, "usage": usage}
        )

    async def _accept(self, request: web.Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.counts["requests"] += 1
        self.counts["last_body"] = body
        self.counts["last_headers"] = dict(request.headers)
        if request.transport not in self._peers:
            self._peers.add(request.transport)
            self.counts["connections"] += 1
        if body.get("model") != self._options.name:
            message = f"The model '{body.get('model')}' is not served here."
            error = {"error": {"message": message, "type": "NotFoundError", "code": 404}}
            raise web.HTTPNotFound(text=json.dumps(error), content_type="application/json")
        return body

    async def _answer(
        self, request: web.Request, body: dict[str, Any], prompt: str, *, chat: bool
    ) -> web.StreamResponse:
        count = int(body.get("max_tokens") or self._options.tokens)
        greedy = body.get("temperature") == 0
        seed = None if greedy else body.get("seed") or self._next_random()
        shape = _Shape(name=self._options.name, chat=chat, logprobs=bool(body.get("logprobs")))
        self.counts["running"] += 1
        try:
            async with aclosing(self.generate(prompt, seed, count)) as tokens:
                if body.get("stream"):
                    usage = bool((body.get("stream_options") or {}).get("include_usage"))
                    response = await self._stream(request, shape, tokens, count, usage=usage)
                else:
                    response = web.json_response(shape.whole([token async for token in tokens]))
        except (asyncio.CancelledError, ConnectionError):
            self.counts["aborted"] += 1
            raise
        finally:
            self.counts["running"] -= 1
        self.counts["finished"] += 1
        return response

    async def _stream(
        self,
        request: web.Request,
        shape: "_Shape",
        tokens: AsyncIterator[str],
        count: int,
        *,
        usage: bool,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sent = 0
        async for token in tokens:
            sent += 1
            await response.write(_event(shape.chunk(token, is_last=sent == count)))
        if usage:
            await response.write(_event({**shape.chunk(None), "usage": _usage(sent)}))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def generate(self, prompt: str, seed: int | None, count: int) -> AsyncGenerator[str]:
        """Compute tokens; closed when the client leaves."""
        for token in expected_tokens(prompt, seed, count):
            await asyncio.sleep(self._options.delay_per_token)
            self.count_token()
            yield token

    def count_token(self) -> None:
        """Crash where the options say so."""
        self._written += 1
        crash_after = self._options.crash_after
        if crash_after is not None and self._written > crash_after:
            os._exit(CRASH_STATUS)

    def _next_random(self) -> int:
        """Return the engine's own random state, which an image of it would replay."""
        self._random = (self._random * 1103515245 + 12345) & 0x7FFFFFFF
        return self._random


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Builds answers of one kind."""

    name: str
    chat: bool
    logprobs: bool

    def whole(self, tokens: Sequence[str]) -> dict[str, Any]:
        text = "".join(tokens)
        message = {"message": {"role": "assistant", "content": text}}
        choice = {
            "index": 0,
            **(message if self.chat else {"text": text}),
            "finish_reason": "length",
            "logprobs": self._logprobs(tokens),
        }
        return {**self._frame(""), "choices": [choice], "usage": _usage(len(tokens))}

    def chunk(self, token: str | None, *, is_last: bool = False) -> dict[str, Any]:
        frame = self._frame(".chunk")
        if token is None:
            return {**frame, "choices": []}
        choice = {
            "index": 0,
            **({"delta": {"content": token}} if self.chat else {"text": token}),
            "finish_reason": "length" if is_last else None,
            "logprobs": self._logprobs([token]),
        }
        return {**frame, "choices": [choice]}

    def _frame(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {"id": "cmpl-0", "object": kind, "created": 0, "model": self.name}

    def _logprobs(self, tokens: Sequence[str]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        values = [-(len(token) / 16) for token in tokens]
        if self.chat:
            pairs = zip(tokens, values, strict=True)
            content: list[dict[str, Any]] = [
                {"token": t, "logprob": v, "bytes": None, "top_logprobs": []} for t, v in pairs
            ]
            return {"content": content}
        tops = [{token: value} for token, value in zip(tokens, values, strict=True)]
        return {
            "tokens": list(tokens),
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": [0] * len(tokens),
        }


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}


def _vector(text: str) -> list[float]:
    return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:DIMENSIONS]]


def common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every fake engine has."""
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one, and says it")
    parser.add_argument("--name", default="fake")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="without max_tokens")
    parser.add_argument("--delay-per-token", type=float, default=0.0, metavar="S")
    parser.add_argument("--startup-delay", type=float, default=0.0, metavar="S")
    parser.add_argument("--crash-after", type=int, metavar="N", help="tokens, of all requests")
    parser.add_argument("--ignore-term", action="store_true")


def _options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="swapserve.testing.engine", description=__doc__)
    common_options(parser)
    parser.add_argument("--memory-mb", type=int, default=0, metavar="M", help="touched at start")
    return Options(**vars(parser.parse_args(argv)))


async def serve(app: web.Application, options: Habits, stop: asyncio.Event) -> None:
    """Listen, say where on standard output, and serve until `stop`, SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        deaf = options.ignore_term and number is signal.SIGTERM
        loop.add_signal_handler(number, (lambda: None) if deaf else stop.set)
    await asyncio.sleep(options.startup_delay)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, options.host, options.port).start()
    print(f"listening on {runner.addresses[0][1]}", flush=True)  # noqa: T201
    await stop.wait()
    await runner.cleanup()


def main(argv: Sequence[str] | None = None) -> None:
    """Run until SIGTERM."""
    options = _options(argv)
    ballast = bytearray(os.urandom(1 << 20)) * options.memory_mb
    asyncio.run(serve(Engine(options).app(), options, asyncio.Event()))
    del ballast  # held until here


if __name__ == "__main__":
    main()
