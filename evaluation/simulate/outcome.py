"""What a simulated run leaves behind: a record of each request, and what the machine did."""

from dataclasses import dataclass

from evaluation.simulate.workload import Workload

UNSET = -1.0


class Records:
    """What happened to each request, in columns; times in seconds from the beginning.

    `UNSET` where something never happened.
    """

    __slots__ = (
        "arrived", "ended", "first_at", "granted", "parts", "refused", "spell_s", "spells",
        "suspended_s",
    )  # fmt: skip

    def __init__(self, count: int) -> None:
        self.arrived = [UNSET] * count
        self.granted = [UNSET] * count
        self.first_at = [UNSET] * count
        """When it got its first token."""
        self.ended = [UNSET] * count
        """When it got its last one."""
        self.spells = [0] * count
        """How often it was suspended."""
        self.suspended_s = [0.0] * count
        self.spell_s = [0.0] * count
        """The longest of these times."""
        self.parts = bytearray(count)
        """Bits of where a suspension fell: 1 before the first token, 2 after it."""
        self.refused: dict[int, str] = {}
        """Which were refused or lost, and the name of the error."""


@dataclass(slots=True, kw_only=True)
class Activity:
    """What GPUs and engines did."""

    gpus: int
    seconds: float = 0.0
    """From the first arrival to the end of the last request."""
    serving_s: float = 0.0
    """Over all GPUs: time in which something was computed for a request."""
    moving_s: float = 0.0
    """Over all GPUs: time in which an engine was on its way there or back."""
    swaps_in: int = 0
    cold_starts: int = 0
    swaps_out: int = 0
    caches_dropped: int = 0
    """Of the ways out, those that left a cache behind."""
    lowered: int = 0
    """Moves from host memory on to disk."""
    raised: int = 0
    """Moves from disk to host memory ahead of demand."""
    drains: int = 0
    preemptions: int = 0
    """Requests suspended."""
    tokens_preempted: int = 0
    """Tokens of their answers that they had got by then."""
    prompt_tokens: int = 0
    """Tokens of prompts that were computed."""
    events: int = 0
    """What the core was told."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One simulated run."""

    workload: Workload
    policy: str
    records: Records
    activity: Activity
    alone_s: list[float]
    """What each request takes by itself on an engine that is there."""
    covered: tuple[int, int] = (0, 0)
    """Requests that took no longer than the P90 predicted at their grant, of how many."""
    cpu_s: float = 0.0
    """How long the simulation itself took, in CPU time."""
    core_s: float = 0.0
    """Of that, within the scheduler's core (only if it was asked for)."""

    def ttft_s(self, request: int) -> float | None:
        """Return the time from its arrival to the first token; None: it never got one."""
        first = self.records.first_at[request]
        return None if first == UNSET else first - self.records.arrived[request]

    def e2e_s(self, request: int) -> float | None:
        """Return the time from its arrival to the last token; None: it never got it."""
        ended = self.records.ended[request]
        return None if ended == UNSET else ended - self.records.arrived[request]
