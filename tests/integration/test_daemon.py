"""The whole daemon with its keeper, CRIU and real llama-servers: requests that need a swap."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.support.daemon import Daemon, generating, in_flight, needs_criu, pair, site, until_busy
from tests.support.leaks import wait_for
from tests.support.oracle import (
    Answer,
    assert_same_tokens,
    assert_swapped_in_mid_stream,
    completion,
    stream,
)

pytestmark = [*needs_criu, pytest.mark.anyio]
LONG = 2500
SHORT = 8


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with site(tmp_path_factory.mktemp("pair"), pair(keep_cache="never")) as here:
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
    assert answer.comments >= 1, "the connection was kept alive while the engine was away"
    assert not daemon.engine("a").suspended


async def test_an_answer_in_one_piece_survives_a_preemption_too(daemon: Daemon) -> None:
    settle(daemon, "a")
    async with daemon.http() as http:
        expected = await stream(http, daemon.completions, completion("a", LONG))
        before = len(daemon.swaps("a"))
        async with asyncio.TaskGroup() as tasks:
            long = tasks.create_task(http.post(daemon.completions, json=completion("a", LONG)))
            await until_busy(daemon, "a")
            await stream(http, daemon.completions, completion("b", SHORT))
        async with long.result() as response:
            assert response.status == 200
            said = await response.json()
    assert said["choices"][0]["text"] == expected.text
    assert said["usage"]["completion_tokens"] == LONG
    assert [move.mechanism for move in daemon.swaps("a")[before:]] == ["live", "live"]


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


async def test_a_client_that_leaves_ends_the_generation(daemon: Daemon) -> None:
    settle(daemon, "a")
    async with daemon.http() as http, asyncio.TaskGroup() as tasks:
        body = completion("a", 8000)
        long = tasks.create_task(stream(http, daemon.completions, body))
        await until_busy(daemon, "a")
        long.cancel()
    wait_for("the engine is idle", lambda: not generating(daemon, "a"), 2)
    wait_for("the lease has ended", lambda: in_flight(daemon, "a") == (0, 0, 0), 5)
    ended = daemon.events("request_ended")[-1]
    assert (ended["outcome"], ended["engine"]) == ("client_left", "a")


async def test_a_client_that_leaves_while_its_engine_is_away_frees_the_engine(
    daemon: Daemon,
) -> None:
    settle(daemon, "a")
    async with daemon.http() as http:
        async with asyncio.TaskGroup() as tasks:
            long = tasks.create_task(stream(http, daemon.completions, completion("a", 8000)))
            await until_busy(daemon, "a")
            other = tasks.create_task(stream(http, daemon.completions, completion("b", 2000)))
            await asyncio.to_thread(
                wait_for, "a is suspended", lambda: in_flight(daemon, "a") == (0, 0, 1)
            )
            long.cancel()
        assert other.result().done
        assert in_flight(daemon, "a") == (0, 0, 0)
        answer = await stream(http, daemon.completions, completion("a", SHORT))
    assert answer.done
    assert len(answer.pieces) == SHORT
    assert not generating(daemon, "a")
    assert daemon.swaps("a")[-1].mechanism == "live"


async def test_two_restores_of_one_golden_image_sample_different_texts(daemon: Daemon) -> None:
    texts, seeded = [], []
    for _ in range(2):
        settle(daemon, "b")
        answer = ask(daemon, "a", 40, temperature=1)
        assert daemon.swaps("a")[-1].mechanism == "golden"
        texts.append(answer.json()["choices"][0]["text"])
        seeded.append(ask(daemon, "a", 40, temperature=1, seed=7).json()["choices"][0]["text"])
    assert texts[0] != texts[1]
    assert seeded[0] == seeded[1]


async def test_the_openai_package_works_against_engines_that_are_out(daemon: Daemon) -> None:
    settle(daemon, "a")
    say: list[ChatCompletionMessageParam] = [{"role": "user", "content": "buku"}]
    with OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(
            model="b", messages=say, max_tokens=SHORT, temperature=0
        )
        assert daemon.engine("b").state == "ready"
        settle(daemon, "a")
        chunks = client.chat.completions.create(
            model="b", messages=say, max_tokens=SHORT, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert whole.choices[0].message.content == "".join(pieces)
        assert {model.id for model in client.models.list()} == {"a", "b"}
        with pytest.raises(NotFoundError, match="Did you mean"):
            client.completions.create(model="aa", prompt="x")


@pytest.mark.parametrize(
    "path",
    [
        *("/slots", "/props", "//slots", "/lora-adapters", "/completion", "http://a/slots"),
        *("/v1/../slots", "/v1/%2e%2e/slots", "/v1/completions/../../slots", "/metrics/../slots"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_engine_s_own_paths_cannot_be_reached(
    daemon: Daemon, path: str, method: str
) -> None:
    settle(daemon, "a")
    body = json.dumps({"model": "a", "prompt": "x"}) if method == "POST" else None
    connection = HTTPConnection(daemon.url.removeprefix("http://"), timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
    assert answer.status in {400, 404, 405}, said
    assert b"is_processing" not in said
