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

    __slots__ = ("_mean", "_spread", "_variance")

    def __init__(self, first_s: float) -> None:
        self._mean = log(max(first_s, LEAST_S))
        self._set_variance(FIRST_VARIANCE)

    def add(self, seconds: float) -> None:
        """Take in one that is over."""
        apart = log(max(seconds, LEAST_S)) - self._mean
        self._mean += WEIGHT * apart
        self._set_variance(self._variance + WEIGHT * (apart * apart - self._variance))

    def _set_variance(self, variance: float) -> None:
        self._variance = variance
        self._spread = max(sqrt(variance), LEAST_SPREAD) * sqrt(2.0)

    def longer(self, seconds: float) -> float:
        """Return the share of delays that last longer than that."""
        if seconds <= 0.0:
            return 1.0
        return 0.5 * erfc((log(seconds) - self._mean) / self._spread)

    def as_json(self) -> dict[str, float]:
        """Return the stored form."""
        return {"log_mean": self._mean, "log_variance": self._variance}

    def read(self, stored: dict[str, object]) -> bool:
        """Take over the stored form; return whether it made sense."""
        mean, variance = signed(stored.get("log_mean")), number(stored.get("log_variance"))
        if mean is None or variance is None:
            return False
        self._mean = mean
        self._set_variance(variance)
        return True
