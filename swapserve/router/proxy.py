"""The way of a request to its engine and of the answer back.

What may happen to the three parties while a request runs, and what then:

- The client leaves while it waits: its lease ends. While the engine answers: the connection to
  the engine is closed at once, so that the engine gives up. While the engine is away: the lease
  ends at once, too, so that nobody fetches the engine for it; but its connection to the engine
  is kept until the engine is back or gone, because an end of stream sent now would never reach
  it and the generation would go on for nobody.
- The engine goes away in mid-answer: nothing; the connection is part of what comes back.
- The engine dies: the scheduler says so, or the connection breaks; the client gets an error.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

from swapserve.errors import SwapServeError, UpstreamError
from swapserve.events import BusEvent, RequestEnded
from swapserve.ids import EngineName
from swapserve.messages import Ask, Used
from swapserve.router.admission import Admission, Lease, Place
from swapserve.router.body import RequestBody
from swapserve.router.downstream import ClientLeft, Downstream, Explain
from swapserve.router.headers import to_engine
from swapserve.router.upstream import Upstreams, Wire
from swapserve.states import LeaseState

REASON_GRACE_S = 0.5
"""A broken connection is often seen before the engine's exit, which explains it better."""
ATTEMPTS = 2
CLIENT_LEFT = "client_left"
SEED_BITS = 31
GENERATIVE = frozenset({"/v1/chat/completions", "/v1/completions"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that was understood: for which engine, to which path, with which body."""

    engine: EngineName
    path: str
    body: RequestBody
    ask: Ask


@dataclass(slots=True, eq=False)
class Exchange:
    """One attempt at an engine."""

    wire: Wire
    head: asyncio.Task[aiohttp.ClientResponse | aiohttp.ClientError | OSError]


@dataclass(slots=True, kw_only=True)
class _Record:
    """What `RequestEnded` says in the end."""

    started: float
    outcome: str = "ok"
    status: int = 0
    lease: Lease | None = field(default=None)


class _Again(Exception):
    """The attempt never reached the engine; try once more on a new connection."""


class Proxy:
    """Forwards requests. Enter it before the first one and leave it after the last.

    Args:
        admission: where leases come from.
        explain: what a client is told about an error.
        publish: takes the `RequestEnded` of each request.
        headers_after_s: a stream that still waits then gets its headers.
        keepalive_s: gap between the comments of a stream whose engine is away.
    """

    def __init__(
        self,
        *,
        admission: Admission,
        explain: Explain,
        publish: Callable[[BusEvent], None],
        headers_after_s: float,
        keepalive_s: float,
    ) -> None:
        self._admission = admission
        self._explain = explain
        self._publish = publish
        self._headers_after_s = headers_after_s
        self._keepalive_s = keepalive_s
        self._tasks = asyncio.TaskGroup()
        self._upstreams = Upstreams(self._tasks)
        self._orphans: dict[EngineName, set[Exchange]] = {}
        self._back_at: dict[EngineName, float] = {}

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for engine in tuple(self._orphans):
            self.engine_gone(engine)
        await self._upstreams.close()
        await self._tasks.__aexit__(kind, error, trace)

    async def close_idle(self, engine: EngineName) -> None:
        """Close the engine's idle connections before it is dumped or discarded."""
        await self._upstreams.close_idle(engine)

    def engine_back(self, engine: EngineName) -> None:
        """End the generations whose clients left while the engine was away.

        To be called whenever an engine begins to serve, or goes on to after a swap out that was
        given up, before the scheduler hears of it.
        """
        self._back_at[engine] = self._admission.clock()
        for exchange in self._orphans.pop(engine, ()):
            self._end(exchange)

    def engine_gone(self, engine: EngineName) -> None:
        """Drop every connection that is kept for an engine whose process will not come back."""
        self.engine_back(engine)
        self._upstreams.forget(engine)

    def orphans(self, engine: EngineName) -> int:
        """Return how many connections wait for the engine only to be closed."""
        return len(self._orphans.get(engine, ()))

    async def forward(self, request: web.Request, call: Call) -> web.StreamResponse:
        """Have the engine answer the request, as soon as it is there.

        Raises:
            SwapServeError: it failed before anything was sent to the client; a later failure is
                told in the answer itself.

        Cancellation: means that the client left.
        """
        down = Downstream(request, stream=call.body.stream, explain=self._explain)
        record = _Record(started=asyncio.get_running_loop().time())
        try:
            await self._with_lease(request, call, down, record)
        except ClientLeft:
            record.outcome = CLIENT_LEFT
        except asyncio.CancelledError:
            record.outcome = CLIENT_LEFT
            raise
        except SwapServeError as error:
            record.outcome, record.status = error.code, self._explain(error).status
            if down.response is None:
                raise
            await down.fail(error)
        except Exception:
            record.outcome, record.status = SwapServeError.code, 500
            down.abort()
            raise
        finally:
            self._publish(self._ended(call, down, record))
        return down.response or web.Response(status=499)  # nobody reads it

    async def _with_lease(
        self, request: web.Request, call: Call, down: Downstream, record: _Record
    ) -> None:
        async with self._admission.lease(call.engine, call.ask) as lease:
            record.lease = lease
            down.on_first = partial(self._admission.began, lease.id)
            beat = self._tasks.create_task(self._beat(down, lease)) if call.body.stream else None
            try:
                await self._serve(request, call, down, lease)
            finally:
                if beat is not None:
                    beat.cancel()
        if down.status >= web.HTTPBadRequest.status_code:
            engine_fault = down.status >= web.HTTPInternalServerError.status_code
            record.outcome = "engine_error" if engine_fault else "rejected"

    async def _serve(
        self, request: web.Request, call: Call, down: Downstream, lease: Lease
    ) -> None:
        fresh = False
        failures = 0
        while True:
            await lease.granted()
            suspensions = lease.suspensions
            exchange = self._begin(request, call, fresh=fresh)
            try:
                await _head_or_lost(exchange, lease)
                response = await self._answer(exchange, lease, failures, suspensions)
                await self._relay(exchange, response, down, lease)
            except _Again:
                self._end(exchange)
                fresh = True
                # An engine that went away meanwhile explains the failure: not counted.
                failures += lease.suspensions == suspensions
                continue
            except (ClientLeft, asyncio.CancelledError):
                self._abandon(exchange, lease)
                raise
            except BaseException:
                self._end(exchange)
                raise
            self._upstreams.give(call.engine, exchange.wire)
            if down.status < web.HTTPBadRequest.status_code:
                lease.used = _used(call, down, lease)
            return

    def _begin(self, request: web.Request, call: Call, *, fresh: bool) -> Exchange:
        place = self._admission.place(call.engine)
        wire = self._upstreams.take(call.engine, place, fresh=fresh)
        headers = to_engine(request.headers, place.headers)
        head = self._tasks.create_task(wire.post(call.path, _body(call, place), headers))
        return Exchange(wire, head)

    async def _answer(
        self, exchange: Exchange, lease: Lease, failures: int, suspensions: int
    ) -> aiohttp.ClientResponse:
        """Return the head of the answer, or decide what its absence means."""
        if not exchange.head.done():  # then the lease was lost
            raise lease.lost.result()
        found = exchange.head.result()
        if isinstance(found, aiohttp.ClientResponse):
            return found
        if lease.lost.done():
            raise lease.lost.result()
        unconnected = isinstance(
            found, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError
        )
        if unconnected and lease.suspensions > suspensions:
            raise _Again
        if failures + 1 < ATTEMPTS and (unconnected or exchange.wire.reused):
            raise _Again
        raise await self._blame(lease, found)

    async def _relay(
        self,
        exchange: Exchange,
        response: aiohttp.ClientResponse,
        down: Downstream,
        lease: Lease,
    ) -> None:
        def lost(_: asyncio.Future[SwapServeError]) -> None:
            exchange.wire.kill()  # an engine that vanished sends no end of stream

        lease.lost.add_done_callback(lost)
        try:
            await down.relay(response)
        except (aiohttp.ClientError, OSError) as error:
            raise await self._blame(lease, error) from error
        finally:
            lease.lost.remove_done_callback(lost)

    async def _blame(self, lease: Lease, error: Exception) -> SwapServeError:
        """Return the best explanation of a broken connection: the scheduler's, if it has one."""
        await asyncio.wait({lease.lost}, timeout=REASON_GRACE_S)
        if lease.lost.done():
            return lease.lost.result()
        reason = str(error) or type(error).__name__
        return UpstreamError(lease.engine, f"The connection to '{lease.engine}' broke: {reason}")

    async def _beat(self, down: Downstream, lease: Lease) -> None:
        """Send comments for as long as the engine is away; a slow engine gets none."""
        await asyncio.sleep(self._headers_after_s)
        while True:
            if lease.state in {LeaseState.WAITING, LeaseState.SUSPENDED}:
                try:
                    await down.comment()
                except ClientLeft:
                    return
            await asyncio.sleep(self._keepalive_s)

    def _abandon(self, exchange: Exchange, lease: Lease) -> None:
        back_at = self._back_at.get(lease.engine)
        # The engine may be back already, and the scheduler's word of it still on its way.
        away = back_at is None or back_at < lease.suspended_at
        if lease.state is LeaseState.SUSPENDED and away:
            self._orphans.setdefault(lease.engine, set()).add(exchange)
        else:
            self._end(exchange)

    def _end(self, exchange: Exchange) -> None:
        exchange.head.cancel()
        self._upstreams.drop(exchange.wire)

    def _ended(self, call: Call, down: Downstream, record: _Record) -> RequestEnded:
        now = asyncio.get_running_loop().time()
        lease = record.lease
        queue_s = now - record.started
        if lease is not None and lease.granted_at is not None:
            queue_s = lease.granted_at - lease.requested_at
        return RequestEnded(
            at=datetime.now(UTC).timestamp(),
            engine=call.engine,
            endpoint=call.path,
            status=record.status or down.status,
            outcome=record.outcome,
            stream=call.body.stream,
            queue_s=queue_s,
            ttft_s=None if down.first_at is None else down.first_at - record.started,
            seconds=now - record.started,
            suspensions=lease.suspensions if lease is not None else 0,
            bytes_out=down.bytes_out,
            bytes_in=call.body.size,
            prefix=call.body.prefix,
            priority=call.ask.priority.name.lower(),
            key=call.ask.key,
            tokens_in=call.ask.tokens_in,
            tokens_out=lease.used.tokens_out if lease is not None and lease.used else None,
        )


async def _head_or_lost(exchange: Exchange, lease: Lease) -> None:
    """Return when the engine has answered (or could not be asked), or the lease was lost."""
    first: set[asyncio.Future[Any]] = {exchange.head, lease.lost}
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)


def _used(call: Call, down: Downstream, lease: Lease) -> Used:
    """Return what an answer that was passed on to its end has taken of its engine.

    A suspension within a part makes that part's time unknown: when exactly the engine stopped and
    went on nobody here can tell.
    """
    prefill_s = decode_s = None
    granted, first, last = lease.granted_at, down.first_at, down.last_at
    if down.streamed and granted is not None and first is not None and last is not None:
        prefill_s = None if lease.away(granted, first) else max(0.0, first - granted)
        decode_s = None if lease.away(first, last) else last - first
    return Used(
        tokens_in=call.ask.tokens_in,
        tokens_out=down.tokens.total(stream=down.streamed) if call.path in GENERATIVE else 0.0,
        prefill_s=prefill_s,
        decode_s=decode_s,
    )


def _body(call: Call, place: Place) -> bytes:
    seed = None
    if place.fresh_seed and place.takes_seed and call.body.samples and call.path in GENERATIVE:
        seed = secrets.randbits(SEED_BITS)
    model = None if call.body.model == call.engine else str(call.engine)
    return call.body.rewritten(model=model, seed=seed)
