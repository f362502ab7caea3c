"""A keeper without a daemon: its verbs called by the daemon's own client."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from swapserve.config.load import load
from swapserve.errors import KeeperUnavailable
from swapserve.ids import EngineName
from swapserve.keeper.client import KeeperClient
from swapserve.keeper.protocol import Exited
from swapserve.system.tools import find_tool
from tests.support.daemon import Site
from tests.support.leaks import tag_of, wait_for
from tests.support.oracle import completion

A = EngineName("a")
B = EngineName("b")


def start_keeper(site: Site, *, hasty: bool = False) -> subprocess.Popen[bytes]:
    """Start a keeper (one that gives up soon what hangs) and wait until it listens."""
    module = "tests.support.hasty_keeper" if hasty else "swapserve.keeper.server"
    argv = ("-m", module, str(site.config))
    process = site.run(*argv, log=site.directory / "keeper.log")

    def listens() -> bool:
        assert process.poll() is None, f"the keeper ended:\n{site.logs()}"
        ready = f"event=keeper_ready pid={process.pid} "
        return ready in site.keeper_log.read_text()

    wait_for("the keeper listens", listens, detail=site.logs)
    return process


class Caller(KeeperClient):
    """The daemon's client, and what it was told of exits."""

    def __init__(self, site: Site) -> None:
        self.exits: list[Exited] = []
        super().__init__(load(site.config, check_binaries=False), self.exits.append)

    async def started(self, engine: EngineName) -> str:
        """Start an engine cold, wait until it is healthy, return its address."""
        await self.spawn(engine)
        return await self.healthy(engine)

    async def healthy(self, engine: EngineName) -> str:
        address = (await self.holding(engine)).address
        assert address is not None
        async with httpx.AsyncClient() as http, asyncio.timeout(120):
            while True:
                with suppress(httpx.TransportError):
                    if (await http.get(f"http://{address}/health")).is_success:
                        return address
                await asyncio.sleep(0.02)

    async def pid_of(self, engine: EngineName) -> int:
        holding = await self.holding(engine)
        assert holding.pid is not None, holding
        return holding.pid


@asynccontextmanager
async def caller(site: Site) -> AsyncIterator[Caller]:
    """Connect to the running keeper."""
    client = Caller(site)
    await client.connect()

    async def listen() -> None:
        with suppress(KeeperUnavailable):
            await client.run()

    async with asyncio.TaskGroup() as tasks:
        listening = tasks.create_task(listen())
        try:
            yield client
        finally:
            listening.cancel()
            client.close()


@asynccontextmanager
async def shared(site: Site) -> AsyncIterator[Caller]:
    """Connect to a keeper that other tests use too: afterwards nothing of `a` is left."""
    async with caller(site) as client:
        try:
            yield client
        finally:
            await client.stop(A, 0.0)
            await client.drop_image(A, "golden")


async def text_of(address: str, model: str = "a", tokens: int = 20, **extra: Any) -> str:
    """Ask an engine directly for greedy text."""
    body = completion(model, tokens, **extra)
    async with httpx.AsyncClient(timeout=60) as http:
        answer = await http.post(f"http://{address}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def ended(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever its status is."""
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, cwd="/")


def keeper_ended(site: Site) -> subprocess.CompletedProcess[str]:
    """Run a keeper that cannot begin to serve."""
    return ended(sys.executable, "-m", "swapserve.keeper.server", str(site.config))


def locks_of(site: Site) -> dict[str, str]:
    """Return CRIU's network locks by the namespace of the site that they are in."""
    nft = str(find_tool("nft"))
    found = {}
    for namespace in Path("/run/netns").glob(f"ss{tag_of(site.directory / 'run')}-*"):
        said = ended("ip", "netns", "exec", namespace.name, nft, "list", "tables")
        assert said.returncode == 0, said
        found[namespace.name] = said.stdout
    return found


def script(path: Path, text: str) -> Path:
    """Write a program."""
    path.write_text(text)
    path.chmod(0o755)
    return path
