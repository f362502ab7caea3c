"""The whole daemon, ahead of demand: engines come from disk to host memory, and to a free GPU."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from swapserve.status import SwapSummary
from swapserve.testing.cuda_engine import expected_tokens
from tests.support.criu import Restores
from tests.support.daemon import Daemon, needs_criu
from tests.support.gpu_daemon import GpuSite, cuda, gpu_site
from tests.support.leaks import wait_for
from tests.support.oracle import completion, stream

pytestmark = [*needs_criu, pytest.mark.anyio]
SHORT = 8


@dataclass(slots=True)
class Site(GpuSite):
    """A site whose restores do as they are told."""

    restores: Restores


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    """Of both engines there are images, and somebody has asked for both; `b` comes at the start."""
    restores = Restores(tmp_path / "criu")
    directory = tmp_path / "site"
    keeper, scheduling = {"criu": str(restores.program)}, {"look_ahead": True}
    with gpu_site(directory, "a", keeper=keeper, scheduling=scheduling) as site:
        here = Site(site.site, site.gpus, restores)
        content = json.loads(site.site.config.read_text())
        content["models"].append(cuda("b", site.gpus, preload=True))
        site.site.config.write_text(json.dumps(content))
        daemon = here.start()
        for _ in range(3):
            for name in "ab":
                said(daemon, name)
        assert daemon.stop() == 0
        yield here


def said(daemon: Daemon, name: str) -> None:
    """Ask an engine: each byte of its answer went through GPU memory."""
    body = completion(name, SHORT)
    answer = httpx.post(daemon.completions, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["text"]
    assert text == "".join(expected_tokens(body["prompt"], None, SHORT))


def moves(daemon: Daemon, name: str) -> list[tuple[str, str]]:
    return [(move.kind, move.mechanism) for move in daemon.swaps(name)]


def until(daemon: Daemon, what: Callable[[], bool]) -> None:
    wait_for("what is ahead", what, 30, lambda: f"{daemon.status()}\n{daemon.site.logs()}")


def promotion(daemon: Daemon) -> SwapSummary | None:
    """Return the promotion of `a` that is over."""
    return next((move for move in daemon.swaps("a") if move.kind == "promote"), None)


async def test_an_engine_waits_in_host_memory_for_those_who_are_expected_to_ask(
    here: Site,
) -> None:
    daemon = here.start()
    until(daemon, lambda: promotion(daemon) is not None)
    a = daemon.engine("a")
    assert (a.state, a.tier) == ("swapped_out", "host")
    assert a.golden_image
    ram = next(one for one in daemon.status().devices if one.kind == "host")
    assert ram.committed_bytes == a.host_bytes > 0
    assert moves(daemon, "b") == [("swap_in", "golden")]
    assert moves(daemon, "a") == [("promote", "golden")]
    move = promotion(daemon)
    assert move is not None
    assert (move.cause, move.from_tier, move.to_tier) == ("ahead", "disk", "host")
    assert {"restore", "restore.freeze"} <= {*move.phases}
    pid = daemon.pid("a")
    said(daemon, "a")
    assert moves(daemon, "a")[1:] == [("swap_in", "resume")]
    assert daemon.pid("a") == pid
    said(daemon, "b")
    here.check()


def begun(here: Site) -> Daemon:
    """Start a daemon; return it in the middle of bringing `a` to host memory."""
    here.restores.go("waits", "a")
    daemon = here.start()
    until(daemon, here.restores.waiting)
    assert daemon.engine("b").state == "ready", "what is configured comes first"
    return daemon


async def test_a_request_that_comes_in_the_middle_of_it_is_served(here: Site) -> None:
    daemon = begun(here)
    async with daemon.http() as http, asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(stream(http, daemon.completions, completion("a", SHORT)))
        await asyncio.to_thread(until, daemon, lambda: daemon.engine("a").waiting == 1)
        here.restores.go("whole")
    assert asked.result().error is None
    assert asked.result().done
    assert moves(daemon, "a") == [("promote", "golden"), ("swap_in", "resume")]
    here.check()


async def test_where_it_fails_nobody_is_hurt(here: Site) -> None:
    daemon = begun(here)
    here.restores.go("fails")
    until(daemon, lambda: promotion(daemon) is not None)
    a = daemon.engine("a")
    assert (a.state, a.tier) == ("swapped_out", "none"), "its image was of no use"
    assert not a.golden_image
    assert daemon.engine("b").state == "ready"
    ram = next(one for one in daemon.status().devices if one.kind == "host")
    assert ram.committed_bytes + ram.reserved_bytes == 0
    here.restores.go("whole")
    said(daemon, "a")
    assert moves(daemon, "a")[1:] == [("cold_start", "cold")]
    here.check()


async def test_a_daemon_that_is_killed_in_the_middle_of_it_is_succeeded(here: Site) -> None:
    daemon = begun(here)
    daemon.kill()
    here.restores.go("whole")
    daemon = here.start()
    until(daemon, lambda: daemon.engine("a").tier == "host")
    assert daemon.engine("a").state == "swapped_out"
    assert daemon.engine("b").state == "ready"
    said(daemon, "a")
    assert moves(daemon, "a") == [("swap_in", "resume")]
    here.check()


async def test_one_that_dies_in_host_memory_comes_back_from_its_image(here: Site) -> None:
    daemon = here.start()
    until(daemon, lambda: promotion(daemon) is not None)
    os.kill(daemon.pid("a"), signal.SIGKILL)
    daemon.wait_for_state("a", "failed")
    ram = next(one for one in daemon.status().devices if one.kind == "host")
    assert ram.committed_bytes == 0
    said(daemon, "a")
    assert moves(daemon, "a")[-1] == ("swap_in", "golden")
    here.check()
