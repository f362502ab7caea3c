"""The example of docs/policies.md, as it stands there: installed, loaded, and at work."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from swapserve.ids import EngineName
from swapserve.messages import Drain
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.plugins import GROUP, load_policy
from swapserve.states import LeaseState, Tier
from tests.stateful.world import World, engine
from tests.unit.scheduler.policies.conftest import Install

DOCUMENT = Path(__file__).parents[4] / "docs" / "policies.md"
FILE = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def files() -> dict[str, str]:
    return dict(FILE.findall(DOCUMENT.read_text()))


def add_quick_first(install: Install) -> str:
    """Install the example as its project says; return the policy's name."""
    found = files()
    project = tomllib.loads(found["pyproject.toml"])
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["include"] == ["quick_first.py"]
    points = project["project"]["entry-points"][GROUP]
    install("quick_first", found["quick_first.py"], points)
    (name,) = points
    assert isinstance(name, str)
    return name


def quick_first(install: Install) -> World:
    """Return a world of its own: `slow` takes 20 s to come in, `quick` 2 s."""
    name = add_quick_first(install)
    knowledge = Knowledge()
    for engine_name, seconds in (("slow", 20.0), ("quick", 2.0)):
        for _ in range(20):
            knowledge.costs.came(EngineName(engine_name), Tier.NONE, seconds, busy=False)
    return World(
        engine("other"),
        engine("slow"),
        engine("quick"),
        policy=load_policy(name),
        knowledge=knowledge,
        max_wait=30.0,
    )


def test_who_is_brought_in_fastest_comes_first(install: Install) -> None:
    world = quick_first(install)
    lease = world.request("other")
    world.settle()
    world.request("slow")
    world.advance(1.0)
    world.request("quick")
    world.end(lease)
    world.settle()
    assert world.transitions() == ["in other", "out other", "in quick"]


def test_a_busy_engine_drains_after_five_seconds_and_is_cut_off_for_the_over_age(
    install: Install,
) -> None:
    world = quick_first(install)
    lease = world.request("other")
    world.settle()
    world.request("slow")
    world.advance(4.9)
    assert world.of(Drain) == []
    world.advance(0.2)
    assert world.of(Drain) == ["other"]
    world.advance(24.8)
    assert world.state(lease) is LeaseState.ACTIVE
    world.advance(0.2)
    assert world.state(lease) is LeaseState.SUSPENDED
    assert world.transitions() == ["in other", "out other"]


def test_a_trace_is_replayed_against_it(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_quick_first(install)
    (tmp_path / "replay.py").write_text(files()["replay.py"])
    runpy.run_path(str(tmp_path / "replay.py"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["quick-first", "lru", "adaptive"]
    assert all(re.search(r": \d+ swaps, .* \d+\.\d s$", line) for line in lines), lines
