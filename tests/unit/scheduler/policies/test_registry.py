"""The named policies: all there, each once, each what the document says."""

import re
from pathlib import Path

import pytest

from swapserve.config import schema
from swapserve.scheduler.plugins import load_policy
from swapserve.scheduler.policies.registry import DEFAULT, POLICIES

DOCUMENT = Path(__file__).parents[4] / "docs" / "policies.md"


def test_the_policies_are_these() -> None:
    assert list(POLICIES) == [
        "adaptive",
        "lru",
        "lfu",
        "lru-drain",
        "fifo-drain",
        "time-slice-drain",
        "static",
    ]
    assert DEFAULT == "adaptive"


def test_the_configuration_knows_the_same() -> None:
    assert set(schema.POLICIES) == set(POLICIES)
    assert schema.SchedulingConfig().policy == DEFAULT


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_loaded_by_its_name_and_each_time_anew(name: str) -> None:
    policy = load_policy(name)
    assert policy.name == name
    assert type(policy) is POLICIES[name]
    assert load_policy(name) is not policy


def test_only_static_swaps_nobody_out() -> None:
    assert [name for name, kind in POLICIES.items() if not kind.swaps] == ["static"]


def test_the_document_lists_the_policies_and_which_of_them_bound_the_wait() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|.*\| (\S+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    bounds = {name: "`max_wait`" if kind.bounded else "none" for name, kind in POLICIES.items()}
    assert dict(rows) == bounds
