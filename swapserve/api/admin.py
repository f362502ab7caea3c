"""The admin API: what is where, operator commands, logs and events.

Everything under `/admin/v1/`. Errors are raised as `SwapServeError`; the application's
middleware renders them.
"""

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal, Protocol
from urllib.parse import urlsplit

from aiohttp import web

from swapserve.api.keys import Keys
from swapserve.errors import Forbidden, InvalidRequest, ModelNotFound, Unauthenticated
from swapserve.events import Bus, BusEvent, as_json
from swapserve.ids import EngineName
from swapserve.status import Status

Verb = Literal["swap_in", "swap_out", "start", "stop", "pin", "unpin"]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PREFIX = "/admin/v1"
VERBS: dict[str, Verb] = {
    "swap-in": "swap_in",
    "swap-out": "swap_out",
    "start": "start",
    "stop": "stop",
    "pin": "pin",
    "unpin": "unpin",
}
"""Last part of a command's path → the core's word for it."""
HEARTBEAT_S = 10.0
"""Gap between two SSE comments of a silent event stream."""
MAX_LOG_LINES = 10_000
_PROXY_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


class Control(Protocol):
    """What the admin API needs of the daemon."""

    @property
    def bus(self) -> Bus:
        """Where events are published."""

    @property
    def closing(self) -> asyncio.Event:
        """Set when the daemon goes down; open event streams end then."""

    def status(self, *, outlook: bool = True) -> Status:
        """Return everything as it is now; without `outlook` nothing is predicted for it."""

    def resolve(self, name: str) -> EngineName:
        """Return the engine of a name or alias.

        Raises:
            ModelNotFound: there is none.
        """

    async def command(self, verb: Verb, engine: EngineName, *, wait: bool = True) -> None:
        """Carry an operator's command out; without `wait` only hand it in.

        Raises:
            SwapServeError: it failed (with `wait`), or could not be handed in.

        Cancellation:
            The command goes on.
        """

    async def log_tail(self, engine: EngineName, lines: int) -> str:
        """Return the last lines of an engine's own log, empty if there is none."""

    async def shutdown(self) -> None:
        """Ask the daemon to end; returns before it does."""


def routes(control: Control, admin_keys: Sequence[str]) -> list[web.RouteDef]:
    """Return the admin routes.

    Engine names may hold slashes, so a name in a path is best percent-encoded whole
    (`org%2Fmodel`): then it cannot be mistaken for a command either.

    Args:
        control: the daemon.
        admin_keys: bearer tokens of administrators; without any, only callers on this machine
            are let in.
    """
    api = _Admin(control)
    guard = _guard(admin_keys)
    engine = f"{PREFIX}/engines/{{name:.+}}"
    return [
        web.get(f"{PREFIX}/status", guard(api.status)),
        web.get(f"{PREFIX}/events", guard(api.events)),
        web.post(f"{PREFIX}/shutdown", guard(api.shutdown)),
        *(web.post(f"{engine}/{slug}", guard(api.command(verb))) for slug, verb in VERBS.items()),
        web.get(f"{engine}/logs", guard(api.logs)),
        web.get(engine, guard(api.engine)),
    ]


