"""What share of a device's time its swaps take. Pure."""

from math import exp, expm1, inf, log

LEAST_HORIZON_S = 60.0
"""An average over less would be that of one swap."""


class Overhead:
    """Seconds of swaps and of idleness on one device, forgotten exponentially.

    A share that is averaged over a long time lets a quiet device swap at once, several times in a
    row, and holds a busy one to the share in the long run. Time in which the device would have
    been idle is free: swaps that fit into it keep nobody from being served.

    Args:
        horizon_s: time constant of the average; a shorter one than `LEAST_HORIZON_S` is as long.
    """

    __slots__ = ("_at", "_horizon_s", "_idle_s", "_idle_since", "_swaps_s")

    def __init__(self, horizon_s: float) -> None:
        self._horizon_s = max(horizon_s, LEAST_HORIZON_S)
        self._swaps_s = 0.0
        self._idle_s = 0.0
        self._at = 0.0
        self._idle_since: float | None = None

    def add(self, seconds: float, now: float) -> None:
        """Take in a swap."""
        self._forget(now)
        self._swaps_s += min(seconds, self._horizon_s)

    def rests(self, now: float) -> None:
        """Take in that nothing runs or moves on the device."""
        if self._idle_since is None:
            self._idle_since = now

    def works(self, now: float) -> None:
        """Take in that something does."""
        if self._idle_since is not None:
            self._forget(now)
            self._idle_s += self._horizon_s * -expm1((self._idle_since - now) / self._horizon_s)
            self._idle_since = None

    def share(self, now: float) -> float:
        """Return the share of time that swaps have taken."""
        self._forget(now)
        return self._swaps_s / self._horizon_s

    def allowed_at(self, cost_s: float, share: float, now: float) -> float:
        """Return from when a swap of that cost keeps the average within `share`.

        One that alone takes more than the share is allowed once all others are half forgotten.
        With no share at all it is never allowed (infinity), once there was any.
        """
        self._forget(now)
        budget = share * self._horizon_s
        most = max(budget - cost_s, budget / 2)
        beyond = self._swaps_s - self._idle_s
        if beyond <= most:
            return now
        return now + self._horizon_s * log(beyond / most) if most > 0.0 else inf

    def _forget(self, now: float) -> None:
        left: float = exp((self._at - now) / self._horizon_s)
        self._swaps_s *= left
        self._idle_s *= left
        self._at = now
