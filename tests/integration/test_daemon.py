"""The whole daemon with its keeper, CRIU and real llama-servers: requests that need a swap."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.daemon import Daemon, needs_criu, pair, site
from tests.support.leaks import wait_for
from tests.support.oracle import (
    Answer,
    assert_same_tokens,
    assert_swapped_in_mid_stream,
    completion,
    stream,
)

pytestmark = [*needs_criu, pytest.mark.anyio]
LONG = 1200
SHORT = 8


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with site(tmp_path_factory.mktemp("pair"), pair(size="small")) as here:
        yield here.start()


def ask(daemon: Daemon, model: str, tokens: int = SHORT, **extra: Any) -> httpx.Response:
    return httpx.post(daemon.completions, json=completion(model, tokens, **extra), timeout=120)


def settle(daemon: Daemon, resident: str = "a") -> None:
    """Begin with both engines known, one of them in, nothing in flight."""
    for model in ("b", "a"):
        if daemon.engine(model).state == "stopped":
            daemon.command("start", model)
    if daemon.engine(resident).state != "ready":
        daemon.command("swap-in", resident)
    wait_for(
        "nothing in flight",
        lambda: all(e.active + e.waiting + e.suspended == 0 for e in daemon.status().engines),
        detail=daemon.status,
    )


async def test_a_request_for_an_engine_that_is_out_swaps_the_other_one_out(daemon: Daemon) -> None:
    settle(daemon, "a")
    answer = ask(daemon, "b")
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == SHORT
    assert daemon.engine("b").state == "ready"
    assert daemon.engine("a").state == "swapped_out"
    assert daemon.engine("a").pid is None
    device = daemon.status().devices[0]
    assert device.committed_bytes + device.reserved_bytes <= device.capacity_bytes


async def test_a_stream_preempted_in_the_middle_goes_on_with_the_very_same_tokens(
    daemon: Daemon,
) -> None:
    settle(daemon, "a")
    other_due = asyncio.Event()

    def watch(answer: Answer) -> None:
        if len(answer.pieces) == 100:
            other_due.set()

    async with daemon.http() as http:
        expected = await stream(http, daemon.completions, completion("a", LONG))
        assert len(expected.pieces) == LONG
        old_pid = daemon.pid("a")
        async with asyncio.TaskGroup() as tasks:
            body = completion("a", LONG)
            long = tasks.create_task(stream(http, daemon.completions, body, on_piece=watch))
            await other_due.wait()
            other = await stream(http, daemon.completions, completion("b", SHORT))
        answer = long.result()
    assert_same_tokens(answer, expected)
    assert_swapped_in_mid_stream(answer, away_s=daemon.away_s("a"))
    assert len(other.pieces) == SHORT
    assert daemon.pid("a") != old_pid
    assert [move.mechanism for move in daemon.swaps("a")[-2:]] == ["live", "live"]
    assert not daemon.engine("a").suspended


async def test_many_waiters_for_one_engine_cause_one_swap(daemon: Daemon) -> None:
    settle(daemon, "a")
    before = len(daemon.swaps())
    async with daemon.http() as http, asyncio.TaskGroup() as tasks:
        waiting = [
            tasks.create_task(stream(http, daemon.completions, completion("b", SHORT)))
            for _ in range(20)
        ]
    texts = {task.result().text for task in waiting}
    assert all(task.result().done for task in waiting)
    assert len(texts) == 1
    assert [move.kind for move in daemon.swaps()[before:]] == ["swap_out", "swap_in"]
