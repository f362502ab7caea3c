"""What happens to engines and requests when something dies, is stopped, or is told to stay."""

import asyncio
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.support.daemon import (
    Daemon,
    in_flight,
    needs_criu,
    pair,
    site,
    until_busy,
)
from tests.support.keeper import ended
from tests.support.leaks import wait_for
from tests.support.oracle import Answer, completion, stream

pytestmark = [*needs_criu, pytest.mark.anyio]
SHORT = 8


def ask(daemon: Daemon, model: str, tokens: int = SHORT, **extra: Any) -> httpx.Response:
    return httpx.post(daemon.completions, json=completion(model, tokens, **extra), timeout=120)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def test_engines_that_fit_together_stay_together(tmp_path: Path) -> None:
    with site(tmp_path, pair(), devices={"host": {"memory": "900MiB"}}) as here:
        daemon = here.start()
        for model in ("a", "b", "a", "b"):
            assert ask(daemon, model).status_code == 200
        assert [engine.state for engine in daemon.status().engines] == ["ready", "ready"]
        assert [move.mechanism for move in daemon.swaps()] == ["cold", "cold"]


async def test_a_client_that_leaves_the_queue_causes_no_swap(tmp_path: Path) -> None:
    patient = {"quantum": "60s", "max_wait": "60s"}
    with site(tmp_path, pair(), scheduling=patient) as here:
        daemon = here.start()
        daemon.command("start", "a")
        async with daemon.http() as http, asyncio.TaskGroup() as tasks:
            long = tasks.create_task(stream(http, daemon.completions, completion("a", 2500)))
            await until_busy(daemon, "a")
            queued = tasks.create_task(stream(http, daemon.completions, completion("b", SHORT)))
            await asyncio.to_thread(
                wait_for, "b has a waiter", lambda: in_flight(daemon, "b") == (0, 1, 0)
            )
            queued.cancel()
            await asyncio.to_thread(
                wait_for, "b has none", lambda: in_flight(daemon, "b") == (0, 0, 0)
            )
        assert long.result().done
        assert text_of(ask(daemon, "a"))
        assert [move.mechanism for move in daemon.swaps()] == ["cold"]


async def test_a_killed_daemon_leaves_its_engines_to_the_next_one(tmp_path: Path) -> None:
    with site(tmp_path, pair()) as here:
        daemon = here.start()
        expected = {name: text_of(ask(daemon, name)) for name in ("b", "a")}
        pid, keeper = daemon.pid("a"), daemon.status().keeper_pid
        async with daemon.http() as http, asyncio.TaskGroup() as tasks:
            long = tasks.create_task(_broken(http, daemon, completion("a", 8000)))
            await until_busy(daemon, "a")
            daemon.kill()
            assert (await long).pieces, "it was in the middle"

        begun = time.monotonic()
        daemon = here.start()
        assert (await asyncio.to_thread(httpx.get, f"{daemon.url}/health")).status_code == 200
        assert text_of(ask(daemon, "a")) == expected["a"]
        assert time.monotonic() - begun < 2
        assert (daemon.pid("a"), daemon.status().keeper_pid) == (pid, keeper)
        assert text_of(ask(daemon, "b")) == expected["b"]
        assert [move.mechanism for move in daemon.swaps("b")] == ["golden"]
        assert "cold" not in {move.mechanism for move in daemon.swaps()}
        assert daemon.engine("a").state == "swapped_out"


async def test_a_daemon_killed_in_mid_swap_loses_no_engine(tmp_path: Path) -> None:
    with site(tmp_path, pair(size="small", keep_cache="always")) as here:
        daemon = here.start()
        expected = {name: text_of(ask(daemon, name)) for name in ("b", "a")}
        for victim in ("swapping_out", "swapping_in"):
            resident = "a" if daemon.engine("a").state == "ready" else "b"
            asked = "b" if resident == "a" else "a"
            watched = resident if victim == "swapping_out" else asked
            with pytest.raises((httpx.HTTPError, ExceptionGroup)):
                await _kill_when(daemon, watched, victim, asked)
            daemon = here.start()
            for name in (asked, resident):
                assert text_of(ask(daemon, name)) == expected[name]
            assert "cold" not in {move.mechanism for move in daemon.swaps()}, daemon.swaps()


async def _kill_when(daemon: Daemon, name: str, state: str, asked: str) -> None:
    """Ask for an engine, and kill the daemon as soon as one is in that state."""
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{daemon.url}/admin/v1/events") as events,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(asyncio.to_thread(ask, daemon, asked))
        async for line in events.content:
            if f'"engine":"{name}"'.encode() in line and f'"new":"{state}"'.encode() in line:
                daemon.kill()
                return


async def _broken(http: aiohttp.ClientSession, daemon: Daemon, body: dict[str, Any]) -> Answer:
    """Return what came of a stream before its connection broke."""
    seen = Answer()

    def keep(answer: Answer) -> None:
        seen.pieces = answer.pieces

    with pytest.raises(aiohttp.ClientError):
        await stream(http, daemon.completions, body, on_piece=keep)
    return seen


