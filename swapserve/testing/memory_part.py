"""An engine whose GPU memory is a few bytes in this process, to test what is said to engines.

`swapserve.testing.cuda_engine` is the one with a driver below it.
"""

import asyncio
import hashlib
import json
import secrets
from collections.abc import Collection
from typing import NoReturn

from aiohttp import web

from swapserve.testing.dialect import KV_CACHE, POLL_S, TAGS, WEIGHTS, Handler

WORDS = (
    "ba",
    "de",
    "fi",
    "go",
    "ku",
    "la",
    "mo",
    "nu",
    "pe",
    "ri",
    "so",
    "tu",
    "va",
    "we",
    "xi",
    "zo",
)
_ON_DISK = b"the weights"


class MemoryPart:
    """Weights and a cache; each token depends on the weights as they are just then.

    A token that is computed on released memory ends the engine: from then on it answers nobody.
    """

    def __init__(self, name: str = "model", *, delay_per_token_s: float = 0.0) -> None:
        self.paused = False
        self.crashed: str | None = None
        """Why it ended; None: it runs."""
        self.held: dict[str, bytes] = {WEIGHTS: _ON_DISK, KV_CACHE: b""}
        """What is in GPU memory, by tag."""
        self.kept: dict[str, bytes] = {}
        """What is in host memory instead."""
        self._name = name
        self.delay_per_token_s = delay_per_token_s
        self._running: set[asyncio.Task[object]] = set()

    @property
    def running(self) -> int:
        """Requests that it works on."""
        return len(self._running)

    async def release(self, tags: Collection[str], *, keep: bool) -> None:
        """Free memory."""
        for tag in tags:
            content = self.held.pop(tag)
            if keep:
                self.kept[tag] = content

    async def reacquire(self, tags: Collection[str]) -> None:
        """Allocate it again."""
        for tag in tags:
            assert tag not in self.held, f"{tag} is mapped twice"
            self.held[tag] = self.kept.pop(tag, secrets.token_bytes(8))

    async def reload(self) -> None:
        """Read the weights from disk."""
        assert WEIGHTS in self.held
        self.held[WEIGHTS] = _ON_DISK

    async def abort(self) -> None:
        """End all requests."""
        for task in tuple(self._running):
            task.cancel()

    def crash(self, reason: str) -> NoReturn:
        """End the engine."""
        self.crashed = reason
        for task in self._running - {asyncio.current_task()}:
            task.cancel()
        raise ConnectionResetError(reason)

    async def text(self, prompt: str, count: int) -> str:
        """Return so many tokens of answer to a prompt."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            return "".join([await self._token(prompt, index) for index in range(count)])
        finally:
            self._running.discard(task)

    async def _token(self, prompt: str, index: int) -> str:
        while True:
            await asyncio.sleep(self.delay_per_token_s)
            if not self.paused:
                break
            await asyncio.sleep(POLL_S)
        if not self.held.keys() >= TAGS:
            self.crash("an illegal memory access was encountered")
        digest = hashlib.sha256(self.held[WEIGHTS] + f"{prompt}{index}".encode()).digest()
        return " " + WORDS[digest[0] % len(WORDS)]

    def app(self, routes: web.RouteTableDef) -> web.Application:
        """Return an application with a health path, completions, and the routes given."""

        @web.middleware
        async def unless_crashed(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                if self.crashed is None:
                    return await handler(request)
            except ConnectionResetError:
                if self.crashed is None:
                    raise
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)

        app = web.Application(middlewares=[unless_crashed])
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/completions", self._completions)
        app.add_routes(routes)
        return app

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body.get("model") != self._name:
            error = {"error": {"message": f"no model {body.get('model')}", "code": 404}}
            raise web.HTTPNotFound(text=json.dumps(error), content_type="application/json")
        text = await self.text(body["prompt"], body["max_tokens"])
        return web.json_response({"choices": [{"index": 0, "text": text, "logprobs": None}]})
