"""The OpenAI endpoints: understand a request just enough, and hand it to the proxy."""

import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web

import swapserve
from swapserve.api.keys import Keys
from swapserve.config.schema import ApiKey
from swapserve.errors import EndpointNotFound, InvalidRequest, ModelNotFound, RequestTooLarge
from swapserve.metrics import CONTENT_TYPE, Metrics
from swapserve.router.asks import ask_of
from swapserve.router.body import RequestBody
from swapserve.router.proxy import Call, Proxy
from swapserve.router.resolve import Directory
from swapserve.status import EngineStatus, Status

FORWARDED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""Paths that engines answer. An engine's own admin paths are not here and cannot be reached."""
JSON = "application/json"


class OpenAI:
    """Handlers of the endpoints that clients use."""

    def __init__(
        self,
        *,
        directory: Directory,
        proxy: Proxy,
        status: Callable[[], Status],
        glance: Callable[[], Status],
        metrics: Metrics,
        api_keys: Sequence[ApiKey],
        metrics_keys: Keys,
        max_body_bytes: int,
    ) -> None:
        self._directory = directory
        self._proxy = proxy
        self._status = status
        self._glance = glance
        self._metrics = metrics
        self._api_keys = api_keys
        self._keys = Keys([key.secret for key in api_keys])
        self._metrics_keys = metrics_keys
        self._max_body_bytes = max_body_bytes
        self._created = int(datetime.now(UTC).timestamp())

    def routes(self) -> list[web.RouteDef]:
        """Return every route of this module."""
        return [
            *(web.post(path, self.forward) for path in FORWARDED),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name:.+}", self.model),
            web.get("/health", self.health),
            web.get("/metrics", self.metrics),
        ]

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Have the model's engine answer.

        Cancellation: the client left.
        """
        index = self._keys.check(request)
        key = None if index is None else self._api_keys[index]
        body = RequestBody(await self._read(request))
        model = self._directory.model(self._directory.resolve(body.model))
        if request.path not in model.recipe.endpoints:
            raise EndpointNotFound(f"The model '{body.model}' does not serve {request.path}.")
        ask = ask_of(request.headers, body, key=key, deadline_s=model.deadline_s)
        call = Call(engine=model.name, path=request.path, body=body, ask=ask)
        return await self._proxy.forward(request, call)

    async def models(self, request: web.Request) -> web.StreamResponse:
        """List the models, with where each of them is."""
        self._keys.check(request)
        data = [self._model(engine) for engine in self._glance().engines]
        return web.json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """Show one model, by name or alias."""
        self._keys.check(request)
        name = self._directory.resolve(request.match_info["name"])
        for engine in self._glance().engines:
            if engine.name == name:
                return web.json_response(self._model(engine))
        raise ModelNotFound(name)

    async def health(self, _request: web.Request) -> web.StreamResponse:
        """Say that the daemon is alive; open to everyone, says nothing about engines."""
        versions = {
            "swapserve": swapserve.__version__,
            "python": platform.python_version(),
            "aiohttp": aiohttp.__version__,
        }
        return web.json_response({"status": "ok", "versions": versions})

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Give Prometheus its metrics."""
        self._metrics_keys.check(request)
        text = self._metrics.render(self._status())
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _read(self, request: web.Request) -> bytes:
        """Return the body.

        Raises:
            InvalidRequest: its type is not JSON in UTF-8.
            RequestTooLarge: it is over the limit.
        """
        if "Content-Type" in request.headers and request.content_type != JSON:
            raise InvalidRequest(
                f"The content type is '{request.content_type}'; it must be '{JSON}'"
                f" (curl: -H 'Content-Type: {JSON}')."
            )
        if (request.charset or "utf-8").lower().replace("_", "-") not in {"utf-8", "utf8"}:
            raise InvalidRequest(f"The charset is '{request.charset}'; it must be UTF-8.")
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise RequestTooLarge(self._max_body_bytes) from error

    def _model(self, engine: EngineStatus) -> Mapping[str, Any]:
        return {
            "id": engine.name,
            "object": "model",
            "created": self._created,
            "owned_by": "swapserve",
            "swapserve": {
                "state": engine.state,
                "tier": engine.tier,
                "aliases": engine.aliases,
            },
        }
