"""What is asked of a cluster: requests in columns, and in which order they can come."""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from swapserve.states import Priority

OPEN = -1
"""In `Workload.after`: comes at its time, whatever has been answered."""


@dataclass(slots=True, kw_only=True)
class Workload:
    """Requests by number; all columns have the same length.

    Closed loops are made of stages: a request that comes `after` a stage comes when every request
    of that stage is over, and its `arrival` then counts from there.
    """

    name: str
    arrival: list[float] = field(default_factory=list)
    """Seconds from the beginning, or from the end of the stage that it comes after."""
    model: list[int] = field(default_factory=list)
    """Index of the cluster's model."""
    tokens_in: list[int] = field(default_factory=list)
    tokens_out: list[int] = field(default_factory=list)
    tokens_max: list[int] = field(default_factory=list)
    """Longest answer that the request allows, as far as the front door is told; 0: not told."""
    priority: list[Priority] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    conversation: list[int] = field(default_factory=list)
    """Requests with the same number begin alike; 0: like no other."""
    reader_itl_s: list[float] = field(default_factory=list)
    """Longest mean gap between tokens that its reader does not mind; 0: as everybody."""
    stage: list[int] = field(default_factory=list)
    """Which stage it belongs to; `OPEN`: none."""
    after: list[int] = field(default_factory=list)
    """Which stage must be over before it comes; `OPEN`: none."""

    def __len__(self) -> int:
        return len(self.arrival)

    def add(
        self,
        arrival: float,
        model: int,
        tokens_in: int,
        tokens_out: int,
        *,
        tokens_max: int = 0,
        priority: Priority = Priority.INTERACTIVE,
        key: str = "",
        conversation: int = 0,
        reader_itl_s: float = 0.0,
        stage: int = OPEN,
        after: int = OPEN,
    ) -> None:
        """Append a request."""
        self.arrival.append(arrival)
        self.model.append(model)
        self.tokens_in.append(tokens_in)
        self.tokens_out.append(tokens_out)
        self.tokens_max.append(tokens_max)
        self.priority.append(priority)
        self.key.append(key)
        self.conversation.append(conversation)
        self.reader_itl_s.append(reader_itl_s)
        self.stage.append(stage)
        self.after.append(after)

    def check(self, models: int) -> None:
        """Make sure that it can be simulated.

        Raises:
            ValueError: what is wrong, and with which request.
        """
        for number in range(len(self)):
            if not 0 <= self.model[number] < models:
                raise ValueError(f"request {number}: there is no model {self.model[number]}")
            if self.arrival[number] < 0:
                raise ValueError(f"request {number}: arrives before the beginning")
            if self.tokens_in[number] < 0 or self.tokens_out[number] < 1:
                raise ValueError(f"request {number}: no answer without a token")
        known = {*self.stage, OPEN}
        for number, stage in enumerate(self.after):
            if stage not in known:
                raise ValueError(f"request {number}: comes after stage {stage}, which nobody is in")
        self._check_loops()

    def _check_loops(self) -> None:
        """Raise ValueError if a request waits, in the end, for itself."""
        before: dict[int, set[int]] = {}
        for stage, after in zip(self.stage, self.after, strict=True):
            if stage != OPEN:
                before.setdefault(stage, set())
                if after != OPEN:
                    before[stage].add(after)
        left = {stage: len(those) for stage, those in before.items()}
        next_ones: dict[int, list[int]] = {}
        for stage, those in before.items():
            for one in those:
                next_ones.setdefault(one, []).append(stage)
        ready = [stage for stage, count in left.items() if not count]
        over = 0
        while ready:
            over += 1
            for stage in next_ones.get(ready.pop(), ()):
                left[stage] -= 1
                if not left[stage]:
                    ready.append(stage)
        if over < len(before):
            raise ValueError("stages come after each other in a circle")


def zipf(models: int, alpha: float) -> list[float]:
    """Return the shares of models whose popularity falls with the power `alpha` of their rank."""
    weights = [1.0 / rank**alpha for rank in range(1, models + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


class Draw:
    """Draws models by their shares."""

    def __init__(self, models: Sequence[int], shares: Iterable[float]) -> None:
        self._models = models
        self._sums = list(itertools.accumulate(shares))

    def __call__(self, rng: random.Random) -> int:
        return rng.choices(self._models, cum_weights=self._sums)[0]


def sorted_by_arrival(workload: Workload) -> Workload:
    """Return an open workload in order of arrival, equal times in the order given."""
    order = sorted(range(len(workload)), key=workload.arrival.__getitem__)
    columns = {
        name: [getattr(workload, name)[number] for number in order]
        for name in Workload.__dataclass_fields__
        if name != "name"
    }
    return Workload(name=workload.name, **columns)
