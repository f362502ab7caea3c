"""One kind of engine through the whole product on one GPU: daemon, keeper, driver, NVML.

Two engines of the kind do not fit on the device together, by its configured budget. Each is asked
through the front door only; what is compared are whole greedy answers, with the logprobs of their
tokens where the engine tells them.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from evaluation.gpu.engines import GpuEngine
from evaluation.gpu.sheet import Budget, Page
from evaluation.session import Session
from evaluation.stream import Answer, StreamFailed, ask
from swapserve.states import EngineState, Tier
from swapserve.status import SwapSummary
from swapserve.system.gpu import Nvml, NvmlUnavailable
from swapserve.system.process import tree

TOKENS = 16
LONGEST = 1200
STREAM_S = 4.0
"""A stream that is interrupted, or part of the load, lasts about so long."""
PROMPTS = {"a": "A river and a stone", "b": "A winter letter and some bread"}
CYCLES = 20
FIRST_CYCLES = 3
COLD_STARTS = 2
SLEEP_CYCLES = 3
CLIENTS = 2
"""Per engine, while both are under load."""


class Unequal(Exception):
    """An engine said something else than before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long things are let take; shorter where nothing is real."""

    away_s: float = 2.0
    load_s: float = 40.0
    request_s: float = 90.0


def same(answer: Answer, wanted: Answer) -> None:
    """Compare two answers to the same request.

    Raises:
        Unequal: text, token ids or logprobs differ; says where.
    """
    for what in ("pieces", "tokens", "logprobs", "finish"):
        found, before = getattr(answer, what), getattr(wanted, what)
        if found != before:
            place = next(
                (n for n, (x, y) in enumerate(zip(found, before, strict=False)) if x != y),
                min(len(found), len(before)),
            )
            raise Unequal(f"{what} differ from place {place} of {len(before)} on")


class Trial:
    """The measurements with one kind of engine; `entries` are the names in the configuration."""

    def __init__(
        self, page: Page, session: Session, engine: GpuEngine, *, uuid: str, times: Times
    ) -> None:
        self._page = page
        self._session = session
        self._engine = engine
        self._uuid = uuid
        self._times = times
        self._nvml = Nvml()
        self._wanted: dict[str, Answer] = {}
        self._cycle = 0

    def run(self, budget: Budget, entries: dict[str, str]) -> None:
        """Measure in order of importance, as far as the time goes.

        Raises:
            OutOfTime: the rest is missing.
            Exception: the first engine does not start.
        """
        self._start("a", entries["a"])
        for _ in range(FIRST_CYCLES):
            self._cycle_of(budget, "a", entries["a"])
        self._attempt("preempted stream", lambda: self._preempt("a", entries["a"]))
        self._attempt("restarts", lambda: self._restarts(budget, entries["cold"]))
        self._attempt("two that do not fit", lambda: self._alternate(budget, entries))
        while self._cycle < CYCLES:
            self._cycle_of(budget, "a", entries["a"])
        for name in (*self._engine.sleeps, "disk"):
            if name in entries:
                self._attempt(name, partial(self._other, budget, name, entries[name]))

    def _attempt(self, what: str, work: Callable[[], None]) -> None:
        with self._page.attempt(what):
            work()

    # ------------------------------------------------------------ steps

    def _start(self, key: str, model: str) -> None:
        """Start an engine cold by a request, and learn what it says."""
        answer = self._ask(model, key, TOKENS)
        swap = self._last(model)
        again = self._ask(model, key, TOKENS)
        same(again, answer)
        self._wanted[model] = answer
        self._page.add(
            "cold",
            model=model,
            first_token_s=answer.first_token_s,
            swap=asdict(swap),
            hot_first_token_s=again.first_token_s,
            logprobs=len(answer.logprobs),
            gpu_bytes=self._used(model),
        )

    def _cycle_of(self, budget: Budget, key: str, model: str, kind: str = "cycles") -> None:
        """Swap out, check that the GPU is free, bring back by a request, compare, ask once more."""
        if key == "a" and kind == "cycles":
            self._cycle += 1
        spent = [c["seconds"] for c in self._page.content.get(kind, ()) if "seconds" in c]
        budget.need(max(spent, default=3.0), f"another of the {kind}")
        begun = time.monotonic()
        resident = self._used(model)
        out_s, out = self._session.swap_out(model)
        self._whole(out)
        sample = self._page.add(
            kind, model=model, resident_bytes=resident, out_s=out_s, out=asdict(out)
        )
        sample |= self._away(model)
        answer = self._ask(model, key, TOKENS)
        back = self._last(model)
        sample |= {"first_token_s": answer.first_token_s, "back": asdict(back)}
        self._whole(back)
        same(answer, self._wanted[model])
        hot = self._ask(model, key, TOKENS)
        same(hot, self._wanted[model])
        sample |= {"equal": True, "hot_first_token_s": hot.first_token_s}
        sample["seconds"] = time.monotonic() - begun
        self._page.note()

    def _preempt(self, key: str, model: str) -> None:
        """Swap out in the middle of a stream, bring back, compare with the undisturbed one."""
        count = self._long(key, model)
        wanted = self._ask(model, key, count)
        self._session.quiet(model)
        enough = threading.Event()

        def seen(pieces: int) -> None:
            if pieces >= count // 3:
                enough.set()

        with ThreadPoolExecutor(1) as thread:
            stream = thread.submit(self._ask, model, key, count, seen)
            stream.add_done_callback(lambda _: enough.set())
            enough.wait(self._times.request_s)
            out_s, out = self._session.swap_out(model)
            sample = self._page.add("preempted", model=model, out_s=out_s, out=asdict(out))
            sample |= self._away(model)
            time.sleep(self._times.away_s)
            back_s, back = self._session.swap_in(model)
            answer = stream.result()
        sample |= {"back_s": back_s, "back": asdict(back), **self._judged(answer, wanted)}
        self._page.note()

    def _judged(self, answer: Answer, wanted: Answer) -> dict[str, Any]:
        gaps = [after - before for before, after in zip(answer.at, answer.at[1:], strict=False)]
        longest = max(gaps, default=0.0)
        before = gaps.index(longest) + 1 if gaps else len(answer.at)
        why = ""
        try:
            same(answer, wanted)
        except Unequal as error:
            why = str(error)
        return {
            "before": before,
            "after": len(answer.at) - before,
            "gap_s": longest,
            "in_mid_stream": longest >= self._times.away_s and 0 < before < len(answer.at),
            "equal": not why,
            "why": why,
        }

    def _restarts(self, budget: Budget, model: str) -> None:
        """Measure the baseline: kill, and start cold again. It is never restored, so no harm."""
        spent = self._page.content["cold"][0]["first_token_s"]
        for _ in range(COLD_STARTS):
            budget.need(1.2 * spent, "a cold start")
            self._start("a", model)
            kill_s, kill = self._session.swap_out(model)
            self._page.add("kills", model=model, seconds=kill_s, swap=asdict(kill))

    def _alternate(self, budget: Budget, entries: dict[str, str]) -> None:
        """Ask two engines of which one fits, both without a pause, and compare every answer."""
        cold_s = self._page.content["cold"][0]["first_token_s"]
        budget.need(1.2 * cold_s + 0.5 * self._times.load_s, "a second engine under load")
        pair = {key: entries[key] for key in ("a", "b")}
        self._start("b", pair["b"])
        wanted = {}
        for key, model in pair.items():
            wanted[key] = self._ask(model, key, self._long(key, model))
        since = datetime.now(UTC).timestamp()
        seconds = min(self._times.load_s, 0.6 * budget.left_s)
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS * len(pair)) as threads:
            clients = [
                threads.submit(self._client, key, model, wanted[key], end)
                for key, model in pair.items()
                for _ in range(CLIENTS)
            ]
        self._page.note(load=_told(clients, seconds))
        moves = [
            event.data["summary"]
            for event in self._session.control.events(since, follow=False)
            if event.kind == "swap_ended"
        ]
        self._page.note(load_moves=moves)

    def _client(self, key: str, model: str, wanted: Answer, end: float) -> dict[str, Any]:
        found: dict[str, Any] = {"model": model, "answers": 0, "tokens": 0, "first_token_s": []}
        found |= {"gaps_s": [], "lost": [], "wrong": []}
        while time.monotonic() < end:
            try:
                answer = self._ask(model, key, len(wanted.pieces))
                same(answer, wanted)
            except Unequal as error:
                found["wrong"].append(str(error))
            except (StreamFailed, OSError) as error:
                found["lost"].append(f"{type(error).__name__}: {error}")
                break
            else:
                found["answers"] += 1
                found["tokens"] += len(answer.pieces)
                found["first_token_s"].append(answer.first_token_s)
                pairs = zip(answer.at, answer.at[1:], strict=False)
                found["gaps_s"].append(max((after - before for before, after in pairs), default=0))
        return found

    def _other(self, budget: Budget, name: str, model: str) -> None:
        """Measure another mechanism or tier with an entry of its own."""
        budget.need(1.5 * self._page.content["cold"][0]["first_token_s"], f"an engine for {name}")
        self._start("a", model)
        for _ in range(SLEEP_CYCLES):
            self._cycle_of(budget, "a", model, kind=f"{name}_cycles")

    # ------------------------------------------------------------ asking and looking

    def _ask(
        self, model: str, key: str, tokens: int, seen: Callable[[int], None] | None = None
    ) -> Answer:
        body = {"model": model, "prompt": PROMPTS[key], "max_tokens": tokens, "temperature": 0}
        answer = ask(
            self._session.address,
            {**body, **self._engine.ask},
            seen=seen,
            timeout_s=self._times.request_s,
        )
        if self._engine.done and not answer.done:
            raise StreamFailed("the stream broke off")
        return answer

    def _long(self, key: str, model: str) -> int:
        """Return how many tokens make a stream of about `STREAM_S`."""
        answer = self._ask(model, key, 4 * TOKENS)
        pace = (answer.at[-1] - answer.at[0]) / max(1, len(answer.at) - 1)
        return max(4 * TOKENS, min(LONGEST, int(STREAM_S / max(pace, 1e-4))))

    def _last(self, model: str) -> SwapSummary:
        swap = self._session.quiet(model).last_swap
        if swap is None:
            raise Unequal(f"{model} came from nowhere: the daemon tells of no move")
        return swap

    def _whole(self, swap: SwapSummary) -> None:
        if swap.error is not None:
            raise Unequal(f"the {swap.kind} ended with: {swap.error}")

    def _away(self, model: str) -> dict[str, Any]:
        """Return where an engine rests, by the daemon's word and by NVML's."""
        status = self._session.engine(model)
        if status.state is not EngineState.SWAPPED_OUT or status.tier is Tier.DEVICE:
            raise Unequal(f"{model} is {status.state} on tier {status.tier} after its swap out")
        return {"tier": status.tier, "nvml_away_bytes": self._used(model)}

    def _used(self, model: str) -> int | None:
        pid = self._session.engine(model).pid
        with suppress(NvmlUnavailable, OSError):
            return self._nvml.used_by(tree(pid) if pid else []).get(self._uuid, 0)
        return None


def _told(clients: list[Future[dict[str, Any]]], seconds: float) -> dict[str, Any]:
    found = [client.result() for client in clients]
    return {
        "seconds": seconds,
        "answers": sum(each["answers"] for each in found),
        "tokens": sum(each["tokens"] for each in found),
        "lost": sum(len(each["lost"]) for each in found),
        "wrong": sum(len(each["wrong"]) for each in found),
        "clients": found,
    }