class _Admin:
    def __init__(self, control: Control) -> None:
        self._control = control

    async def status(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(self._control.status().as_json())

    async def engine(self, request: web.Request) -> web.StreamResponse:
        return self._describe(self._named(request))

    def command(self, verb: Verb) -> Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            name = self._named(request)
            wait = _flag(request, "wait", default=True)
            await self._control.command(verb, name, wait=wait)
            return self._describe(name, http_status=200 if wait else 202)

        return handler

    async def logs(self, request: web.Request) -> web.StreamResponse:
        name = self._named(request)
        lines = _number(request, "lines", default=100, most=MAX_LOG_LINES)
        return web.Response(text=await self._control.log_tail(name, lines))

    async def shutdown(self, _request: web.Request) -> web.StreamResponse:
        await self._control.shutdown()
        return web.json_response({"shutting_down": True}, status=202)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Stream events as SSE, older ones first if `?since=` or Last-Event-ID asks for them.

        With `?follow=false` the stream ends after the older ones.
        """
        since = _since(request)
        follow = _flag(request, "follow", default=True)
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        await response.prepare(request)
        # No await between the subscription and the look at history: nothing is lost or doubled.
        with self._control.bus.subscribe() as live:
            past = [event for event in self._control.bus.history if event.at > since]
            with contextlib.suppress(ConnectionError):  # leaving is how clients end a stream
                for event in past:
                    await response.write(_frame(event))
                if follow:
                    await self._follow(response, live)
        return response

    async def _follow(self, response: web.StreamResponse, live: AsyncIterator[BusEvent]) -> None:
        async def send() -> None:
            async for event in live:
                await response.write(_frame(event))

        try:
            async with asyncio.TaskGroup() as group:
                sender = group.create_task(send())
                await self._beat_until_closing(response)
                sender.cancel()
        except* ConnectionError as left:
            raise ConnectionResetError("the client left") from left

    async def _beat_until_closing(self, response: web.StreamResponse) -> None:
        while True:
            await response.write(b": heartbeat\n\n")
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._control.closing.wait()
            except TimeoutError:
                continue
            return

    def _named(self, request: web.Request) -> EngineName:
        return self._control.resolve(request.match_info["name"])

    def _describe(self, name: EngineName, *, http_status: int = 200) -> web.Response:
        for engine in self._control.status().engines:
            if engine.name == name:
                return web.json_response(engine.as_json(), status=http_status)
        raise ModelNotFound(name)


def _frame(event: BusEvent) -> bytes:
    body = json.dumps(as_json(event), separators=(",", ":"))
    return f"id: {event.at!r}\nevent: {event.kind}\ndata: {body}\n\n".encode()


def _flag(request: web.Request, name: str, *, default: bool) -> bool:
    found = request.query.get(name)
    if found is None:
        return default
    if found not in {"true", "false"}:
        raise InvalidRequest(f"'{name}' must be true or false, not '{found}'.", param=name)
    return found == "true"


def _number(request: web.Request, name: str, *, default: int, most: int) -> int:
    found = request.query.get(name, str(default))
    if not (found.isascii() and found.isdigit() and 1 <= int(found[:9]) <= most):
        raise InvalidRequest(f"'{name}' must be between 1 and {most}, not '{found}'.", param=name)
    return int(found)


def _since(request: web.Request) -> float:
    """Return the wall time after which past events are wanted; without one, none are."""
    found = request.headers.get("Last-Event-ID") or request.query.get("since", "inf")
    try:
        return float(found)
    except ValueError as error:
        message = f"'since' must be seconds since the epoch, not '{found}'."
        raise InvalidRequest(message, param="since") from error


# ------------------------------------------------------------ who may call


def _guard(admin_keys: Sequence[str]) -> Callable[[Handler], Handler]:
    keys = Keys(admin_keys)

    def guard(handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            _refuse_foreign_pages(request)
            if admin_keys:
                _require_key(request, keys)
            else:
                _require_this_machine(request)
            return await handler(request)

        return guarded

    return guard


def _refuse_foreign_pages(request: web.Request) -> None:
    """Refuse calls that a browser makes for another site's page."""
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.host.lower():
        raise Forbidden(f"Pages of '{origin}' may not use the admin API.")


def _require_key(request: web.Request, keys: Keys) -> None:
    try:
        keys.check(request)
    except Unauthenticated as error:
        raise Unauthenticated(
            "The admin API needs an admin key: send 'Authorization: Bearer KEY' with one of"
            " server.admin_keys (command line: --key or SWAPSERVE_ADMIN_KEY)."
        ) from error


def _require_this_machine(request: web.Request) -> None:
    """Let loopback callers in, unless a proxy or a rebound DNS name brought them here."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    host = urlsplit(f"//{request.host}").hostname or ""
    forwarded = any(name in request.headers for name in _PROXY_HEADERS)
    local = isinstance(peer, tuple) and _is_loopback(str(peer[0]))
    named_local = host == "localhost" or _is_loopback(host)
    if forwarded or not local or not named_local:
        raise Forbidden(
            "Without server.admin_keys the admin API answers only to this machine, by its"
            " loopback address. Configure an admin key to use it from elsewhere."
        )


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)
