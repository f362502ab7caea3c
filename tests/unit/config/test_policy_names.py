"""The configuration knows the names of policies without loading one."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from swapserve.config import check
from swapserve.config.load import load
from swapserve.config.schema import POLICIES, SchedulingConfig
from swapserve.scheduler.plugins import GROUP
from swapserve.scheduler.policies import registry
from tests.unit.config.conftest import Fail, Load, Write


def test_the_names_are_those_of_the_scheduler() -> None:
    assert sorted(registry.POLICIES) == sorted(POLICIES)
    assert SchedulingConfig().policy == registry.DEFAULT
    assert check.PLUGINS == GROUP


def test_each_of_ours_is_accepted(load_text: Load) -> None:
    for name in POLICIES:
        assert load_text(f"scheduling: {{policy: {name}}}").scheduling.policy == name


def test_a_plugin_s_name_is_accepted_without_loading_it(
    load_text: Load, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint(name="their-own", value="no.such.module:Policy", group=GROUP)
    monkeypatch.setattr(
        check, "entry_points", lambda group: EntryPoints([point]).select(group=group)
    )
    assert load_text("scheduling: {policy: their-own}").scheduling.policy == "their-own"
    (problem,) = fail("scheduling: {policy: thier-own}")
    assert "did you mean 'their-own'?" in problem.expected


def test_who_does_not_run_it_need_not_have_the_plugin(write: Write) -> None:
    path = write("scheduling: {policy: elsewhere}")
    assert load(path, check_binaries=False).scheduling.policy == "elsewhere"
