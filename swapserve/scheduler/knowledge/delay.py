"""How long something takes that comes at all: a log-normal distribution that forgets. Pure."""

from math import erfc, log, sqrt

from swapserve.scheduler.knowledge.stored import number, signed

WEIGHT = 0.1
"""Of a reading."""
FIRST_VARIANCE = 1.0
LEAST_SPREAD = 0.25
"""Standard deviation of the logarithm that is assumed at least."""
LEAST_S = 1e-3


class Delay:
    """Mean and variance of the logarithm of seconds, as moving averages."""

    __slots__ = ("mean", "variance")

    def __init__(self, first_s: float) -> None:
        self.mean = log(max(first_s, LEAST_S))
        self.variance = FIRST_VARIANCE

    def add(self, seconds: float) -> None:
        """Take in one that is over."""
        apart = log(max(seconds, LEAST_S)) - self.mean
        self.mean += WEIGHT * apart
        self.variance += WEIGHT * (apart * apart - self.variance)

    def longer(self, seconds: float) -> float:
        """Return the share of delays that last longer than that."""
        if seconds <= 0.0:
            return 1.0
        spread = max(sqrt(self.variance), LEAST_SPREAD)
        return 0.5 * erfc((log(seconds) - self.mean) / (spread * sqrt(2.0)))

    def as_json(self) -> dict[str, float]:
        """Return the stored form."""
        return {"log_mean": self.mean, "log_variance": self.variance}

    def read(self, stored: dict[str, object]) -> bool:
        """Take over the stored form; return whether it made sense."""
        mean, variance = signed(stored.get("log_mean")), number(stored.get("log_variance"))
        if mean is None or variance is None:
            return False
        self.mean, self.variance = mean, variance
        return True
