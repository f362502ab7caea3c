"""Is an idle engine's cache worth keeping? `keep_cache: auto` weighs it. Pure.

Worth of the cache: tokens in it, times seconds of prefill per token, times the chance that they
are asked for again. Cost of keeping it: the seconds of a live dump, which a discard does not take.
All four are learnt from the requests and swaps of this very engine.
"""

from collections import deque
from dataclasses import dataclass, field

BYTES_PER_TOKEN = 4.0
"""Rough size of a token in a JSON body; it appears on both sides of the product's first factor."""
SSE_BYTES_PER_TOKEN = 200.0
"""The same in a stream, where each token comes in an event of its own."""
EMA_WEIGHT = 0.2
REMEMBERED_PREFIXES = 256
FIRST_DUMP_BYTES_PER_S = 1e9
"""Guess for the first live dump, before one was measured."""
FIRST_REUSE = 0.3


@dataclass(slots=True)
class CacheValue:
    """What one engine's cache is worth at this moment."""

    tokens: float = 0.0
    """Prompt and answer tokens since the process last came from nothing or a golden image."""
    prefill_s_per_token: float | None = None
    reuse: float = FIRST_REUSE
    dump_s: float | None = None
    _prefixes: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED_PREFIXES))

    def served(
        self,
        *,
        bytes_in: int,
        bytes_out: int,
        stream: bool,
        prefix: int,
        prefill_s: float | None,
    ) -> None:
        """Take in a finished request.

        Args:
            bytes_in: size of its body.
            bytes_out: size of the answer.
            stream: whether that was a stream of events.
            prefix: hash of the beginning of its prompt; the next turn of a chat has the same.
            prefill_s: from its grant to its first byte; None if it was suspended meanwhile.
        """
        tokens_in = max(1.0, bytes_in / BYTES_PER_TOKEN)
        seen = prefix in self._prefixes
        self.reuse += EMA_WEIGHT * (float(seen) - self.reuse)
        if not seen:
            self._prefixes.append(prefix)
            if prefill_s is not None:
                rate = prefill_s / tokens_in
                old = self.prefill_s_per_token
                new = rate if old is None else old + EMA_WEIGHT * (rate - old)
                self.prefill_s_per_token = new
        self.tokens += tokens_in + bytes_out / (SSE_BYTES_PER_TOKEN if stream else BYTES_PER_TOKEN)

    def emptied(self) -> None:
        """Take in that the process is new: cold, or from a golden image."""
        self.tokens = 0.0

    def dumped(self, seconds: float) -> None:
        """Take in what a live dump took."""
        old = self.dump_s
        self.dump_s = seconds if old is None else old + EMA_WEIGHT * (seconds - old)

    @property
    def worth_s(self) -> float:
        """Seconds of prefill that the cache is expected to save."""
        return self.tokens * (self.prefill_s_per_token or 0.0) * self.reuse

    def worth_keeping(self, footprint_bytes: int) -> bool:
        """Whether a live dump is expected to save more than it costs."""
        if self.prefill_s_per_token is None:
            return False
        cost = self.dump_s
        if cost is None:
            cost = footprint_bytes / FIRST_DUMP_BYTES_PER_S
        return self.worth_s > cost
