"""A CRIU that fails, is killed in the middle or hangs; and the host-wide switch of huge pages."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from swapserve.errors import CriuError
from swapserve.keeper.hugepages import HugePages
from swapserve.system.tools import find_tool
from tests.support.daemon import Daemon, Site, needs_criu, pair, site, until_busy
from tests.support.keeper import A, caller, locks_of, script, start_keeper, text_of
from tests.support.leaks import wait_for
from tests.support.oracle import assert_same_tokens, completion, stream

pytestmark = [*needs_criu, pytest.mark.anyio]
WRAPPER = """#!/bin/bash
# The real CRIU, but for what the file `mode` says of dumps.
real={criu}
mode=$(cat {mode})
if [ "$1" != dump ] || [ "$mode" = whole ]; then exec "$real" "$@"; fi
if [ "$mode" = fails ]; then exit 1; fi
directory=$5
trap '' TERM
"$real" "$@" &
pid=$!
case $mode in
  *-early) until [ -s "$directory/dump.log" ]; do kill -0 $pid || break; done ;;
  *-pages) until [ -s "$directory/pages-1.img" ]; do kill -0 $pid || break; done ;;
esac
case $mode in
  killed-*) kill -KILL $pid; wait $pid 2>/dev/null; kill -KILL $$ ;;
  stuck-*) kill -STOP $pid; wait $pid ;;
esac
"""


class Wrapped:
    """A site whose keeper runs the wrapper."""

    def __init__(self, here: Site, mode: Path) -> None:
        self.site = here
        self._mode = mode

    def mode(self, word: str) -> None:
        self._mode.write_text(word)


@pytest.fixture
def wrapped(tmp_path: Path) -> Iterator[Wrapped]:
    mode = tmp_path / "mode"
    mode.write_text("whole")
    text = WRAPPER.format(criu=find_tool("criu"), mode=mode)
    program = script(tmp_path / "criu", text)
    keeper = {"criu": str(program), "dump_timeout": "3s"}
    with site(tmp_path / "site", pair(), keeper=keeper) as here:
        yield Wrapped(here, mode)


def staged(here: Site) -> list[str]:
    return [str(path) for path in (here.directory / "images").glob("*/.*")]


@pytest.mark.parametrize("kind", ["golden", "live"])
async def test_a_criu_that_refuses_leaves_the_engine_as_it_was(wrapped: Wrapped, kind: str) -> None:
    start_keeper(wrapped.site)
    async with caller(wrapped.site) as keeper:
        address = await keeper.started(A)
        text, pid = await text_of(address), await keeper.pid_of(A)
        wrapped.mode("fails")
        with pytest.raises(CriuError) as failed:
            await keeper.dump(A, "golden" if kind == "golden" else "live")
        assert not failed.value.killed
        assert await keeper.pid_of(A) == pid
        assert await text_of(address) == text
        assert staged(wrapped.site) == []
        wrapped.mode("whole")
        await keeper.dump(A, "live")
        await keeper.restore(A, "live")
        await keeper.healthy(A)
        assert await text_of(address) == text


@pytest.mark.parametrize("mode", ["killed-early", "killed-pages", "stuck-pages"])
async def test_a_criu_that_dies_in_the_middle_leaves_no_lock_and_no_image(
    wrapped: Wrapped, mode: str
) -> None:
    here = wrapped.site
    start_keeper(here)
    async with caller(here) as keeper:
        await keeper.started(A)
        wrapped.mode(mode)
        with pytest.raises(CriuError) as failed:
            await keeper.dump(A, "live")
        assert failed.value.killed
        assert set(locks_of(here).values()) == {""}
        assert staged(here) == []
        assert (await keeper.holding(A)).live_image_bytes == 0


@pytest.mark.parametrize("mode", ["fails", "killed-early", "killed-pages", "stuck-pages"])
async def test_all_are_answered_when_the_swap_out_of_a_busy_engine_fails(
    wrapped: Wrapped, mode: str
) -> None:
    """The stream under the swap ends, whole or with an error, and all later requests are served."""
    daemon = wrapped.site.start()
    async with daemon.http() as http:
        expected = await stream(http, daemon.completions, completion("a", 1500))
        await stream(http, daemon.completions, completion("b", 8))
        await stream(http, daemon.completions, completion("a", 8))
        pid = daemon.pid("a")
        wrapped.mode(mode)
        async with asyncio.TaskGroup() as tasks:
            long = tasks.create_task(stream(http, daemon.completions, completion("a", 1500)))
            await until_busy(daemon, "a")
            other = tasks.create_task(stream(http, daemon.completions, completion("b", 8)))
            await asyncio.to_thread(wait_for, "the swap out failed", lambda: failed(daemon))
            wrapped.mode("whole")
        again = await stream(http, daemon.completions, completion("a", 1500))
    assert other.result().done
    assert other.result().error is None
    if mode == "fails":  # CRIU itself put everything back
        assert_same_tokens(long.result(), expected)
    else:
        assert long.result().done
        assert long.result().error is not None
    assert_same_tokens(again, expected)
    assert daemon.pid("a") != pid
    assert "cold" not in {move.mechanism for move in daemon.swaps("a")[1:]}


def failed(daemon: Daemon) -> bool:
    return any(move.error and move.kind == "swap_out" for move in daemon.swaps("a"))


def test_a_keeper_puts_back_the_huge_pages_that_a_killed_one_left_switched(tmp_path: Path) -> None:
    switch, journal = tmp_path / "enabled", tmp_path / "journal"
    switch.write_text("always [madvise] never\n")
    with HugePages(journal, wanted=True, switch=switch).during_restore():
        assert switch.read_text() == "always"
        left = journal.read_text()
    assert (switch.read_text(), journal.exists()) == ("madvise", False)

    # As a keeper leaves it that is killed while a restore runs.
    journal.write_text(left)
    switch.write_text("[always] madvise never\n")
    HugePages(journal, wanted=False, switch=switch).recover()
    assert (switch.read_text(), journal.exists()) == ("madvise", False)


def test_huge_pages_stay_as_they_are_unless_that_is_wanted_and_needed(tmp_path: Path) -> None:
    switch, journal = tmp_path / "enabled", tmp_path / "journal"
    for text, wanted in (("always [madvise] never", False), ("[always] madvise never", True)):
        switch.write_text(text)
        with HugePages(journal, wanted=wanted, switch=switch).during_restore():
            assert switch.read_text() == text
            assert not journal.exists()
    with HugePages(journal, wanted=True, switch=tmp_path / "none").during_restore():
        assert not journal.exists()


def test_restores_that_overlap_share_the_switch(tmp_path: Path) -> None:
    switch, journal = tmp_path / "enabled", tmp_path / "journal"
    switch.write_text("always [never] madvise")
    pages = HugePages(journal, wanted=True, switch=switch)
    with pages.during_restore():
        with pages.during_restore():
            pass
        assert (switch.read_text(), journal.read_text()) == ("always", "never")
    assert (switch.read_text(), journal.exists()) == ("never", False)
