"""Without root: no CRIU and no sandbox, so a swap is an end and a cold start."""

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from swapserve.errors import KeeperError
from swapserve.testing.engine import expected_tokens
from tests.support.daemon import Model, Site, site
from tests.support.keeper import A, caller, ended, start_keeper, text_of
from tests.support.oracle import PROMPT, completion, stream

NOBODY = 65534
ROOT = os.geteuid() == 0


def python() -> list[str] | None:
    """Return how an account without rights runs this project here; None if it cannot."""
    if not ROOT:
        return [sys.executable]
    if shutil.which("setpriv") is None:
        return None
    account = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    packages = ":".join(path for path in sys.path if path)
    account += ["env", f"PYTHONPATH={packages}", "PYTHONDONTWRITEBYTECODE=1", "HOME=/nonexistent"]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for program in (sys.executable, shutil.which(version, path="/usr/local/bin:/usr/bin")):
        works = "import os, sys, swapserve.daemon; os.stat(sys.executable)"
        if program and ended(*account, program, "-c", works).returncode == 0:
            return [*account, program]
    return None


PYTHON = python()
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(PYTHON is None, reason="no account without rights can run this here"),
]


def fake(name: str) -> Model:
    argv = ("-m", "swapserve.testing.engine", "--host", "{host}", "--port", "{port}")
    return {
        "name": name,
        "recipe": "generic",
        "params": {"binary": PYTHON[-1] if PYTHON else ""},
        "args": [*argv, "--name", "{name}", "--delay-per-token", "0.005"],
        "memory": "400MiB",
        "stop_grace": "1s",
    }


@pytest.fixture
def here() -> Iterator[Site]:
    """A site that an account without rights can write (pytest's own directories are private)."""
    assert PYTHON is not None
    with tempfile.TemporaryDirectory(prefix="swapserve-test-") as directory:
        inner = Path(directory) / "site"
        inner.mkdir()
        if ROOT:
            Path(directory).chmod(0o755)
            os.chown(inner, NOBODY, NOBODY)
        quick = {"quantum": "100ms", "max_wait": "200ms"}
        models = [fake("a"), fake("b")]
        with site(inner, models, python=PYTHON, scheduling=quick) as made:
            yield made


async def test_a_swap_is_an_end_and_a_cold_start(here: Site) -> None:
    daemon = here.start()
    assert daemon.status().profile == "unprivileged"
    async with daemon.http() as http:
        for name in ("a", "b", "a"):
            answer = await stream(http, daemon.completions, completion(name, 10))
            assert answer.pieces == expected_tokens(PROMPT, None, 10)
    assert [move.mechanism for move in daemon.swaps("a")] == ["cold", "kill", "cold"]
    assert daemon.engine("b").state in {"swapped_out", "stopped"}
    assert daemon.engine("b").tier == "none"


async def test_a_busy_engine_is_waited_for_because_it_cannot_be_preempted(here: Site) -> None:
    daemon = here.start()
    async with daemon.http() as http, asyncio.TaskGroup() as tasks:
        begun = asyncio.Event()
        body = completion("a", 300)
        long = tasks.create_task(
            stream(http, daemon.completions, body, on_piece=lambda _: begun.set())
        )
        await begun.wait()
        other = await stream(http, daemon.completions, completion("b", 10))
        assert long.done(), "the other came in only when this one was through"
    assert long.result().pieces == expected_tokens(PROMPT, None, 300)
    assert other.pieces == expected_tokens(PROMPT, None, 10)


async def test_an_engine_cannot_be_dumped_and_ends_when_it_is_told(here: Site) -> None:
    start_keeper(here)
    async with caller(here) as keeper:
        address = await keeper.started(A)
        text = await text_of(address)
        pid = await keeper.pid_of(A)
        owner = NOBODY if ROOT else os.geteuid()
        assert Path(f"/proc/{pid}").stat().st_uid == owner
        with pytest.raises(KeeperError, match="has no sandbox"):
            await keeper.dump(A, "golden")
        with pytest.raises(KeeperError, match="runs on no GPU"):
            await keeper.suspend(A)
        assert await text_of(address) == text
        await keeper.stop(A, 5.0)
        assert not Path(f"/proc/{pid}").exists()


async def test_another_program_on_its_port_does_not_pass_for_the_engine(here: Site) -> None:
    daemon = here.start()
    before = daemon.engine("a").address
    assert before is not None
    with socket.create_server(("127.0.0.1", int(before.rpartition(":")[2]))):
        async with daemon.http() as http:
            answer = await stream(http, daemon.completions, completion("a", 10))
    assert answer.pieces == expected_tokens(PROMPT, None, 10)
    assert daemon.engine("a").address != before
