"""Finding the configured policy: one of ours, or one that an installed package offers.

A package offers policies as entry points of the group `swapserve.policies`. What it offers is
code of somebody else's: it is checked when it is loaded, and when it fails to answer a question
`lru` answers in its place, so that nobody's request suffers.
"""

import inspect
import logging
import math
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from sys import prefix
from typing import ClassVar, Literal, cast

from swapserve.config.nodes import near
from swapserve.errors import ConfigError, ConfigProblem
from swapserve.scheduler.demand import Engine
from swapserve.scheduler.policies.base import Leave, Policy, View, Wish
from swapserve.scheduler.policies.recency import Lru
from swapserve.scheduler.policies.registry import POLICIES

GROUP = "swapserve.policies"
KEY = "scheduling.policy"

log = logging.getLogger(__name__)

Question = Literal["urgency", "leave"]


def load_policy(name: str, *, path: str = "configuration", line: int | None = None) -> Policy:
    """Return a new policy of that name. One of ours comes first; nobody can replace it.

    A policy from a package comes wrapped: see `guarded`.

    Args:
        name: as in `scheduling.policy`.
        path: where the name was read, for messages.
        line: line of that file.

    Raises:
        ConfigError: there is none of that name, or several, or it cannot be used. The message
            names the package.
    """
    offered = entry_points(group=GROUP)
    ours, theirs = POLICIES.get(name), [point for point in offered if point.name == name]
    if ours is not None:
        for point in theirs:
            log.warning("event=policy_not_used policy=%s origin=%r", name, _origin(point))
        return ours()
    try:
        return _load(name, theirs, offered.names)
    except _UnusableError as error:
        problem = ConfigProblem(
            path=path, line=line, key=KEY, found=error.found, expected=error.expected
        )
        raise ConfigError([problem]) from error.__cause__


def guarded(policy: Policy, origin: str) -> Policy:
    """Return the policy with a net below it: no exception or nonsense of its gets out.

    The first failure to answer one of the two questions is logged; from then on `lru` answers
    that question. Two orders in turn would be worse than either.

    Args:
        policy: of somebody else's.
        origin: its package, for the log.
    """

    class Guarded(_Guard):
        name: ClassVar[str] = policy.name
        swaps: ClassVar[bool] = policy.swaps
        bounded: ClassVar[bool] = policy.bounded

    return Guarded(policy, origin)


class _UnusableError(Exception):
    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected


def _load(name: str, points: list[EntryPoint], offered: Iterable[str]) -> Policy:
    if not points:
        known = [*POLICIES, *sorted(set(offered) - set(POLICIES))]
        raise _UnusableError(
            repr(name),
            f"one of {', '.join(known)}{near(name, known)} (a policy of your own is an entry"
            f" point of the group '{GROUP}' in a package that is installed in {prefix})",
        )
    if len(points) > 1:
        origins = " and ".join(_origin(point) for point in points)
        raise _UnusableError(f"{name!r} in {origins}", "one package that has it")
    point = points[0]
    origin = _origin(point)
    try:
        policy = point.load()()
    except Exception as error:
        raise _UnusableError(
            f"{name!r} in {origin}, where {type(error).__name__} was raised: {error}",
            f"a class that can be imported as {point.value} and made without arguments",
        ) from error
    wrong = _wrong(name, policy)
    if wrong:
        raise _UnusableError(
            f"{name!r} in {origin}, with {wrong}",
            "the interface of swapserve.scheduler.policies.base.Policy",
        )
    log.info("event=policy_loaded policy=%s origin=%r", name, origin)
    return guarded(cast("Policy", policy), origin)


def _origin(point: EntryPoint) -> str:
    dist = point.dist
    package = "an unnamed package" if dist is None else f"the package {dist.name} {dist.version}"
    return f"{package} ({point.value})"


def _wrong(name: str, policy: object) -> str:
    """Return what the object lacks to be a policy; empty if nothing."""
    problems = []
    if getattr(policy, "name", None) != name:
        problems.append(f"the name {getattr(policy, 'name', None)!r}")
    problems += [
        f"no boolean '{flag}'"
        for flag in ("swaps", "bounded")
        if not isinstance(getattr(policy, flag, None), bool)
    ]
    for question, words in (("urgency", "view, wish"), ("leave", "view, victim, wish")):
        method = getattr(policy, question, None)
        if not callable(method) or not _takes(method, len(words.split())):
            problems.append(f"no method '{question}({words})'")
    return ", ".join(problems)


def _takes(method: object, count: int) -> bool:
    try:
        inspect.signature(method).bind(*range(count))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


class _Guard:
    """A policy of somebody else's, and `lru` below it."""

    def __init__(self, policy: Policy, origin: str) -> None:
        self._policy = policy
        self._origin = origin
        self._instead = Lru()
        self._given_up: set[Question] = set()

    def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
        if "urgency" not in self._given_up:
            try:
                return _figures(self._policy.urgency(view, wish))
            except Exception as error:  # noqa: BLE001 - not our code; it must not end the daemon
                self._give_up("urgency", error)
        return self._instead.urgency(view, wish)

    def leave(self, view: View, victim: Engine, wish: Wish) -> Leave:
        if "leave" not in self._given_up:
            try:
                terms = self._policy.leave(view, victim, wish)
                _figures((terms.at, terms.cut_at))
                _figures(terms.rank)
            except Exception as error:  # noqa: BLE001 - not our code; it must not end the daemon
                self._give_up("leave", error)
            else:
                return terms
        return self._instead.leave(view, victim, wish)

    def _give_up(self, question: Question, error: Exception) -> None:
        self._given_up.add(question)
        log.error(
            "event=policy_failed policy=%s origin=%r question=%s instead=%s",
            self._policy.name,
            self._origin,
            question,
            Lru.name,
            exc_info=error,
        )


def _figures(answer: object) -> tuple[float, ...]:
    """Return the answer if it is a tuple of numbers: anything else cannot be sorted by."""
    if not isinstance(answer, tuple) or any(math.isnan(figure) for figure in answer):
        raise TypeError(f"{answer!r} is not a tuple of numbers")
    return answer
