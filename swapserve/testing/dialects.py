"""The calls with which real engines give GPU memory back, on a part that holds some.

`routes("vllm", part)` are to be served beside an engine's other paths. They are as strict as the
real ones, and stricter where those are silent: an unknown parameter is refused, though vLLM's
FastAPI would ignore it and do the default instead. What ends a real engine ends this one.
Sources: `swapserve.engines.vllm`, `.sglang`, `.ollama`; vLLM's answers were compared with those of
a vLLM 0.32.0 (CPU build), the others' with their source.
"""

import asyncio
from typing import Literal

from aiohttp import web

from swapserve.testing.dialect import (
    KV_CACHE,
    TAGS,
    WEIGHTS,
    Calls,
    Habits,
    Part,
    json_of,
    query_of,
    refusal,
    tags_of,
)

Dialect = Literal["vllm", "sglang", "ollama"]


class Vllm(Calls):
    """vLLM 0.32 with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode."""

    def __init__(self, part: Part, habits: Habits) -> None:
        super().__init__(part, habits)
        self._level: int | None = None
        self._draining = False

    def routes(self) -> web.RouteTableDef:
        """Return its calls."""
        gets = {
            "/is_sleeping": self._is_sleeping,
            "/is_paused": self._is_paused,
            "/metrics": self._metrics,
        }
        posts = {
            "/pause": self._pause,
            "/resume": self._resume,
            "/sleep": self._sleep,
            "/release_kv_cache_memory": self._release_kv,
            "/wake_up": self._wake_up,
            "/collective_rpc": self._rpc,
            "/reset_prefix_cache": self._reset,
        }
        return self._routes(gets, posts)

    async def _is_sleeping(self, _request: web.Request) -> web.Response:
        # Versions that answered too early did not count a pause as sleep.
        paused = self._paused and not self._habits.early_answer_s
        return web.json_response({"is_sleeping": paused or bool(self._released)})

    async def _is_paused(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_paused": self._paused})

    @property
    def _paused(self) -> bool:
        return self._part.paused or self._draining

    async def _metrics(self, _request: web.Request) -> web.Response:
        asleep = self._level is not None
        values = {
            "awake": not asleep,
            "weights_offloaded": self._level == 1,
            "discard_all": self._level == 2,  # noqa: PLR2004
        }
        lines = [
            f'vllm:engine_sleep_state{{engine="0",model_name="m",sleep_state="{name}"}} {value:.1f}'
            for name, value in values.items()
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def _pause(self, request: web.Request) -> web.Response:
        query = query_of(request, {"mode", "clear_cache"})
        mode = query.get("mode", "abort")
        if mode not in {"abort", "wait", "keep"}:
            raise refusal(web.HTTPBadRequest, "mode should be 'abort', 'wait' or 'keep'")
        if mode == "abort":
            await self._part.abort()
        elif mode == "wait":
            self._draining = True
            await self._idle()
            if not self._draining:  # resumed meanwhile
                return web.json_response({"status": "paused"})
        self._draining = False
        self._part.paused = True
        return web.json_response({"status": "paused"})

    async def _resume(self, request: web.Request) -> web.Response:
        query_of(request, set())
        self._draining = self._part.paused = False
        return web.json_response({"status": "resumed"})

    async def _sleep(self, request: web.Request) -> web.Response:
        query = query_of(request, {"level", "mode"})
        level = query.get("level", "1")
        if level not in {"0", "1", "2"}:
            raise refusal(web.HTTPBadRequest, "level should be 0, 1 or 2")
        if self._part.running and not self._part.paused:
            self._part.crash("CUDA error: an illegal memory access was encountered")
        if query.get("mode", "abort") == "abort":
            await self._part.abort()
        self._part.paused = True

        async def work() -> None:
            self._level = int(level)
            await self._give(TAGS, keep_weights=level == "1")

        if level != "0":
            await self._soon(work)
        return web.json_response({"status": "sleeping", "level": int(level)})

    async def _release_kv(self, request: web.Request) -> web.Response:
        query_of(request, set())
        if not self._part.paused or self._part.running:
            raise refusal(web.HTTPInternalServerError, "requires a completed pause first")
        if self._released:
            raise refusal(web.HTTPInternalServerError, "requires all memory to be resident")

        async def work() -> None:
            self._level = 0
            await self._give({KV_CACHE}, keep_weights=True)

        await self._soon(work)
        return web.json_response({"status": "kv_cache_released"})

    async def _wake_up(self, request: web.Request) -> web.Response:
        query_of(request, {"tags"})
        tags = request.query.getall("tags", [])
        # A tag that does not sleep, or does not exist, is answered with success, too.
        if set(tags) <= self._released:
            await self._take(tags or TAGS)
        if not self._released:
            self._level = None
            self._draining = self._part.paused = False
        status = "sleeping" if self._released else "awake"
        return web.json_response({"status": status, "tags": tags or None})

    async def _rpc(self, request: web.Request) -> web.Response:
        body = await json_of(request, {"method", "args", "kwargs", "timeout"})
        if body.get("method") is None:
            raise refusal(web.HTTPBadRequest, "Missing 'method' in request body")
        if body["method"] != "reload_weights":
            raise refusal(web.HTTPInternalServerError, f"no attribute {body['method']!r}")
        if WEIGHTS in self._released:
            self._part.crash("CUDA error: an illegal memory access was encountered")
        await self._part.reload()
        return web.json_response({"results": [None]})

    async def _reset(self, request: web.Request) -> web.Response:
        query_of(request, {"reset_running_requests", "reset_external"})
        return web.json_response({"success": not self._part.running})


class SGLang(Calls):
    """SGLang of 2026. A mistake raises in its scheduler, which takes the server with it."""

    def __init__(self, part: Part, habits: Habits) -> None:
        super().__init__(part, habits)
        self._version = "default"

    def routes(self) -> web.RouteTableDef:
        """Return its calls."""
        posts = {
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._resume,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._flush,
            "/update_weight_version": self._update_version,
            "/update_weights_from_disk": self._update_weights,
        }
        return self._routes({"/model_info": self._info}, posts)

    async def _info(self, _request: web.Request) -> web.Response:
        return web.json_response({"model_path": "m", "weight_version": self._version})

    async def _release(self, request: web.Request) -> web.Response:
        tags = tags_of(await json_of(request, {"tags"}))
        if self._part.running:
            self._part.crash("AssertionError: should be called only when server is idle.")
        if tags & self._released:
            self._part.crash("Cannot pause allocation that is not active.")

        async def work() -> None:
            keep = self._habits.weights_backup
            if self._habits.memory_saver:
                await self._give(tags, keep_weights=keep)
            else:
                self._released |= tags

        await self._soon(work)
        return web.Response(body=b"null", content_type="application/json")

    async def _resume(self, request: web.Request) -> web.Response:
        tags = tags_of(await json_of(request, {"tags"}))
        if tags - self._released:
            self._part.crash(f"KeyError: {sorted(tags - self._released)[0]!r}")
        if self._habits.memory_saver:
            await self._take(tags)
        self._released -= tags
        return web.Response(body=b"null", content_type="application/json")

    async def _pause(self, request: web.Request) -> web.Response:
        mode = (await json_of(request, {"mode"})).get("mode", "abort")
        if mode not in {"abort", "retract", "in_place"}:
            raise refusal(web.HTTPBadRequest, "mode should be 'abort', 'retract' or 'in_place'")
        if mode == "abort":
            await self._part.abort()
        self._part.paused = True
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        await json_of(request, {"torch_empty_cache"})
        self._part.paused = False
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush(self, request: web.Request) -> web.Response:
        query_of(request, {"timeout"})
        if KV_CACHE in self._released:
            self._part.crash("CUDA error: an illegal memory access was encountered")
        if self._part.running:
            raise web.HTTPBadRequest(text="Flush cache failed.\n")
        return web.Response(text="Cache flushed.\n")

    async def _update_version(self, request: web.Request) -> web.Response:
        body = await json_of(request, {"new_version", "abort_all_requests"})
        if "new_version" not in body:
            raise refusal(web.HTTPBadRequest, "new_version: Field required")
        if body.get("abort_all_requests", True):
            await self._part.abort()
        self._version = body["new_version"]
        return web.json_response({"success": True, "new_version": self._version})

    async def _update_weights(self, request: web.Request) -> web.Response:
        body = await json_of(request, {"model_path", "load_format", "abort_all_requests"})
        if self._released:
            self._part.crash("CUDA error: an illegal memory access was encountered")
        if body.get("model_path") != self._habits.model_path:
            message = {"success": False, "message": f"no weights in {body.get('model_path')}"}
            return web.json_response(message, status=400)
        await self._part.reload()
        return web.json_response({"success": True, "message": "Succeeded to update model weights."})


class Ollama(Calls):
    """Ollama 2026 with one model. Unlike the real one it does not load for a request by itself."""

    def __init__(self, part: Part, habits: Habits, name: str) -> None:
        super().__init__(part, habits)
        self._name = name
        self._leaving = False

    def routes(self) -> web.RouteTableDef:
        """Return its calls."""
        posts = {"/api/generate": self._generate, "/api/embed": self._embed}
        return self._routes({"/api/ps": self._ps}, posts)

    async def _ps(self, _request: web.Request) -> web.Response:
        loaded = (
            [] if self._released == TAGS else [{"name": self._name, "model": self._name, "size": 1}]
        )
        return web.json_response({"models": loaded})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await json_of(request, {"model", "prompt", "stream", "keep_alive"})
        if body.get("model") != self._name:
            raise refusal(web.HTTPNotFound, f"model '{body.get('model')}' not found")
        if body.get("prompt"):
            raise refusal(web.HTTPBadRequest, "use /v1/completions here")
        answer = {"model": self._name, "response": "", "done": True}
        if body.get("keep_alive") == 0:
            self._leaving = True
            self._later(self._unload())
            return web.json_response({**answer, "done_reason": "unload"})
        if not self._habits.generates:
            raise refusal(web.HTTPBadRequest, f'"{self._name}" does not support generate')
        await self._load()
        return web.json_response({**answer, "done_reason": "load"})

    async def _embed(self, request: web.Request) -> web.Response:
        body = await json_of(request, {"model", "input", "keep_alive"})
        if body.get("model") != self._name or body.get("input") != "":
            raise refusal(web.HTTPBadRequest, "only to load the model")
        await self._load()
        return web.json_response({"model": self._name, "embeddings": []})

    async def _load(self) -> None:
        self._leaving = False
        if self._released:
            await self._take(TAGS)
            await self._part.reload()

    async def _unload(self) -> None:
        """Wait for the last request, then end the runner."""
        await asyncio.sleep(self._habits.early_answer_s)
        await self._idle()
        if self._leaving:
            await self._give(TAGS, keep_weights=False)


def dialect(which: Dialect, part: Part, *, habits: Habits, name: str) -> Vllm | SGLang | Ollama:
    """Return the calls of one kind of engine; `name` is its model's."""
    match which:
        case "vllm":
            return Vllm(part, habits)
        case "sglang":
            return SGLang(part, habits)
        case "ollama":
            return Ollama(part, habits, name)


def routes(
    which: Dialect, part: Part, *, habits: Habits | None = None, name: str = "model"
) -> web.RouteTableDef:
    """Return the routes of one kind of engine, for an application that has none of these paths."""
    return dialect(which, part, habits=habits or Habits(), name=name).routes()
