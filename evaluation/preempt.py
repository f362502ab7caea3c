"""Freeze an engine in the middle of streams, bring it back, and compare what the clients got.

A case counts only if host and client agree that the engine was away in mid-stream: enough token
ids on each side, the longest silence at least as long as it was away, its old process gone from the
host meanwhile, another one afterwards.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from evaluation.engines import BATCH, EngineKind, request
from evaluation.session import Session
from evaluation.stream import Answer, ask
from swapserve.status import SwapSummary

LEAST_TOKENS = 50
"""On each side of the freeze."""
SWAP_AT = 60
"""Pieces after which the engine is swapped out."""
FIRST_TOKENS = 200
MOST_TOKENS = 1600
"""A fast engine gets a longer stream, so that it is still busy when it is swapped out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One interrupted stream.

    Attributes:
        before, after: token ids on each side of the longest silence.
        gap_s: that silence.
        away_s: how long the engine was away at least.
        counted: whether this is a preemption beyond doubt.
        equal: whether the tokens are those of the uninterrupted run; None if that is not asked.
        whole: whether count, order and ending are right.
    """

    before: int
    after: int
    gap_s: float
    away_s: float
    counted: bool
    equal: bool | None
    whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Preemption:
    """What happened to the streams, and what both moves took (as callers see it).

    `attempts`: how many streams it took until one was long enough to be interrupted.
    """

    cases: tuple[Case, ...]
    old_pid: int | None
    old_gone: bool
    new_pid: int | None
    out_s: float
    out: SwapSummary
    back_s: float
    back: SwapSummary
    attempts: int = 1

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "cases": [asdict(case) for case in self.cases],
            "attempts": self.attempts,
            "old_pid": self.old_pid,
            "old_gone": self.old_gone,
            "new_pid": self.new_pid,
            "swap_out_s": self.out_s,
            "swap_out": asdict(self.out),
            "swap_in_s": self.back_s,
            "swap_in": asdict(self.back),
        }


def exact(session: Session, kind: EngineKind, *, number: int, away_s: float) -> Preemption:
    """Interrupt one stream of an engine that runs one at a time; tokens must be equal."""
    model = kind.model("swapped")
    tokens = FIRST_TOKENS
    for attempt in count(1):
        body = request(kind, model, tokens=tokens, number=number)
        wanted = ask(session.address, body)
        found = _interrupt(session, model, [body], [wanted], away_s=away_s)
        if found.cases[0].counted or tokens >= MOST_TOKENS:
            return replace(found, attempts=attempt)
        session.quiet(model)
        tokens *= 2
    raise AssertionError("counting has no end")


def batched(session: Session, kind: EngineKind, *, number: int, away_s: float) -> Preemption:
    """Interrupt several streams at once.

    How they share steps may change tokens, so only count, order and ending are checked.
    """
    model = kind.model("batched")
    bodies = [
        request(kind, model, tokens=FIRST_TOKENS, number=number * BATCH + place)
        for place in range(BATCH)
    ]
    ask(session.address, request(kind, model, tokens=1))
    return _interrupt(session, model, bodies, None, away_s=away_s)


def _interrupt(
    session: Session,
    model: str,
    bodies: Sequence[dict[str, Any]],
    wanted: Sequence[Answer] | None,
    *,
    away_s: float,
) -> Preemption:
    old_pid = session.engine(model).pid
    with ThreadPoolExecutor(len(bodies)) as threads:
        futures = _begin(threads, session.address, bodies)
        out_s, out = session.swap_out(model)
        gone = old_pid is not None and not Path(f"/proc/{old_pid}").exists()
        left = time.monotonic()
        time.sleep(away_s)
        away = time.monotonic() - left
        back_s, back = session.swap_in(model)
        answers = [future.result() for future in futures]
    new_pid = session.engine(model).pid
    moved = gone and new_pid not in {None, old_pid}
    cases = tuple(
        judge(answer, body, wanted[place] if wanted else None, away_s=away, moved=moved)
        for place, (answer, body) in enumerate(zip(answers, bodies, strict=True))
    )
    return Preemption(
        cases=cases,
        old_pid=old_pid,
        old_gone=gone,
        new_pid=new_pid,
        out_s=out_s,
        out=out,
        back_s=back_s,
        back=back,
    )


def _begin(
    threads: ThreadPoolExecutor, address: str, bodies: Sequence[dict[str, Any]]
) -> list[Future[Answer]]:
    """Start the streams and wait until each has said enough, or has ended."""
    futures = []
    ready = []
    for body in bodies:
        enough = threading.Event()

        def seen(pieces: int, enough: threading.Event = enough) -> None:
            if pieces >= SWAP_AT:
                enough.set()

        future = threads.submit(ask, address, body, seen=seen)
        future.add_done_callback(partial(_set, enough))
        futures.append(future)
        ready.append(enough)
    for enough in ready:
        enough.wait()
    return futures


def _set(enough: threading.Event, _: Future[Answer]) -> None:
    enough.set()


def judge(
    answer: Answer, body: dict[str, Any], wanted: Answer | None, *, away_s: float, moved: bool
) -> Case:
    """Decide what an interrupted stream shows. Pure."""
    before, gap_s = answer.longest_gap
    after = len(answer.tokens) - before
    counted = moved and gap_s >= away_s and min(before, after) >= LEAST_TOKENS
    ended = answer.done and answer.finish == "length"
    complete = len(answer.tokens) == body["max_tokens"]
    in_order = all(earlier < later for earlier, later in pairwise(answer.offsets))
    equal = None
    if wanted is not None:
        equal = answer.text == wanted.text and answer.tokens == wanted.tokens
    return Case(
        before=before,
        after=after,
        gap_s=gap_s,
        away_s=away_s,
        counted=counted,
        equal=equal,
        whole=ended and complete and in_order,
    )
