"""At which hours of the day somebody begins to ask for an engine. Pure."""

from math import exp, expm1

from swapserve.scheduler.knowledge.stored import number, numbers

HOURS = 24
HOUR_S = 3600.0
DAY_S = 86_400.0
FORGET = 0.8
"""Weight of the days before, at each new day."""
LOOK_BACK_S = HOUR_S
"""So much of the present silence is held against the profile."""


class Hours:
    """Beginnings per hour of day, forgotten over days."""

    __slots__ = ("_counts", "_day", "_days")

    def __init__(self) -> None:
        self._counts = [0.0] * HOURS
        self._day: int | None = None
        """Day of the latest beginning, counted from the epoch; None: there was none."""
        self._days = 0.0
        """Days observed up to then, weighted as they are forgotten."""

    def add(self, wall_s: float) -> None:
        """Take in a beginning at that Unix time."""
        day = int(wall_s // DAY_S)
        if self._day is None:
            self._day, self._days = day, 1.0
        elif day != self._day:
            weight, self._days = self._aged(day)
            self._counts = [count * weight for count in self._counts]
            self._day = day
        self._counts[int(wall_s % DAY_S // HOUR_S)] += 1.0

    def chance(self, wall_s: float, silent_s: float, within_s: float) -> float:
        """Return the chance of a beginning within so many seconds from that Unix time.

        Args:
            wall_s: now.
            silent_s: how long there has been no request.
            within_s: how far to look ahead; beyond a day makes no difference.
        """
        if self._day is None:
            return 0.0
        weight, days = self._aged(int(wall_s // DAY_S))
        per_second = weight / days / HOUR_S
        ahead = per_second * self._expected(wall_s, min(within_s, DAY_S))
        if ahead <= 0.0:
            return 0.0
        back_s = min(silent_s, LOOK_BACK_S)
        missed = per_second * self._expected(wall_s - back_s, back_s)
        # Is today a day like the others? A single day says nothing of that; and the longer
        # nobody came when many had, the less is it so.
        prior = max(0.0, 1.0 - 1.0 / days)
        usual = prior * exp(-missed)
        return usual / (usual + 1.0 - prior) * -expm1(-ahead)

    def _aged(self, day: int) -> tuple[float, float]:
        """Return by what the counts are to be multiplied on that day, and the days observed."""
        passed = max(0, day - (self._day or 0))
        weight = FORGET**passed
        return weight, self._days * weight + (1.0 - weight) / (1.0 - FORGET)

    def _expected(self, start_s: float, length_s: float) -> float:
        """Return the counts of the hours in a span, times the seconds of them that it covers."""
        at = start_s % DAY_S
        found = 0.0
        while length_s > 0.0:
            hour = int(at // HOUR_S) % HOURS
            part = min(length_s, HOUR_S - at % HOUR_S)
            found += self._counts[hour] * part
            length_s -= part
            at += part
        return found

    def as_json(self) -> dict[str, object]:
        """Return the stored form."""
        return {"day": self._day, "days": self._days, "counts": list(self._counts)}

    def read(self, stored: dict[str, object]) -> None:
        """Take over the stored form, if it makes sense."""
        day, days = number(stored.get("day")), number(stored.get("days"))
        counts = numbers(stored.get("counts"), HOURS)
        if day is not None and days is not None and days >= 1.0 and len(counts) == HOURS:
            self._day, self._days, self._counts = int(day), days, counts