async def test_a_crash_in_mid_stream_is_told_and_the_next_request_restores(
    tmp_path: Path,
) -> None:
    with site(tmp_path, pair()) as here:
        daemon = here.start()
        expected = text_of(ask(daemon, "a"))
        pid = daemon.pid("a")

        def crash(answer: Answer) -> None:
            if len(answer.pieces) == 50:
                os.kill(pid, signal.SIGKILL)

        async with daemon.http() as http:
            body = completion("a", 8000)
            answer = await stream(http, daemon.completions, body, on_piece=crash)
        assert len(answer.pieces) >= 50
        assert answer.error is not None
        assert answer.error["code"] in {"engine_crashed", "upstream_error"}
        assert text_of(ask(daemon, "a")) == expected
        assert daemon.swaps("a")[-1].mechanism == "golden"
        assert daemon.pid("a") != pid
        assert daemon.engine("a").error is None


async def test_operators_move_stop_and_pin_engines(tmp_path: Path) -> None:
    with site(tmp_path, pair()) as here:
        daemon = here.start()
        assert daemon.command("start", "a").state == "ready"
        assert daemon.command("swap-out", "a").state == "swapped_out"
        assert daemon.command("swap-in", "a").state == "ready"
        assert daemon.command("pin", "a").pinned
        refused = ask(daemon, "b")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "capacity"
        assert daemon.stop() == 0

        daemon = here.start()
        assert daemon.engine("a").pinned, "a pin outlives the daemon"
        assert not daemon.command("unpin", "a").pinned
        assert ask(daemon, "b").status_code == 200
        stopped = daemon.command("stop", "b")
        assert (stopped.state, stopped.pid) == ("stopped", None)
        refused = ask(daemon, "b")
        assert refused.status_code == 503, refused.text
        assert daemon.command("start", "b").state == "ready"
        assert ask(daemon, "b").status_code == 200


async def test_a_clean_shutdown_lets_nothing_stand_and_keeps_golden_images(tmp_path: Path) -> None:
    with site(tmp_path, pair()) as here:
        daemon = here.start()
        ask(daemon, "a")
        assert daemon.stop() == 0
        wait_for("the keeper has ended", lambda: here.keeper_pid() is None)
        daemon = here.start()
        assert daemon.engine("a").state == "swapped_out"
        assert text_of(ask(daemon, "a"))
        assert [move.mechanism for move in daemon.swaps("a")] == ["golden"]


async def test_a_daemon_told_to_leave_its_engines_does(tmp_path: Path) -> None:
    with site(tmp_path, pair(), server={"on_exit": "leave"}) as here:
        daemon = here.start()
        ask(daemon, "a")
        pid = daemon.pid("a")
        assert daemon.stop() == 0
        daemon = here.start()
        daemon.wait_for_state("a", "ready")
        assert daemon.pid("a") == pid


async def test_a_wrong_configuration_ends_with_the_line_it_is_in(tmp_path: Path) -> None:
    with site(tmp_path, pair()) as here:
        lines = here.config.read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if '"quantum"' in line)
        lines[at] = lines[at].replace("300ms", "soon")
        here.config.write_text("\n".join(lines))
        said = ended(sys.executable, "-m", "swapserve", "--config", str(here.config), "serve")
        assert said.returncode == 2
        assert re.search(rf"swapserve\.yaml:{at + 1}: scheduling\.quantum: found", said.stderr)


async def test_a_second_daemon_of_the_same_directories_is_refused(tmp_path: Path) -> None:
    with site(tmp_path, pair()) as here:
        daemon = here.start()
        second = ended(sys.executable, "-m", "swapserve", "--config", str(here.config), "serve")
        assert second.returncode == 1
        assert f"pid {daemon.process.pid}" in second.stderr
        assert ask(daemon, "a").status_code == 200


async def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with site(tmp_path, pair(), server={"port": port}) as here:
            said = ended(sys.executable, "-m", "swapserve", "--config", str(here.config), "serve")
            assert said.returncode == 1
            assert str(port) in said.stderr
            assert "Traceback" not in said.stderr


@pytest.mark.parametrize("keep", ["always", "never"])
async def test_a_kept_cache_serves_the_next_turn_of_a_chat(tmp_path: Path, keep: str) -> None:
    with site(tmp_path, pair(keep_cache=keep)) as here:
        daemon = here.start()
        first = [{"role": "user", "content": "buku dada " * 40}]
        without = _second_turn(daemon, "a", first)
        first = [{"role": "user", "content": "dada buku " * 40}]
        with_swap = _second_turn(daemon, "a", first, between="b")
        assert daemon.swaps("a")[-1].mechanism == ("live" if keep == "always" else "golden")
        if keep == "always":
            assert with_swap == without > 100
        else:
            assert with_swap < 20 < without


def _second_turn(
    daemon: Daemon, model: str, turns: list[dict[str, str]], between: str | None = None
) -> int:
    """Return how many tokens of a chat's second turn were in the cache."""
    body = {"model": model, "messages": turns, "max_tokens": 60, "temperature": 0}
    said = httpx.post(daemon.chat, json=body, timeout=60).json()
    if between is not None:
        assert ask(daemon, between).status_code == 200
        assert daemon.engine(model).state == "swapped_out"
    answer = said["choices"][0]["message"]["content"]
    more = [{"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]
    said = httpx.post(daemon.chat, json={**body, "messages": turns + more}, timeout=60).json()
    return int(said["usage"]["prompt_tokens_details"]["cached_tokens"])
