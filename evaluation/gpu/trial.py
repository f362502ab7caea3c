"""One kind of engine through the whole product on one GPU: daemon, keeper, driver, NVML.

Two engines of the kind do not fit on the device together, by its configured budget. Each is asked
through the front door only; what is compared are whole greedy answers, with the logprobs of their
tokens where the engine tells them.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from evaluation.gpu.engines import GpuEngine
from evaluation.gpu.sheet import Budget, Page
from evaluation.session import Session
from evaluation.stream import Answer, StreamFailed, ask
from swapserve.states import EngineState, Tier
from swapserve.status import SwapSummary
from swapserve.system.gpu import Nvml, NvmlUnavailable
from swapserve.system.process import tree

TOKENS = 16
LONGEST = 3000
PROMPTS = {"a": "A river and a stone", "b": "A winter letter and some bread"}
CYCLES = 20
FIRST_CYCLES = 3
OTHER_CYCLES = 3
LOOK_S = 3.0
POLL_S = 0.05
ATTEMPTS = 3
"""To interrupt a stream before it is over."""
CLIENTS = 2
"""Per engine, while both are under load."""


class Unequal(Exception):
    """An engine said something else than before."""


class Lost(Exception):
    """A move ended in another way than it should have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long things are let take; shorter where nothing is real."""

    away_s: float = 2.0
    load_s: float = 25.0
    request_s: float = 90.0

    @property
    def stream_s(self) -> float:
        """How long a stream should last that is interrupted, or part of the load."""
        return min(4.0, self.load_s / 5)


def same(answer: Answer, wanted: Answer) -> None:
    """Compare two answers to the same request.

    Raises:
        Unequal: text, token ids or logprobs differ; says where.
    """
    # Not the pieces: an engine may put several tokens into one, once more and once less.
    for what in ("text", "tokens", "logprobs", "finish"):
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

    def run(self, budget: Budget, entries: dict[str, str]) -> None:
        """Measure in order of importance, as far as the time goes.

        Raises:
            OutOfTime: the rest is missing.
            Exception: the first engine does not start.
        """
        self._start("a", entries["a"])
        cycles = partial(self._cycles, budget, entries["a"], "cycles")
        self._attempt("first cycles", partial(cycles, FIRST_CYCLES))
        self._attempt("preempted stream", lambda: self._preempt("a", entries["a"]))
        self._attempt("restart", lambda: self._restart(budget, entries["cold"]))
        self._attempt("two that do not fit", lambda: self._alternate(budget, entries))
        self._attempt("cycles", partial(cycles, CYCLES))
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
        used = self._resident(model)
        if used == 0:
            raise Lost(f"{model} answers and has no GPU memory: it computes on the CPU")
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
            gpu_bytes=used,
        )

    def _cycles(self, budget: Budget, model: str, kind: str, count: int) -> None:
        """Do cycles until there are so many, or the time is over."""
        done = self._page.content.setdefault(kind, [])
        same(self._ask(model, "a", TOKENS), self._wanted[model])  # the other one may be there
        self._session.quiet(model)
        while len(done) < count:
            spent = [cycle["seconds"] for cycle in done if "seconds" in cycle]
            if not budget.allows(max(spent, default=3.0)):
                return
            self._cycle(model, kind)

    def _cycle(self, model: str, kind: str) -> None:
        """Swap out, check that the GPU is free, bring back by a request, compare, ask once more."""
        begun = time.monotonic()
        resident = self._resident(model)
        out_s, out = self._session.swap_out(model)
        self._whole(out)
        sample = self._page.add(
            kind, model=model, resident_bytes=resident, out_s=out_s, out=asdict(out)
        )
        sample |= self._away(model)
        answer = self._ask(model, "a", TOKENS)
        back = self._last(model)
        sample |= {"first_token_s": answer.first_token_s, "back": asdict(back)}
        self._whole(back)
        if back.mechanism == "cold" or back.from_tier != sample["tier"]:
            raise Lost(
                f"away on tier {sample['tier']}, back from {back.from_tier} {back.mechanism}"
            )
        same(answer, self._wanted[model])
        hot = self._ask(model, "a", TOKENS)
        same(hot, self._wanted[model])
        sample |= {"equal": True, "hot_first_token_s": hot.first_token_s}
        sample["seconds"] = time.monotonic() - begun
        self._page.note()

    def _preempt(self, key: str, model: str) -> None:
        """Swap out in the middle of a stream, bring back, compare with the undisturbed one."""
        count = self._long(key, model)
        wanted = self._ask(model, key, count)
        for _ in range(ATTEMPTS):
            if self._preempted(key, model, count, wanted)["in_mid_stream"]:
                return

    def _preempted(self, key: str, model: str, count: int, wanted: Answer) -> dict[str, Any]:
        self._session.quiet(model)
        enough = threading.Event()

        def seen(pieces: int) -> None:
            if pieces >= len(wanted.pieces) // 3:
                enough.set()

        stream = in_background(partial(self._ask, model, key, count, seen))
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
        return sample

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

    def _restart(self, budget: Budget, model: str) -> None:
        """Measure the baseline: start cold, and kill. It is never restored, so no harm."""
        budget.need(1.2 * self._page.content["cold"][0]["first_token_s"], "a cold start")
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
            count = self._long(key, model)
            wanted[key] = count, self._ask(model, key, count)
        since = datetime.now(UTC).timestamp()
        seconds = min(self._times.load_s, 0.6 * budget.left_s)
        end = time.monotonic() + seconds
        clients = [
            in_background(partial(self._client, key, model, *wanted[key], end))
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

    def _client(
        self, key: str, model: str, count: int, wanted: Answer, end: float
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"model": model, "answers": 0, "tokens": 0, "first_token_s": []}
        found |= {"gaps_s": [], "lost": [], "wrong": []}
        while time.monotonic() < end:
            try:
                answer = self._ask(model, key, count)
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
        self._cycles(budget, model, f"{name}_cycles", OTHER_CYCLES)

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
        """Return how many tokens make a stream that lasts long enough."""
        answer = self._ask(model, key, 4 * TOKENS)
        pace = (answer.at[-1] - answer.at[0]) / max(1, len(answer.at) - 1)
        return max(4 * TOKENS, min(LONGEST, int(self._times.stream_s / max(pace, 1e-4))))

    def _last(self, model: str) -> SwapSummary:
        swap = self._session.quiet(model).last_swap
        if swap is None:
            raise Lost(f"{model} came from nowhere: the daemon tells of no move")
        return swap

    def _whole(self, swap: SwapSummary) -> None:
        if swap.error is not None:
            raise Lost(f"the {swap.kind} ended with: {swap.error}")

    def _away(self, model: str) -> dict[str, Any]:
        """Return where an engine rests, by the daemon's word and by NVML's."""
        status = self._session.engine(model)
        if status.state is not EngineState.SWAPPED_OUT or status.tier is Tier.DEVICE:
            raise Lost(f"{model} is {status.state} on tier {status.tier} after its swap out")
        return {"tier": status.tier, "nvml_away_bytes": self._used(model)}

    def _resident(self, model: str) -> int | None:
        """Return what a ready engine uses, once the daemon knows its process and NVML its bytes."""
        deadline = time.monotonic() + LOOK_S
        while not (used := self._used(model)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return used

    def _used(self, model: str) -> int | None:
        """Return the GPU memory of all its processes; None if it has none, or NVML says nothing."""
        pid = self._session.engine(model).pid
        if pid is None:
            return None
        with suppress(NvmlUnavailable, OSError):
            return self._nvml.used_by(tree(pid)).get(self._uuid, 0)
        return None


Result = TypeVar("Result")


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """Do it in a thread that nobody has to wait for: a stream of a lost engine may never end."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


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
