"""One result file that is true at every moment: parts with budgets, samples, and why not.

The run may be killed at any time, so the file is written anew after each sample. A part that fails
or runs out of time says so in its own section and does not stop the next.
"""

import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

GUARD_S = 5.0
"""How long beyond its budget a part may be stuck in one call before it is interrupted."""
TRACE_LINES = 12


class Impossible(Exception):
    """Something cannot be done on this machine; says why."""


class OutOfTime(Exception):
    """A part's budget is used up."""


class TooLate(OutOfTime):
    """Too little of it is left for one thing; something shorter may still be done."""


class Budget:
    """Seconds that a part has."""

    def __init__(self, seconds: float, *, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._now = now
        self._end = now() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - self._now())

    def allows(self, seconds: float) -> bool:
        """Whether something that takes about so long may still begin."""
        return self.left_s >= seconds

    def need(self, seconds: float, what: str) -> None:
        """Go on only if there is time for it.

        Raises:
            TooLate: there is not.
        """
        if not self.allows(seconds):
            raise TooLate(f"{what} takes about {seconds:.0f} s and {self.left_s:.0f} s are left")

    def share(self, part: float) -> "Budget":
        """Return a budget that is a part of what is left now."""
        return Budget(self.left_s * part, now=self._now)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Interrupt a call that is stuck long after the end. In the main thread only.

        Never around what ends processes: an engine whose end is cut short may take the GPU along.
        """

        def ring(_number: int, _frame: FrameType | None) -> None:
            raise OutOfTime(f"stuck {GUARD_S:g} s beyond its budget of {self.seconds:.0f} s")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self.left_s + GUARD_S))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Sheet:
    """The result file."""

    def __init__(
        self, out: Path | None, head: dict[str, Any], say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.result: dict[str, Any] = {**head, "seconds": 0.0, "parts": {}}
        self.say = say
        self._out = out
        self._begun = time.monotonic()

    def save(self) -> None:
        """Write everything, beside its place first."""
        self.result["seconds"] = round(time.monotonic() - self._begun, 3)
        if self._out is None:
            return
        temporary = self._out.with_name(f".{self._out.name}.tmp")
        temporary.write_text(json.dumps(self.result, indent=1) + "\n")
        temporary.rename(self._out)

    def page(self, name: str) -> "Page":
        """Begin the section of a part."""
        content = {"state": "running", "why": ""}
        self.result["parts"][name] = content
        return Page(self, name, content)


class Page:
    """The section of one part, or one within it."""

    def __init__(self, sheet: Sheet, name: str, content: dict[str, Any]) -> None:
        self.name = name
        self.content = content
        self._sheet = sheet

    def section(self, name: str) -> "Page":
        """Begin a section within this one."""
        content: dict[str, Any] = {}
        self.content[name] = content
        return Page(self._sheet, f"{self.name}: {name}", content)

    def say(self, text: str) -> None:
        """Tell whoever watches."""
        self._sheet.say(f"{self.name}: {text}")

    def note(self, **values: Any) -> None:  # noqa: ANN401 - whatever JSON holds
        """Set values."""
        self.content.update(values)
        self._sheet.save()

    def add(self, kind: str, **values: Any) -> dict[str, Any]:  # noqa: ANN401
        """Append one sample to the list of its kind; later additions to it are saved, too."""
        self.content.setdefault(kind, []).append(values)
        self._sheet.save()
        return values

    def failed(self, what: str, why: str) -> None:
        """Note what did not work."""
        self.say(f"{what}: {why.strip().splitlines()[0] if why.strip() else 'no reason'}")
        self.add("failures", what=what, why=why)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Carry on after a failure of the block, which is noted. Being stuck goes through."""
        try:
            yield
        except (Impossible, TooLate) as error:
            self.failed(what, str(error))
        except OutOfTime:
            raise
        except Exception as error:  # noqa: BLE001 - measuring goes on with what works
            self.failed(what, _told(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the run: its name, its usual share of time, its work."""

    name: str
    seconds: float
    work: Callable[[Page, Budget], None]


def run(sheet: Sheet, parts: Sequence[Part], *, total_s: float) -> None:
    """Do all parts in order; time that one leaves over is there for the later ones."""
    end = time.monotonic() + total_s
    for place, part in enumerate(parts):
        later = sum(other.seconds for other in parts[place + 1 :])
        budget = Budget(max(0.0, end - time.monotonic() - later))
        page = sheet.page(part.name)
        page.note(budget_s=round(budget.seconds, 1))
        begun = time.monotonic()
        try:
            state, why = _done(part, page, budget)
        except BaseException as error:
            page.note(state="interrupted", why=type(error).__name__)
            raise
        page.note(state=state, why=why, seconds=round(time.monotonic() - begun, 3))
        page.say(f"{state}{f' ({why.splitlines()[0]})' if why else ''}")


def _done(part: Part, page: Page, budget: Budget) -> tuple[str, str]:
    try:
        part.work(page, budget)
    except Impossible as error:
        return "impossible", str(error)
    except OutOfTime as error:
        return "out of time", str(error)
    except Exception as error:  # noqa: BLE001 - a part that fails does not stop the others
        return "failed", _told(error)
    return ("with failures" if page.content.get("failures") else "done"), ""


def _told(error: BaseException) -> str:
    trace = "".join(traceback.format_exception(error)).splitlines()[-TRACE_LINES:]
    return f"{type(error).__name__}: {error}\n" + "\n".join(trace)
