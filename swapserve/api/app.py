"""The web application, and the one place where it is put on a socket."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from swapserve.api import admin
from swapserve.api.errors import as_response
from swapserve.api.keys import Keys
from swapserve.api.openai import OpenAI
from swapserve.config.schema import ServerConfig
from swapserve.errors import (
    EndpointNotFound,
    InvalidRequest,
    MethodNotAllowed,
    RequestTooLarge,
    SwapServeError,
)
from swapserve.metrics import Metrics
from swapserve.router.proxy import Proxy
from swapserve.router.resolve import Directory

HANDLERS_GRACE_S = 5.0
"""How long running requests may go on once the server is told to end."""
BACKLOG = 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deps:
    """What the endpoints need."""

    server: ServerConfig
    directory: Directory
    proxy: Proxy
    metrics: Metrics
    control: admin.Control


def build_app(deps: Deps) -> web.Application:
    """Return the application with every route."""
    limit = deps.server.max_body_bytes
    keys = tuple(key.secret for key in deps.server.api_keys)
    app = web.Application(middlewares=[_errors(limit)], client_max_size=limit)
    openai = OpenAI(
        directory=deps.directory,
        proxy=deps.proxy,
        status=deps.control.status,
        glance=partial(deps.control.status, outlook=False),
        metrics=deps.metrics,
        api_keys=deps.server.api_keys,
        metrics_keys=Keys((*keys, *deps.server.admin_keys) if keys else ()),
        max_body_bytes=limit,
    )
    app.add_routes(openai.routes())
    app.add_routes(admin.routes(deps.control, deps.server.admin_keys))
    return app


@asynccontextmanager
async def serve(app: web.Application, host: str, port: int) -> AsyncIterator[Sequence[str]]:
    """Serve the application for as long as the block runs; yield the URLs it has.

    Raises:
        OSError: the address is in use or not ours.

    Cancellation: closes the sockets; running handlers get a few seconds, then are cancelled.
    """
    # Without handler_cancellation a handler runs on after its client has left.
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=HANDLERS_GRACE_S
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=BACKLOG).start()
        yield [f"http://{_authority(address)}" for address in runner.addresses]
    finally:
        await runner.cleanup()


def _authority(address: Sequence[object]) -> str:
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _errors(limit: int) -> Middleware:
    """Return the middleware that turns every error into an OpenAI error object."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except SwapServeError as error:
            return as_response(error)
        except web.HTTPException as error:
            return as_response(_ours(request, error, limit))
        except asyncio.CancelledError:
            raise
        except Exception:  # noqa: BLE001 - the last stop; a client gets an error object always
            _log.exception("%s %s failed", request.method, request.path)
            return as_response(SwapServeError("Something went wrong here; the log says more."))

    return middleware


def _ours(request: web.Request, error: web.HTTPException, limit: int) -> SwapServeError:
    if isinstance(error, web.HTTPNotFound):
        return EndpointNotFound(f"There is no {request.path} here.")
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowed(request.method, request.path, sorted(error.allowed_methods))
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return RequestTooLarge(limit)
    return InvalidRequest(error.reason)
