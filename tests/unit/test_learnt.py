"""What the scheduler has learnt outlives the daemon."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from swapserve.events import Bus, Notice, SwapEnded
from swapserve.ids import EngineName
from swapserve.learnt import Learnt
from swapserve.states import Tier
from tests.support.admin_server import LAST_SWAP
from tests.support.front_door import until

pytestmark = pytest.mark.anyio
ENGINE = EngineName("a")
SWAP = SwapEnded(at=0.0, engine=ENGINE, summary=LAST_SWAP)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def opened(path: Path) -> Learnt:
    learnt = Learnt(path)
    learnt.open()
    return learnt


def test_costs_of_swaps_are_known_to_the_next_daemon(tmp_path: Path) -> None:
    path = tmp_path / "daemon" / "knowledge.json"
    learnt = opened(path)
    learnt.knowledge.costs.left(ENGINE, Tier.HOST, 3.25, busy=False)
    learnt.save()
    assert opened(path).knowledge.costs.out_s(ENGINE, Tier.HOST, busy=False) == 3.25


def test_time_passes_while_no_daemon_runs(tmp_path: Path) -> None:
    path = tmp_path / "knowledge.json"
    learnt = opened(path)
    now = time.monotonic()
    for ago in (30.0, 20.0, 10.0):
        learnt.knowledge.arrivals.arrived(ENGINE, now - ago)
    learnt.save()
    at_once = opened(path).knowledge.arrivals.rate(ENGINE, now)
    stored = json.loads(path.read_text())
    stored["saved_at"] -= 3600.0
    path.write_text(json.dumps(stored))
    later = opened(path).knowledge.arrivals.rate(ENGINE, now)
    assert at_once == pytest.approx(2 / 30, rel=0.1)
    assert later == pytest.approx(2 / 3630, rel=0.1)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"saved_at": "x", "knowledge": 3}',
        '{"saved_at": 1e999, "knowledge": {"version": 1, "costs": [], "service": {"engines": 1}}}',
        '{"saved_at": ' + "9" * 400 + ', "knowledge": {}}',
        '{"saved_at": NaN, "knowledge": {"version": true}}',
        '{"saved_at": -5, "knowledge": {"version": 99}}',
    ],
)
def test_whatever_is_there_the_daemon_starts(tmp_path: Path, content: str) -> None:
    path = tmp_path / "knowledge.json"
    path.write_text(content)
    learnt = opened(path)
    assert learnt.knowledge.costs.in_s(ENGINE, Tier.NONE, busy=False) > 0
    learnt.save()
    assert opened(path).knowledge.arrivals.rate(ENGINE, 0.0) == 0.0


async def test_it_is_saved_after_a_swap_and_then_only_now_and_then(tmp_path: Path) -> None:
    path = tmp_path / "knowledge.json"
    learnt, bus = Learnt(path, every_s=3600.0), Bus()
    bus.listen(learnt.note)
    bus.publish(Notice(at=0.0, engine=None, message="nothing to do with it"))
    await asyncio.sleep(0.05)
    assert not path.exists()
    bus.publish(SWAP)
    await until("it was saved", path.exists)
    path.unlink()
    bus.publish(SWAP)
    await asyncio.sleep(0.05)
    assert not path.exists()  # an hour is not over
    learnt.save()  # the daemon's end
    assert path.exists()


async def test_a_swap_soon_after_a_save_is_saved_later(tmp_path: Path) -> None:
    path = tmp_path / "knowledge.json"
    learnt = Learnt(path, every_s=0.05)
    learnt.save()
    path.unlink()
    learnt.note(SWAP)
    await until("it was saved again", path.exists)


async def test_a_directory_that_is_gone_costs_nothing_but_the_memory(tmp_path: Path) -> None:
    learnt = Learnt(tmp_path / "gone" / "knowledge.json")
    learnt.note(SWAP)
    learnt.save()
    assert not (tmp_path / "gone").exists()
