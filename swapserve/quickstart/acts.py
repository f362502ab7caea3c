"""What the demonstration shows, act by act, and what it checks."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from swapserve.client.chat import Answer, ChatClient
from swapserve.client.control import ControlClient, Received
from swapserve.errors import SwapServeError
from swapserve.quickstart.models import CONTEXT, Model
from swapserve.quickstart.screen import Screen
from swapserve.status import Status

SHORT_TOKENS = 24
LONG_STREAM_S = 14.0
"""How long the preempted stream should run by itself: long enough to be seen, and cut in two."""
LEAST_TOKENS, MOST_TOKENS = 120, CONTEXT - 200
CUT_AFTER_S = 4.0
LEAST_SIDE = 20
"""Tokens on each side of the cut for the comparison to mean something."""
_POLL_S = 0.25
_TAIL_CHARS = 44
_EXTRA = {"temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_token_ids": True}
"""Greedy, never ending early, and computed the same way each time; engines take what they know."""


class Acts:
    """The acts, in order; `screen` remembers what was wrong."""

    def __init__(self, models: list[Model], url: str, chat: ChatClient, screen: Screen) -> None:
        self._a, self._b = models
        self._url = url
        self._chat = chat
        self._screen = screen
        self._began = datetime.now(UTC).timestamp()
        self._status: Status | None = None
        self._control = ControlClient(url)
        self._rate = 1.0

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Acts"]:
        """Keep an eye on the daemon during the block, for the line that lives."""
        with self._control:
            async with asyncio.TaskGroup() as tasks:
                watcher = tasks.create_task(self._watch())
                try:
                    yield self
                finally:
                    watcher.cancel()

    async def events(self) -> list[Received]:
        """Return what the daemon did since this began."""
        return await asyncio.to_thread(
            lambda: list(self._control.events(since=self._began, follow=False))
        )

    # ------------------------------------------------------------------ acts

    async def first_answers(self, *, images: bool) -> None:
        """Both models answer in turn: each comes cold once, then from its image if it has one."""
        self._screen.head(f"1. {self._a.name} answers. Nothing runs yet")
        await self._short(self._a)
        self._screen.head(
            f"2. {self._b.name} answers. There is room for one: {self._a.name} leaves"
        )
        await self._short(self._b)
        self._screen.head("3. Both again")
        if images:
            self._screen.line(
                "  Now they come from images. After the first restore of each, a request"
            )
            self._screen.line(
                "  whose answer is known (the canary) checks that it works as before."
            )
        for model in (self._a, self._b, self._a):
            answer = await self._short(model)
            self._rate = answer.tokens_per_s

    async def preemption(self) -> None:
        """A long stream on A, cut by a request for B; the same stream again, left alone."""
        wanted = int(self._rate * LONG_STREAM_S)
        tokens = max(LEAST_TOKENS, min(MOST_TOKENS, wanted))
        a, b = self._a.name, self._b.name
        self._screen.head(f"4. {a} streams {tokens} tokens; on its way somebody asks {b}")
        began = datetime.now(UTC).timestamp()
        before = await self._pid(a)
        stream, other = Answer(), Answer()
        async with self._showing(lambda: _progress(a, stream, tokens)), asyncio.TaskGroup() as both:
            both.create_task(self._complete(self._a, tokens, stream))
            await self._until(lambda: _running_for(stream) >= CUT_AFTER_S)
            both.create_task(self._complete(self._b, SHORT_TOKENS, other))
        after = await self._pid(a)
        self._say_answer(b, other)
        self._say_answer(a, stream)
        away = away_s(await self.events(), a, began)
        reference = Answer()
        self._screen.head(f"5. The same request to {a}, undisturbed, to compare")
        async with self._showing(lambda: _progress(a, reference, tokens)):
            await self._complete(self._a, tokens, reference)
        self._say_answer(a, reference)
        self._compare(stream, reference, away=away, pids=(before, after))

    # ---------------------------------------------------------------- checks

    def _compare(
        self, stream: Answer, reference: Answer, *, away: float, pids: tuple[int, int]
    ) -> None:
        check = self._screen.check
        cut, total = stream.tokens_before_gap, len(stream.at)
        check(
            stream.longest_gap_s >= away > 0,
            f"the stream paused for {stream.longest_gap_s:.2f} s, its engine was away for"
            f" {away:.2f} s, the connection stayed open",
        )
        check(
            min(cut, total - cut) >= LEAST_SIDE,
            f"{cut} tokens came before the pause, {total - cut} after it",
        )
        check(pids[0] != pids[1], f"it went on in another process: pid {pids[0]}, then {pids[1]}")
        same = stream.tokens == reference.tokens and stream.text == reference.text
        verdict = f"all {len(reference.tokens)} tokens are those of the undisturbed run"
        if not same:
            where = _first_difference(stream, reference)
            verdict = f"token {where} and others differ from the undisturbed run"
        check(same and bool(stream.tokens), verdict)

    # --------------------------------------------------------------- helpers

    async def _short(self, model: Model) -> Answer:
        answer = Answer()
        async with self._showing(lambda: _progress(model.name, answer, SHORT_TOKENS)):
            await self._complete(model, SHORT_TOKENS, answer)
        self._say_answer(model.name, answer)
        self._screen.check(
            len(answer.tokens) == SHORT_TOKENS,
            f"{len(answer.tokens)} of {SHORT_TOKENS} tokens came",
        )
        return answer

    async def _complete(self, model: Model, tokens: int, answer: Answer) -> None:
        await self._chat.complete(
            model.name, model.prompt, max_tokens=tokens, answer=answer, extra=_EXTRA
        )

    def _say_answer(self, name: str, answer: Answer) -> None:
        text = " ".join(answer.text.split())
        shown = text if len(text) <= 2 * _TAIL_CHARS else f"{text[: 2 * _TAIL_CHARS]}..."
        self._screen.line(f"  {name}: {shown}")
        self._screen.line(
            f"  first token after {answer.ttft_s:.2f} s, {len(answer.tokens)} tokens,"
            f" {answer.at[-1] - answer.started:.2f} s in all"
        )

    @asynccontextmanager
    async def _showing(self, describe: Callable[[], str]) -> AsyncIterator[None]:
        async with self._screen.watching(lambda: f"{self._engines()}  {describe()}"):
            yield

    def _engines(self) -> str:
        if self._status is None:
            return ""
        return ", ".join(
            f"{engine.name} {engine.state.replace('_', ' ')}" for engine in self._status.engines
        )

    async def _watch(self) -> None:
        while True:
            try:
                self._status = await asyncio.to_thread(self._control.status)
            except SwapServeError:
                self._status = None
            await asyncio.sleep(_POLL_S)

    async def _pid(self, name: str) -> int:
        return (await asyncio.to_thread(self._control.engine, name)).pid or 0

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():  # noqa: ASYNC110 - a clock is read, nobody could set an event
            await asyncio.sleep(_POLL_S / 5)


def _running_for(stream: Answer) -> float:
    return time.monotonic() - stream.at[0] if stream.at else 0.0


def _progress(name: str, answer: Answer, tokens: int) -> str:
    tail = " ".join(answer.text[-_TAIL_CHARS:].split())
    return f"{name}: {len(answer.tokens)}/{tokens}  {tail}"


def away_s(events: list[Received], engine: str, since: float) -> float:
    """Return the longest time from the end of a swap out of the engine to its next swap in."""
    longest, left = 0.0, None
    for event in events:
        if event.kind != "engine_changed" or event.data["engine"] != engine or event.at < since:
            continue
        if event.data["new"] == "swapped_out":
            left = event.at
        elif left is not None:
            longest, left = max(longest, event.at - left), None
    return longest


def _first_difference(stream: Answer, reference: Answer) -> int:
    pairs = zip(stream.tokens, reference.tokens, strict=False)
    shorter = min(len(stream.tokens), len(reference.tokens))
    return next((i for i, (one, other) in enumerate(pairs) if one != other), shorter)
