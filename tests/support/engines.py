"""An adapter and the engine it talks to, over a real connection in this process."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from aiohttp import web

from swapserve.config.recipe_files import load_recipe
from swapserve.config.schema import ModelConfig
from swapserve.engines.base import Adapter
from swapserve.engines.registry import adapter_for
from swapserve.ids import DeviceName, EngineName
from swapserve.testing.dialect import Calls, Habits
from swapserve.testing.dialects import Dialect, dialect
from swapserve.testing.memory_part import MemoryPart

RECIPES = Path(__file__).parents[2] / "engines"
DIALECTS = get_args(Dialect)
GPU = "GPU-00000000-0000-0000-0000-000000000001"


def model(
    recipe: str,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    gpus: Sequence[str] = (GPU,),
) -> ModelConfig:
    """Return a model of one of the shipped recipes."""
    return ModelConfig(
        name=EngineName("model"),
        recipe=load_recipe(RECIPES / f"{recipe}.yaml"),
        model="/model",
        args=tuple(args),
        env=env or {},
        devices=(DeviceName("gpu0" if gpus else "host"),),
        gpus=tuple(gpus),
    )


@dataclass(frozen=True)
class Engine:
    """A running engine, what it holds, what it was asked, and its adapter."""

    adapter: Adapter
    address: str
    part: MemoryPart
    calls: Calls

    async def answer(self) -> str:
        canary = await self.adapter.warm_up(self.address)
        assert canary is not None
        return "".join(canary.tokens)


@asynccontextmanager
async def running(
    which: Dialect,
    *,
    habits: Habits | None = None,
    args: Sequence[str] = (),
    delay_per_token_s: float = 0.0,
    adapter: Adapter | None = None,
) -> AsyncIterator[Engine]:
    """Serve an engine of that kind on a free port."""
    part = MemoryPart(delay_per_token_s=delay_per_token_s)
    calls = dialect(which, part, habits=habits or Habits(), name="model")
    runner = web.AppRunner(part.app(calls.routes()), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield Engine(adapter or adapter_for(model(which, args=args)), address, part, calls)
    finally:
        await runner.cleanup()
