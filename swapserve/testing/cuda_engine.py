"""A small engine whose state is in GPU memory: `python -m swapserve.testing.cuda_engine --port P`.

Built like real ones: a process that speaks HTTP, and a child for each rank that holds the CUDA
context. Each token is computed by all ranks from bytes on their devices, so a byte that a swap
lost shows in the text. It needs only the driver: NVIDIA's, or the tests' stand-in.
"""

import argparse
import asyncio
import json
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from aiohttp import web

from swapserve.testing.cuda_part import Link, RankOptions, VramPart
from swapserve.testing.cuda_rank import STATE, first_cache, next_state, place_of
from swapserve.testing.engine import WORDS, Engine, Habits, common_options, serve


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Habits):
    """How this engine behaves."""

    ranks: int
    vram_mb: int
    cache_mb: int
    late_mb: int
    late_cuda: float | None
    late_trigger: Path | None
    dialect: str | None
    habits: str

    def rank(self, number: int) -> RankOptions:
        """Return the options of one rank."""
        weights_mb = self.vram_mb - self.cache_mb
        return RankOptions(rank=number, weights_mb=weights_mb, cache_mb=self.cache_mb)

    def late(self) -> RankOptions | None:
        """Return the options of the child that initialises CUDA late, None if there is none."""
        if self.late_cuda is None and self.late_trigger is None:
            return None
        return RankOptions(
            rank=0,
            weights_mb=self.late_mb,
            cache_mb=1,
            delay=self.late_cuda or 0.0,
            trigger=self.late_trigger,
        )


def token_of(states: bytes, index: int) -> str:
    """Return the word for what the ranks computed; they should all have computed the same."""
    tail = states[1:4] + states[STATE : STATE + 4]
    return f" {WORDS[states[0] % len(WORDS)]}{index}.{tail.hex()}"


def expected_tokens(prompt: str, seed: int | None, count: int) -> list[str]:
    """Return the tokens that the engine answers with; `seed` None is temperature 0."""
    cache = bytearray(first_cache(prompt, seed))
    tokens = []
    for index in range(count):
        state = next_state(bytes(cache), index)
        cache[place_of(index) : place_of(index) + STATE] = state
        tokens.append(token_of(state, index))
    return tokens


class CudaEngine(Engine):
    """The endpoints, over the part in GPU memory."""

    def __init__(self, options: Options, part: VramPart, late: Link | None) -> None:
        super().__init__(options)
        self._delay_s = options.delay_per_token
        self._part = part
        self._late = late

    def routes(self) -> list[web.AbstractRouteDef]:
        """Return what it serves."""
        return [
            web.get("/health", self.health),
            web.get("/stats", self.stats),
            web.get("/v1/models", self.models),
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat),
            web.get("/weights", self.weights),
            web.post("/kernel", self.kernel),
        ]

    async def stats(self, request: web.Request) -> web.StreamResponse:
        """Tell what it has done so far, and who its children are; never touches a device."""
        found = {
            **self.counts,
            "pid": os.getpid(),
            "ranks": self._part.pids,
            "late": self._late and {"pid": self._late.pid, "has_cuda": self._late.has_answered},
        }
        return web.json_response(found)

    async def weights(self, _request: web.Request) -> web.StreamResponse:
        """Say whether each byte of the weights is as it should be, and where they are."""
        whole = await self._part.weights_are_whole()
        devices = [about["uuid"] for about in await self._part.about()]
        return web.json_response({"whole": whole, "devices": devices})

    async def kernel(self, request: web.Request) -> web.StreamResponse:
        """Keep the devices busy for `?seconds=`."""
        await self._part.spin(float(request.query["seconds"]))
        return web.json_response({})

    async def generate(self, prompt: str, seed: int | None, count: int) -> AsyncGenerator[str]:
        """Compute tokens; closed when the client leaves."""
        index = 0
        async with aclosing(self._part.sequence(prompt, seed, count)) as states:
            async for state in states:
                await asyncio.sleep(self._delay_s)
                self.count_token()
                yield token_of(state, index)
                index += 1


class _Accepted(argparse.Action):
    """A flag that real engines need for their dialect's calls; here they are always there."""

    def __call__(self, *_: object) -> None:
        """Do nothing."""


def _options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="swapserve.testing.cuda_engine", description=__doc__)
    common_options(parser)
    parser.add_argument("--vram-mb", type=int, default=32, metavar="M", help="of each rank")
    parser.add_argument("--cache-mb", type=int, default=8, metavar="M", help="of these, its cache")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="one on each device")
    parser.add_argument(
        "--late-cuda", type=float, metavar="S", help="a child initialises CUDA so much later"
    )
    parser.add_argument(
        "--late-trigger", type=Path, metavar="FILE", help="... or when this file appears"
    )
    parser.add_argument("--late-mb", type=int, default=4, metavar="M", help="that child's memory")
    parser.add_argument("--dialect", choices=("vllm", "sglang", "ollama"), help="calls for memory")
    parser.add_argument("--habits", default="{}", metavar="JSON", help="fields of dialect.Habits")
    for flag in ("--enable-sleep-mode", "--enable-memory-saver", "--enable-weights-cpu-backup"):
        suppressed = argparse.SUPPRESS
        parser.add_argument(flag, action=_Accepted, nargs=0, dest=suppressed, help=suppressed)
    return Options(**vars(parser.parse_args(argv)))


def _add_dialect(app: web.Application, options: Options, part: VramPart) -> None:
    if options.dialect is None:
        return
    from swapserve.testing import dialect, dialects  # noqa: PLC0415 - few engines speak one

    given = json.loads(options.habits)
    sets = {name: frozenset(value) for name, value in given.items() if isinstance(value, list)}
    habits = dialect.Habits(**{**given, **sets})
    which = cast("dialects.Dialect", options.dialect)
    app.add_routes(dialects.routes(which, part, habits=habits, name=options.name))


async def _run(options: Options) -> None:
    ranks = [options.rank(number) for number in range(options.ranks)]
    late_options = options.late()
    async with VramPart.started(ranks) as part, asyncio.TaskGroup() as tasks:
        late = await Link.start(late_options) if late_options else None
        if late is not None:
            late.send({"do": "about"})
        watching = tasks.create_task(part.watch(late)) if late else None
        app = CudaEngine(options, part, late).app()
        _add_dialect(app, options, part)
        await serve(app, options, asyncio.Event())
        if late is not None and watching is not None:
            watching.cancel()
            await late.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Run until SIGTERM, or until a rank ends."""
    asyncio.run(_run(_options(argv)))


if __name__ == "__main__":
    main()
