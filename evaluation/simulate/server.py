"""One engine as a batching server of requests. Deterministic, without a clock of its own.

Prompts are processed one after another, in order of arrival, at a fixed number of tokens per
second; their first token comes at the end. Then they join the batch, in which everybody gets tokens
at the same pace, slower the more there are. So one number counts the tokens that each member of the
batch has got since some moment, a member is done when that number reaches its own, and there is one
next event per engine however many tokens fall before it.

A frozen server keeps everything and does nothing.
"""

from collections import deque
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

NEVER = float("inf")
NOBODY = -1
_SAME = 1e-9
"""Members of a batch that are so few tokens apart end together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast an engine serves while it has its GPU for itself."""

    prefill_tokens_per_s: float
    itl_s: float
    """Seconds between two tokens of the only request."""
    itl_growth: float = 0.0
    """By which part of that each further request in the batch slows all of them down."""
    first_s: float = 0.0
    """What each request costs before its prompt, whatever its length."""
    max_seqs: int = 256
    """Requests inside; more of them queue in the engine."""
    cache_tokens: int = 0
    """Tokens of past conversations whose computed state it keeps; 0: none."""
    prefill_blocks: bool = False
    """Nobody gets a token while a prompt is processed."""

    def alone_s(self, tokens_in: int, tokens_out: int) -> float:
        """Return the seconds of a request that has the engine for itself."""
        prompt_s = self.first_s + tokens_in / self.prefill_tokens_per_s
        return prompt_s + max(0, tokens_out - 1) * self.itl_s


@dataclass(slots=True)
class Requests:
    """What servers need to know of requests, by number, and where they note the first token."""

    tokens_in: Sequence[int]
    tokens_out: Sequence[int]
    conversation: Sequence[int]
    first_at: MutableSequence[float]


class Server:
    """The requests inside one engine.

    Whoever owns it calls `advance` up to the present before anything else, and `step` at `due`.
    """

    __slots__ = (
        "_at",
        "_batch",
        "_blocks",
        "_cache",
        "_cached_tokens",
        "_head_left_s",
        "_itl",
        "_prompt_next",
        "_prompts",
        "_queue",
        "_requests",
        "_room",
        "_slow",
        "_speed",
        "_tokens",
        "began",
        "due",
        "inside",
        "prompt_tokens",
        "running",
    )

    def __init__(self, speed: Speed, requests: Requests) -> None:
        self._speed = speed
        self._blocks = speed.prefill_blocks
        self._itl = [
            speed.itl_s * (1.0 + speed.itl_growth * max(0, size - 1))
            for size in range(speed.max_seqs + 1)
        ]
        self._requests = requests
        self._at = 0.0
        self._slow = 1.0
        self._tokens = 0.0
        self._batch: list[tuple[float, int]] = []
        self._prompts: deque[int] = deque()
        self._head_left_s = 0.0
        self._queue: deque[int] = deque()
        self._room = speed.max_seqs
        self._prompt_next = False
        self._cache: dict[int, int] = {}
        self._cached_tokens = 0
        self.running = True
        self.inside = 0
        """Requests granted and not answered yet, those that queue in the engine included."""
        self.began = NOBODY
        """Whose first token came in the last `step`."""
        self.due = NEVER
        """When `step` has to be called."""
        self.prompt_tokens = 0
        """Tokens of prompts that were computed, not found in the cache."""

    @property
    def working(self) -> bool:
        """Whether it uses its GPU now."""
        return self.running and self.inside > 0

    # ------------------------------------------------------------------- time

    def advance(self, now: float) -> None:
        """Let time pass, at most up to `due`."""
        passed = now - self._at
        self._at = now
        if passed <= 0.0 or not self.running or not self.inside:
            return
        passed /= self._slow
        if self._prompts:
            self._head_left_s -= passed
            if self._blocks:
                return
        if self._batch:
            self._tokens += passed / self._itl[len(self._batch)]

    def step(self) -> list[int]:
        """Do what is due now; return which requests have got their last token."""
        done: list[int] = []
        now = self._at
        self.began = NOBODY
        if self._prompt_next:
            request = self.began = self._prompts.popleft()
            self._requests.first_at[request] = now
            rest = self._requests.tokens_out[request] - 1
            if rest > 0:
                heappush(self._batch, (self._tokens + rest, request))
            else:
                done.append(request)
            if self._prompts:
                self._begin_prompt(self._prompts[0])
        else:
            batch = self._batch
            self._tokens = batch[0][0]
            reached = self._tokens + _SAME
            while batch and batch[0][0] <= reached:
                done.append(heappop(batch)[1])
        for request in done:
            self._leave(request)
        self._plan()
        return done

    def _plan(self) -> None:
        self.due = NEVER
        if not self.running:
            return
        if self._prompts:
            self.due = self._at + max(0.0, self._head_left_s) * self._slow
            self._prompt_next = True
            if self._blocks:
                return
        batch = self._batch
        if batch:
            left = max(0.0, batch[0][0] - self._tokens)
            end = self._at + left * self._itl[len(batch)] * self._slow
            if end < self.due:
                self.due = end
                self._prompt_next = False
        else:
            self._tokens = 0.0

    # --------------------------------------------------------------- requests

    def add(self, request: int) -> None:
        """Take a request in."""
        self.inside += 1
        if self._room:
            self._room -= 1
            self._prompts.append(request)
            if len(self._prompts) == 1:
                self._begin_prompt(request)
            self._plan()
        else:
            self._queue.append(request)

    def _begin_prompt(self, request: int) -> None:
        tokens = self._requests.tokens_in[request]
        tokens -= min(tokens, self._cache.get(self._requests.conversation[request], 0))
        self.prompt_tokens += tokens
        speed = self._speed
        self._head_left_s = speed.first_s + tokens / speed.prefill_tokens_per_s

    def _leave(self, request: int) -> None:
        self.inside -= 1
        self._remember(request)
        if self._queue:
            waiting = self._queue.popleft()
            self._prompts.append(waiting)
            if len(self._prompts) == 1:
                self._begin_prompt(waiting)
        else:
            self._room += 1

    def _remember(self, request: int) -> None:
        conversation = self._requests.conversation[request]
        most = self._speed.cache_tokens
        if not conversation or not most:
            return
        cache = self._cache
        tokens = self._requests.tokens_in[request] + self._requests.tokens_out[request]
        self._cached_tokens += tokens - cache.pop(conversation, 0)
        cache[conversation] = tokens
        while self._cached_tokens > most:
            self._cached_tokens -= cache.pop(next(iter(cache)))

    def tokens_made(self, request: int) -> int:
        """Return how many tokens of its answer a request has got until now."""
        for end, number in self._batch:
            if number == request:
                missing = end - self._tokens
                return int(self._requests.tokens_out[request] - missing + _SAME)
        return 0

    # ----------------------------------------------------------------- engine

    def freeze(self) -> None:
        """Stop, and keep all that is inside."""
        self.running = False
        self.due = NEVER

    def thaw(self) -> None:
        """Go on."""
        self.running = True
        self._plan()

    def forget(self) -> None:
        """Lose the cache: the process that comes back is another one.

        Raises:
            ValueError: requests are inside, which cannot be lost.
        """
        if self.inside:
            raise ValueError(f"{self.inside} requests are inside")
        self._cache.clear()
        self._cached_tokens = 0

    def share(self, parts: int) -> None:
        """Get one of so many equal parts of the GPU's time."""
        self._slow = float(parts)
        self._plan()
