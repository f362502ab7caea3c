"""The keeper alone, with CRIU and a real llama-server: every verb, every refusal, its own death."""

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from swapserve.errors import (
    CriuError,
    ImageError,
    KeeperError,
    KeeperUnavailable,
    StartFailed,
    SwapServeError,
)
from swapserve.ids import EngineName
from swapserve.keeper.protocol import Held
from tests.support.daemon import Site, llama, needs_criu, site
from tests.support.keeper import (
    A,
    B,
    caller,
    ended,
    keeper_ended,
    script,
    shared,
    start_keeper,
    text_of,
)
from tests.support.leaks import traces, wait_for

pytestmark = [*needs_criu, pytest.mark.anyio]
NOBODY = 65534


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One keeper for the tests that leave it as they found it: no engine running."""
    with site(tmp_path_factory.mktemp("keeper"), [llama("a")]) as here:
        start_keeper(here)
        yield here


async def test_an_engine_goes_through_every_verb_and_answers_the_same_each_time(
    held: Site,
) -> None:
    async with shared(held) as keeper:
        address = await keeper.started(A)
        text = await text_of(address)
        spawned = await keeper.pid_of(A)
        report = await keeper.dump(A, "golden", {"tokens": [], "logprobs": []})
        assert report.bytes > 1 << 20
        assert report.unaccounted_s < 0.1
        assert await keeper.pid_of(A) == spawned
        assert await text_of(address) == text

        pids = {spawned}
        for _ in range(2):
            await keeper.discard(A)
            assert (await keeper.holding(A)).held is Held.NOTHING
            await keeper.restore(A, "golden")
            assert await keeper.healthy(A) == address
            assert await text_of(address) == text
            holding = await keeper.holding(A)
            assert holding.restored_from == "golden"
            assert holding.pid is not None
            pids.add(holding.pid)
        assert len(pids) == 3
        assert keeper.exits == [], "an end that was asked for is no crash"


async def test_a_live_image_is_used_once(held: Site) -> None:
    async with shared(held) as keeper:
        address = await keeper.started(A)
        text = await text_of(address)
        await keeper.dump(A, "live")
        holding = await keeper.holding(A)
        assert (holding.held, holding.pid) == (Held.LIVE_IMAGE, None)
        assert holding.live_image_bytes > 1 << 20
        await keeper.restore(A, "live")
        await keeper.healthy(A)
        assert await text_of(address) == text
        assert (await keeper.holding(A)).live_image_bytes == 0, "a live image is used once"

        assert (await keeper.measure(A)).host_bytes > 1 << 20
        await keeper.stop(A, 5.0)
        assert (await keeper.holding(A)).held is Held.NOTHING
        assert keeper.exits == [], "an end that was asked for is no crash"


async def test_what_cannot_be_done_is_refused_with_its_reason(held: Site) -> None:
    async with shared(held) as keeper:
        for verb in (keeper.suspend, keeper.resume, keeper.discard, keeper.measure):
            with pytest.raises(KeeperError, match="not run"):
                await verb(A)
        with pytest.raises(KeeperError, match="does not run"):
            await keeper.dump(A, "golden")
        with pytest.raises(ImageError, match="no golden image"):
            await keeper.restore(A, "golden")
        with pytest.raises(ImageError, match="no live image"):
            await keeper.restore(A, "live")
        with pytest.raises(KeeperError, match="no engine 'other'"):
            await keeper.spawn(EngineName("other"))
        with pytest.raises(KeeperError, match="unknown verb 'explode'"):
            await keeper._call("explode", 10, engine="a")
        with pytest.raises(KeeperError, match="grace_s"):
            await keeper._call("stop", 10, engine="a")
        for kind in ("../b/golden", "/etc", None, 7):
            with pytest.raises(KeeperError, match="no kind of image"):
                await keeper._call("drop_image", 10, engine="a", kind=kind)
        await keeper.started(A)
        with pytest.raises(KeeperError, match="already runs"):
            await keeper.spawn(A)
        with pytest.raises(KeeperError, match="already runs"):
            await keeper.restore(A, "live")


async def test_a_line_that_is_no_request_ends_that_connection_alone(held: Site) -> None:
    async with shared(held) as keeper:
        for line in (
            b"GET / HTTP/1.1\n",
            b"[]\n",
            b'{"id": 1}\n',
            b'{"id": {}, "verb": "hello"}\n',
        ):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.settimeout(10)
                raw.connect(str(held.socket))
                raw.sendall(line)
                assert raw.recv(100) == b"", line
        with socket.socket(socket.AF_UNIX) as raw:  # longer than any line may be
            raw.settimeout(10)
            raw.connect(str(held.socket))
            with pytest.raises(ConnectionError):
                raw.sendall(b"x" * (64 << 20))
        assert (await keeper.hello())["engines"] == ["a"]


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
async def test_another_account_is_not_let_in(held: Site) -> None:
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(10);"
        's.connect(sys.argv[1]); s.sendall(b\'{"id": 1, "verb": "hello"}\\n\');'
        "sys.stdout.buffer.write(s.recv(1000))"
    )
    # Let it come as far as the socket, so that the peer's credentials decide.
    held.socket.chmod(0o666)
    opened = [held.socket.parent, *held.socket.parents]
    modes = {path: path.stat().st_mode for path in opened}
    for path, mode in modes.items():
        path.chmod(mode | 0o011)
    try:
        said = ended(
            "setpriv", "--reuid", str(NOBODY), "--clear-groups",
            "/usr/bin/env", "python3", "-c", code, str(held.socket),
        )  # fmt: skip
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
        held.socket.chmod(0o600)
    assert said.stdout == "", said
    assert "PermissionError" not in said.stderr, "it did not even reach the socket"
    wait_for("the keeper says why", lambda: "reason=uid" in held.keeper_log.read_text())
    async with shared(held) as keeper:
        assert (await keeper.hello())["pid"] == held.keeper_pid()


async def test_an_engine_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    program = script(
        tmp_path / "engine.sh", "#!/bin/sh\necho no such tensor: blk.7\nsleep 0.1\nexit 3\n"
    )
    model = llama("a", params={"binary": str(program)})
    missing = llama("b", params={"binary": str(program)})
    with site(tmp_path / "site", [model, missing]) as here:
        start_keeper(here)
        async with caller(here) as keeper:
            await keeper.spawn(A)
            wait_for("the program has ended", lambda: "event=exited" in here.keeper_log.read_text())
            assert (await keeper.holding(A)).held is Held.NOTHING
            assert "no such tensor: blk.7" in await keeper.log_tail(A, 5)
            assert [exited.status for exited in keeper.exits] == ["exit 3"]
            program.unlink()
            with pytest.raises(StartFailed, match=r"engine\.sh"):
                await keeper.spawn(B)
            assert (await keeper.holding(B)).held is Held.NOTHING


async def test_a_golden_image_no_longer_fits_when_the_model_file_has_changed(
    tmp_path: Path,
) -> None:
    copy = tmp_path / "model.gguf"
    shutil.copy(llama("a")["model"], copy)
    with site(tmp_path / "site", [llama("a", model=str(copy))]) as here:
        start_keeper(here)
        async with caller(here) as keeper:
            await keeper.started(A)
            await keeper.dump(A, "golden")
            assert (await keeper.holding(A)).golden
            await keeper.discard(A)
            # The same bytes and time as before, but another file: mapped pages would be stale.
            stat = copy.stat()
            content = copy.read_bytes()
            copy.unlink()
            copy.write_bytes(content)
            os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert not (await keeper.holding(A)).golden
            with pytest.raises(ImageError, match="still fits"):
                await keeper.restore(A, "golden")
            assert await text_of(await keeper.started(A))


async def test_a_killed_keeper_leaves_its_engines_to_the_next_one(tmp_path: Path) -> None:
    with site(tmp_path / "site", [llama("a"), llama("b", seed=2)]) as here:
        first = start_keeper(here)
        async with caller(here) as keeper:
            address = await keeper.started(A)
            await keeper.started(B)
            text = await text_of(address)
            await keeper.dump(B, "live")
            pid = await keeper.pid_of(A)
            first.kill()
            first.wait()
        assert await text_of(address) == text, "it serves without a keeper"

        second = start_keeper(here)
        async with caller(here) as keeper:
            holding = await keeper.holding(A)
            assert (holding.pid, holding.address, holding.held) == (pid, address, Held.RUNNING)
            await keeper.dump(A, "live")
            await keeper.restore(A, "live")
            await keeper.healthy(A)
            assert await text_of(address) == text
            await keeper.restore(B, "live")
            await keeper.healthy(B)
            os.kill(await keeper.pid_of(A), signal.SIGKILL)
            wait_for("the exit is seen", lambda: "event=exited" in here.keeper_log.read_text())
        second.terminate()
        assert second.wait(30) == 0
        assert traces(here.directory) == {}


async def test_calls_after_the_keeper_s_end_fail_at_once(tmp_path: Path) -> None:
    with site(tmp_path / "site", [llama("a")]) as here:
        process = start_keeper(here)
        async with caller(here) as keeper:
            await keeper.hello()
            process.kill()
            for _ in range(2):
                with anyio.fail_after(10), pytest.raises(KeeperUnavailable):
                    await keeper.spawn(A)
            process.wait()
        start_keeper(here)  # takes away what the killed one left


async def test_two_keepers_on_a_machine_give_no_address_twice(tmp_path: Path) -> None:
    models = [llama("a"), llama("b", seed=2)]
    with site(tmp_path / "one", models) as one, site(tmp_path / "two", models) as two:
        for here in (one, two):
            start_keeper(here)
        async with caller(one) as first, caller(two) as second:
            found = [
                (await keeper.holding(name)).address
                for keeper in (first, second)
                for name in (A, B)
            ]
            assert len(set(found)) == 4, found
            assert await text_of(await second.started(A)) == await text_of(await first.started(A))


async def test_only_one_keeper_holds_a_directory(held: Site) -> None:
    second = keeper_ended(held)
    assert second.returncode == 1
    assert "another keeper runs" in second.stderr
    async with shared(held) as keeper:
        assert (await keeper.hello())["pid"] == held.keeper_pid()


async def test_an_image_beyond_the_budget_is_refused_and_the_engine_serves_on(
    tmp_path: Path,
) -> None:
    with site(tmp_path / "site", [llama("a")], images={"budget": "1MiB"}) as here:
        start_keeper(here)
        async with caller(here) as keeper:
            address = await keeper.started(A)
            text = await text_of(address)
            for kind in ("golden", "live"):
                with pytest.raises(ImageError, match=r"images\.budget"):
                    await keeper.dump(A, kind)
            assert await text_of(address) == text
            assert not list((here.directory / "images").glob("*/*"))


async def test_a_damaged_image_fails_with_criu_s_own_words_and_leaves_nothing(
    held: Site,
) -> None:
    async with shared(held) as keeper:
        await keeper.started(A)
        await keeper.dump(A, "golden")
        await keeper.discard(A)
        pages = next((held.directory / "images" / "a" / "golden" / "criu").glob("core-*.img"))
        pages.write_bytes(b"nothing of an image")
        with pytest.raises(CriuError) as failed:
            await keeper.restore(A, "golden")
        assert failed.value.phase == "restore"
        assert "Error" in failed.value.log_tail
        assert (await keeper.holding(A)).held is Held.NOTHING
        wait_for("no process is left", lambda: not _engines(held), 10, lambda: _engines(held))
        await keeper.drop_image(A, "golden")
        assert await text_of(await keeper.started(A))


def _engines(here: Site) -> list[str]:
    """Return the processes beside the keeper."""
    return [line for line in traces(here.directory)["processes"] if "keeper.server" not in line]


async def test_verbs_on_one_engine_exclude_each_other(held: Site) -> None:
    async with shared(held) as keeper:
        await keeper.started(A)
        async with anyio.create_task_group() as tasks:
            refused: list[SwapServeError] = []

            async def dump() -> None:
                try:
                    await keeper.dump(A, "golden")
                except SwapServeError as error:
                    refused.append(error)

            tasks.start_soon(dump)
            tasks.start_soon(dump)
        assert [type(error) for error in refused] == [KeeperError]
        assert "while it is in dump" in str(refused[0])
        assert (await keeper.holding(A)).golden


def test_a_configuration_that_others_can_change_is_refused(tmp_path: Path) -> None:
    with site(tmp_path / "site", [llama("a")]) as here:
        here.config.chmod(0o666)
        refused = keeper_ended(here)
        assert refused.returncode == 2
        assert "lets others write" in refused.stderr
