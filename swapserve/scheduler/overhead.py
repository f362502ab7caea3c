"""What share of a device's time its swaps take. Pure."""

from math import exp, inf, log


class Overhead:
    """Seconds of swaps on one device, forgotten exponentially.

    A share that is averaged over a long time lets a quiet device swap at once, several times in a
    row, and holds a busy one to the share in the long run.

    Args:
        horizon_s: time constant of the average.
    """

    __slots__ = ("_at", "_horizon_s", "_seconds")

    def __init__(self, horizon_s: float) -> None:
        self._horizon_s = horizon_s
        self._seconds = 0.0
        self._at = 0.0

    def add(self, seconds: float, now: float) -> None:
        """Take in a move that has just ended."""
        self._seconds = self._left(now) + min(seconds, self._horizon_s)
        self._at = now

    def share(self, now: float) -> float:
        """Return the share of time that swaps have taken."""
        return self._left(now) / self._horizon_s

    def allowed_at(self, cost_s: float, share: float, now: float) -> float:
        """Return from when on a swap of that cost keeps the average within `share`.

        One that alone takes more than the share is allowed when all others are half forgotten.
        With no share at all it is never allowed (infinity), once there was any.
        """
        most = max(share * self._horizon_s - cost_s, share * self._horizon_s / 2)
        left = self._left(now)
        if left <= most:
            return now
        if most <= 0.0:
            return inf
        return now + self._horizon_s * log(left / most)

    def _left(self, now: float) -> float:
        return self._seconds * exp((self._at - now) / self._horizon_s)
