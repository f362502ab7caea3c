"""Policies of other packages: found by name, checked when loaded, and never the daemon's end."""

import logging
import re
import sys

import pytest

from swapserve.errors import ConfigError
from swapserve.scheduler.plugins import load_policy
from swapserve.states import LeaseState
from tests.stateful.world import World, engine
from tests.unit.scheduler.policies.conftest import Install

GOOD = '''
from swapserve.scheduler.policies.base import NEVER, Leave


class Mine:
    """Busy engines are never asked; of the idle ones the last configured leaves."""

    name = "mine"
    swaps = True
    bounded = False

    def urgency(self, view, wish):
        return ()

    def leave(self, view, victim, wish):
        return Leave(0.0 if victim.idle else NEVER, NEVER, (-victim.index,))
'''


def wrong(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_policy(name, path="swapserve.yaml", line=7)
    assert len(caught.value.problems) == 1
    text = str(caught.value)
    assert text.startswith("swapserve.yaml:7: scheduling.policy: found ")
    return text


def resident(world: World, name: str) -> None:
    lease = world.request(name)
    world.settle()
    world.end(lease)


# ------------------------------------------------------------------- found


def test_a_policy_of_another_package_decides(install: Install) -> None:
    install("good", GOOD, {"mine": "good:Mine"})
    policy = load_policy("mine")
    assert (policy.name, policy.swaps, policy.bounded) == ("mine", True, False)
    world = World(engine("a", 4), engine("b", 4), engine("c", 4), policy=policy)
    resident(world, "a")
    resident(world, "b")
    world.request("c")
    assert world.transitions()[-1] == "out b", "least recent use would have chosen a"


def test_a_policy_that_nobody_has_is_named_with_its_neighbours_and_where_to_look() -> None:
    text = wrong("fifo-drian")
    assert "found 'fifo-drian'" in text
    assert "one of adaptive, lru, " in text
    assert "did you mean 'fifo-drain'" in text
    assert "'swapserve.policies'" in text
    assert sys.prefix in text


def test_policies_of_other_packages_are_neighbours_too(install: Install) -> None:
    install("good", GOOD, {"quickest-first": "good:Mine"})
    assert "did you mean 'quickest-first'" in wrong("quickst-first")


def test_our_own_policies_cannot_be_taken_over(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("greedy", GOOD, {"lru": "greedy:Mine"})
    assert type(load_policy("lru")).__module__ == "swapserve.scheduler.policies.recency"
    assert "event=policy_not_used policy=lru" in caplog.text
    assert "the-greedy 1.5" in caplog.text


# ------------------------------------------------------------------- wrong


@pytest.mark.parametrize(
    ("text", "target", "said"),
    [
        ("import nothing_of_that_name", "bad:Mine", "ModuleNotFoundError.*nothing_of_that_name"),
        ("class Mine(: pass", "bad:Mine", "SyntaxError"),
        (GOOD, "bad:Yours", "AttributeError.*Yours"),
        (GOOD.replace("name =", "def __init__(self, x): ...\n    name ="), "bad:Mine", "TypeError"),
        (GOOD.replace('"mine"', '"yours"'), "bad:Mine", "with the name 'yours'"),
        (GOOD.replace("bounded", "bound"), "bad:Mine", "with no boolean 'bounded'"),
        (GOOD.replace("swaps = True", "swaps = 1"), "bad:Mine", "with no boolean 'swaps'"),
        (GOOD.replace("urgency", "order"), "bad:Mine", r"no method 'urgency\(view, wish\)'"),
        (GOOD.replace("victim, ", ""), "bad:Mine", r"no method 'leave\(view, victim, wish\)'"),
        ("def mine(): return None", "bad:mine", "with the name None, no boolean 'swaps', no"),
    ],
)
def test_a_policy_that_cannot_be_used_is_named_with_its_package(
    install: Install, text: str, target: str, said: str
) -> None:
    install("bad", text, {"mine": target})
    message = wrong("mine")
    assert re.search(f"found 'mine' in the package the-bad 1.5 .{target}.*{said}", message), message


def test_a_name_that_two_packages_offer_is_nobody_s(install: Install) -> None:
    install("one", GOOD, {"mine": "one:Mine"})
    install("two", GOOD, {"mine": "two:Mine"})
    message = wrong("mine")
    assert "the-one 1.5" in message
    assert "the-two 1.5" in message


# ------------------------------------------------------------------ failing


@pytest.mark.parametrize(
    "answer",
    [
        "raise ZeroDivisionError",
        "return None",
        "return Leave(None, NEVER, ())",
        "return Leave(float('nan'), NEVER, ())",
        "return Leave(0.0, NEVER, (float('nan'),))",
        "return Leave(0.0, NEVER, 1.0)",
        "return Leave(0.0, NEVER, ('first',))",
    ],
)
def test_where_a_policy_fails_to_say_who_leaves_lru_says_so(
    install: Install, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    install(
        "failing",
        GOOD.replace("return Leave(0.0 if", f"{answer}\n        return Leave(0.0 if"),
        {"mine": "failing:Mine"},
    )
    world = World(engine("a", 4), engine("b", 4), engine("c", 4), policy=load_policy("mine"))
    resident(world, "a")
    resident(world, "b")
    lease = world.request("c")
    assert world.transitions()[-1] == "out a"
    world.settle()
    assert world.state(lease) is LeaseState.ACTIVE
    world.request("a")
    world.advance(10.0)  # nobody but b has to leave, and c is idle by nobody's measure
    assert world.transitions()[-1] == "out b"
    failures = [one for one in caplog.records if "event=policy_failed" in one.getMessage()]
    assert len(failures) == 1, "said once, not for each question"
    assert failures[0].levelno == logging.ERROR
    assert failures[0].exc_info is not None
    message = failures[0].getMessage()
    assert "policy=mine origin='the package the-failing 1.5 (failing:Mine)'" in message
    assert "question=leave instead=lru" in message


@pytest.mark.parametrize("answer", ["raise KeyError(wish)", "return [1.0]", "return 1.0"])
def test_where_a_policy_fails_to_order_wishes_the_oldest_comes_first(
    install: Install, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    install("failing", GOOD.replace("return ()", answer), {"mine": "failing:Mine"})
    world = World(engine("a"), engine("b"), engine("c"), policy=load_policy("mine"))
    busy = world.request("c")
    world.settle()
    world.request("b")
    world.request("a")
    world.advance(500.0)
    assert world.transitions() == ["in c"], "it still says that busy engines stay"
    world.end(busy)
    world.settle()
    assert world.transitions()[-1] == "in b"
    assert caplog.text.count("event=policy_failed") == 1
    assert "question=urgency" in caplog.text
