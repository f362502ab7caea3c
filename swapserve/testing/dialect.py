"""What the dialects of `dialects.py` have in common: the memory they act on, and their faults."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from aiohttp import web

WEIGHTS = "weights"
KV_CACHE = "kv_cache"
TAGS = frozenset({WEIGHTS, KV_CACHE})
POLL_S = 0.005
_HOUR_S = 3600.0


class Part(Protocol):
    """The piece of an engine that holds GPU memory and computes with it."""

    paused: bool
    """While true no token is computed; requests wait."""

    @property
    def running(self) -> int:
        """Requests that it works on."""

    async def release(self, tags: Collection[str], *, keep: bool) -> None:
        """Free the memory of these tags; with `keep`, copy it to host memory first."""

    async def reacquire(self, tags: Collection[str]) -> None:
        """Allocate it again: with its content if that was kept, else with nonsense."""

    async def reload(self) -> None:
        """Read the weights from disk into their memory."""

    async def abort(self) -> None:
        """End all requests."""

    def crash(self, reason: str) -> NoReturn:
        """End the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How this engine differs from a well-behaved one of the newest version."""

    early_answer_s: float = 0.0
    """It answers this long before memory is really released, as older versions did."""
    missing: frozenset[str] = frozenset()
    """Paths that its version does not have."""
    refused: frozenset[str] = frozenset()
    """Paths that answer with an error of the server."""
    hung: frozenset[str] = frozenset()
    """Paths that never answer, and do nothing."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How much longer a call takes, by its path, or its path and query (`/sleep?level=2`)."""
    memory_saver: bool = True
    """SGLang: started with --enable-memory-saver."""
    weights_backup: bool = True
    """SGLang: started with --enable-weights-cpu-backup."""
    generates: bool = True
    """Ollama: its model is one that generates text; else one for embeddings."""
    model_path: str = "/model"
    """SGLang: where its weights may be read from."""


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Calls:
    """What the dialects have in common."""

    def __init__(self, part: Part, habits: Habits) -> None:
        self._part = part
        self._habits = habits
        self._released: set[str] = set()
        self._late: set[asyncio.Task[None]] = set()
        self.seen: list[str] = []
        """Every call that changes something, with its parameters, in order."""

    def _routes(
        self, gets: Mapping[str, Handler], posts: Mapping[str, Handler]
    ) -> web.RouteTableDef:
        table = web.RouteTableDef()
        for method, handlers in (("GET", gets), ("POST", posts)):
            for path, handler in handlers.items():
                if path not in self._habits.missing:
                    table.route(method, path)(self._with_habits(path, handler))
        return table

    def _with_habits(self, path: str, handler: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                self.seen.append(request.path_qs)
            if path in self._habits.hung:
                await asyncio.sleep(_HOUR_S)
            if path in self._habits.refused:
                raise refusal(web.HTTPInternalServerError, "told to fail")
            seconds = self._habits.seconds
            await asyncio.sleep(seconds.get(request.path_qs, seconds.get(request.path, 0.0)))
            return await handler(request)

        return handle

    async def _soon(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do it before the answer, or, by habit, some time after."""
        delay_s = self._habits.early_answer_s
        if not delay_s:
            await work()
            return

        async def late() -> None:
            await asyncio.sleep(delay_s)
            await work()

        self._later(late())

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def _idle(self) -> None:
        """Wait until there is no request."""
        while self._part.running:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)

    async def _give(self, tags: Collection[str], *, keep_weights: bool) -> None:
        fresh = set(tags) - self._released
        for tag in sorted(fresh):
            await self._part.release([tag], keep=keep_weights and tag == WEIGHTS)
        self._released |= fresh

    async def _take(self, tags: Collection[str]) -> None:
        back = set(tags) & self._released
        await self._part.reacquire(sorted(back))
        self._released -= back


def query_of(request: web.Request, known: set[str]) -> Mapping[str, str]:
    """Return the query; other parameters than the known are refused."""
    if unknown := set(request.query) - known:
        raise refusal(web.HTTPBadRequest, f"unknown parameters {sorted(unknown)}")
    return request.query


async def json_of(request: web.Request, known: set[str]) -> dict[str, Any]:
    """Return the body; other fields than the known are refused."""
    try:
        body = await request.json()
    except json.JSONDecodeError as error:
        raise refusal(web.HTTPBadRequest, f"JSON decode error: {error}") from error
    if not isinstance(body, dict):
        raise refusal(web.HTTPBadRequest, "Request body must be a JSON object")
    if unknown := set(body) - known:
        raise refusal(web.HTTPBadRequest, f"unknown fields {sorted(unknown)}")
    return body


def tags_of(body: Mapping[str, Any]) -> set[str]:
    """Return the tags that a body names, or all."""
    tags = set(body.get("tags") or TAGS)
    if not tags <= TAGS:
        raise refusal(web.HTTPBadRequest, f"unknown tags {sorted(tags - TAGS)}")
    return tags


def refusal(kind: type[web.HTTPError], message: str) -> web.HTTPError:
    """Return an error in the shape that vLLM and SGLang give it."""
    body = {"error": {"message": message, "type": kind.__name__, "code": kind.status_code}}
    return kind(text=json.dumps(body), content_type="application/json")
