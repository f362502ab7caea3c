"""Show whether the CUDA driver can move the state of an engine, by doing it.

The engine runs under a keeper of its own, in a directory of its own, so that whatever becomes of
it is nobody else's loss. On several GPUs nothing but the attempt can tell: processes that share
memory or talk through NCCL may fail, hang, or come back with other numbers.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from swapserve.config.check import check_ownership, config_files
from swapserve.config.load import load
from swapserve.config.probes import Probe, add_probe, launch_hash, probes_path
from swapserve.config.schema import Config, ModelConfig
from swapserve.config.scratch import scratch_config
from swapserve.engines.base import Adapter, Canary
from swapserve.engines.registry import adapter_for
from swapserve.errors import (
    CanaryFailed,
    CudaError,
    EngineError,
    InvalidRequest,
    KeeperError,
    KeeperUnavailable,
    StartFailed,
    SwapServeError,
)
from swapserve.ids import EngineName
from swapserve.keeper.client import KeeperClient, ensure
from swapserve.keeper.protocol import Exited
from swapserve.system import gpu
from swapserve.system.process import ProcessRef, ended

CYCLES = 3
"""Times that state is moved away and back: some failures need a second one."""
END_TIMEOUT_S = 60.0
"""How long the keeper may take to end after it was told to."""
_POLL_S = 0.1
_LOG_LINES = 20


async def probe(config: Config, name: str) -> Probe:
    """Start an engine, move its GPU state away and back, compare its answers; keep the result.

    Args:
        config: with the engine; may be one that is refused for the lack of a probe.
        name: of the engine.

    Raises:
        InvalidRequest: there is no such engine, it is on no GPU, or is not ours to start.
        ConfigError: others could change the configuration.
        KeeperError: no driver, no keeper, or one that serves this configuration.
        StartFailed: the engine does not start, so nothing was shown.
        DeviceBusy: something else uses its GPUs, so nothing was shown.

    Cancellation: the engine is ended and its keeper, too, before the cancellation goes on.
    """
    model = config.models.get(EngineName(name))
    if model is None or not model.gpus or model.attach:
        asked = "an engine on GPUs that SwapServe may start"
        raise InvalidRequest(f"'{name}' is not {asked}; configured: {', '.join(config.models)}.")
    check_ownership(*config_files(config))
    await _nobody_serves(config)
    seen = await asyncio.to_thread(gpu.look)
    if seen.driver is None:
        raise KeeperError(f"nothing can be shown without a driver: {seen.unavailable}")
    shown = Probe(
        driver=seen.driver,
        recipe=model.recipe.name,
        gpus=len(model.gpus),
        argv=launch_hash(model),
        works=False,
    )
    works, found = await _attempt(config, model, shown)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    result = replace(shown, works=works, found=found, at=now)
    add_probe(probes_path(config.paths.state_dir), result)
    return result


async def _nobody_serves(config: Config) -> None:
    """Raise KeeperError if a keeper runs: its engines are on the same GPUs."""
    client = KeeperClient(config, _ignore)
    try:
        await client.connect()
    except KeeperUnavailable:
        return
    client.close()
    raise KeeperError("the daemon of this configuration runs, and with it engines; stop it first")


def _ignore(_exited: Exited) -> None:
    """Take no notice: the next call tells."""


async def _attempt(config: Config, model: ModelConfig, shown: Probe) -> tuple[bool, str]:
    """Return whether it works, and what was seen."""
    directory = Path(tempfile.mkdtemp(prefix="swapserve-probe-"))
    in_use = False
    try:
        file = scratch_config(config, model, directory)
        copy = load(file, check_binaries=False)
        # For its own keeper it is presumed to work: that is what is tried.
        argv = launch_hash(copy.models[model.name])
        presumed = replace(shown, argv=argv, works=True)
        add_probe(probes_path(copy.paths.state_dir), presumed)
        async with _keeper(load(file)) as keeper:
            return await _cycles(keeper, copy.models[model.name])
    except _KeeperStays as error:
        in_use = True
        raise KeeperError(f"{error}; what it has left is in {directory}") from error
    finally:
        if not in_use:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


class _KeeperStays(Exception):
    """The keeper of a probe does not end."""


@asynccontextmanager
async def _keeper(config: Config) -> AsyncIterator[KeeperClient]:
    """Run a keeper; in the end it and its engines are gone."""
    await ensure(config)
    client = KeeperClient(config, _ignore)
    await client.connect()

    async def listen() -> None:
        with contextlib.suppress(KeeperUnavailable):
            await client.run()

    failure: Exception | None = None
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(listen())
        try:
            await client.hello()
            pidfd = ProcessRef.of(client.pid).open()
            try:
                yield client
            finally:
                try:
                    await _end(client, pidfd)
                finally:
                    os.close(pidfd)
        except (SwapServeError, OSError, _KeeperStays) as error:
            failure = error  # the group would wrap it
        finally:
            client.close()
    if failure is not None:
        raise failure


async def _end(client: KeeperClient, pidfd: int) -> None:
    with contextlib.suppress(KeeperUnavailable):
        await client.shutdown()
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await ended(pidfd)
    except TimeoutError:
        raise _KeeperStays(f"the keeper of the probe (pid {client.pid}) does not end") from None


async def _cycles(keeper: KeeperClient, model: ModelConfig) -> tuple[bool, str]:
    """Return whether it works, and what was seen."""
    adapter = adapter_for(model)
    await keeper.spawn(model.name)
    address = await _serving(keeper, adapter, model)
    first = await adapter.warm_up(address)
    if first is None:
        raise StartFailed(model.name, "it generates no text that could be compared")
    seconds = []
    for _ in range(CYCLES):
        try:
            seconds.append(await _cycle(keeper, adapter, model, address, first))
        except (CudaError, CanaryFailed, EngineError) as error:
            return False, str(error).splitlines()[0]
    moved = ", ".join(f"{out:.1f} + {back:.1f} s" for out, back in seconds)
    return True, f"the same answer {CYCLES} times after its state was away (out + in: {moved})"


async def _cycle(
    keeper: KeeperClient, adapter: Adapter, model: ModelConfig, address: str, first: Canary
) -> tuple[float, float]:
    began = time.monotonic()
    await keeper.suspend(model.name)
    away = time.monotonic()
    await keeper.resume(model.name)
    back = time.monotonic()
    now = await adapter.warm_up(address)
    if now is None:
        raise EngineError(model.name, f"'{model.name}' generates no text any more")
    first.check(model.name, now)
    return away - began, back - away


async def _serving(keeper: KeeperClient, adapter: Adapter, model: ModelConfig) -> str:
    """Wait until the engine is healthy; return its address."""
    limit = model.start_timeout_s or model.recipe.start_timeout_s
    try:
        async with asyncio.timeout(limit):
            while True:
                holding = await keeper.holding(model.name)
                if holding.pid is None:
                    break
                if holding.address is not None and await adapter.healthy(holding.address):
                    return holding.address
                await asyncio.sleep(_POLL_S)
        reason = "it ended"
    except TimeoutError:
        reason = f"it was not healthy within {limit:g} s"
    raise StartFailed(model.name, reason, await keeper.log_tail(model.name, _LOG_LINES))
