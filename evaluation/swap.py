"""The experiment `swap`: cold start, bare mechanism, SwapServe, each engine, in one run."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from evaluation import preempt
from evaluation.bare import Bare, locate
from evaluation.engines import EngineKind, Variant, request
from evaluation.machine import watched
from evaluation.plan import AWAY_S, Block, Pace, Step
from evaluation.session import Place, Session, running
from evaluation.stream import Answer, ask
from swapserve.engines.base import CANARY_TOKENS
from swapserve.ids import EngineName
from swapserve.status import SwapSummary

TOKENS = 4
"""Length of the answers whose first token is timed."""
Sample = dict[str, Any]
Say = Callable[[str], None]


class WrongAnswer(Exception):
    """An engine said something else than before, or came in another way than it should."""


class Experiment:
    """Collects samples; `say` is told what is going on."""

    def __init__(self, place: Place, kinds: Sequence[EngineKind], say: Say) -> None:
        self.samples: list[Sample] = []
        self._place = place
        self._kinds = kinds
        self._say = say
        self._bare = Bare(place.directory)
        self._texts: dict[str, str] = {}
        self._pairs = 0

    def set_up(self, paces: dict[str, Pace]) -> None:
        """Make golden images and let everything start once; nothing of this is a sample.

        Byte code is compiled and files are in the page cache afterwards. `paces` gets what the
        parts took.
        """
        with running(self._place.config("off")) as session:
            for kind in self._kinds:
                for variant in kind.variants:
                    model = kind.model(variant)
                    self._say(f"{model}: first cold start (not counted)")
                    answer = ask(session.address, request(kind, model, tokens=TOKENS))
                    paces[kind.name].cold_s = answer.first_token_s
                    self.check_text(kind, answer)
                    session.quiet(model)
                    session.swap_out(model)
                # The first restore checks the image with a canary: not counted either.
                swapped = kind.model("swapped")
                for _ in range(2):
                    answer = ask(session.address, request(kind, swapped, tokens=TOKENS))
                    paces[kind.name].swap_in_s = answer.first_token_s
                    self.check_text(kind, answer)
                    session.quiet(swapped)
                    session.swap_out(swapped)

    def run(self, block: Block) -> None:
        """Carry out a block under a daemon of its own."""
        with running(self._place.config(block.huge_pages)) as session:
            for step in block.steps:
                idle = f", idle {step.idle_s:g} s" if step.idle_s else ""
                self._say(f"  {step.kind.name}: {step.what}{idle}, huge pages {block.huge_pages}")
                _Arm(self, session, block, step).run()

    def add(self, block: Block, step: Step, what: str, **values: Any) -> None:  # noqa: ANN401
        """Keep a sample."""
        self.samples.append(
            {
                "cycle": block.cycle,
                "engine": step.kind.name,
                "huge_pages": block.huge_pages,
                "idle_s": step.idle_s,
                "what": what,
                **values,
            }
        )

    def next_pair(self) -> int:
        """Return the number of a new pair."""
        self._pairs += 1
        return self._pairs

    @property
    def bare(self) -> Bare:
        """The mechanism alone."""
        return self._bare

    def check_text(self, kind: EngineKind, answer: Answer) -> None:
        """Compare with what the engine has always said.

        Raises:
            WrongAnswer: it differs.
        """
        wanted = self._texts.setdefault(kind.name, answer.text)
        if answer.text != wanted:
            raise WrongAnswer(f"{kind.name} answered {answer.text!r}, before {wanted!r}")


class _Arm:
    """One step of one block."""

    def __init__(self, experiment: Experiment, session: Session, block: Block, step: Step) -> None:
        self._experiment = experiment
        self._session = session
        self._block = block
        self._step = step
        self._kind = step.kind
        self._model = step.kind.model("swapped")
        self._body = request(step.kind, self._model, tokens=TOKENS)

    def run(self) -> None:
        match self._step.what:
            case "pairs":
                self._condition()
                self._run_pairs()
            case "cold":
                self._condition()
                self._cold()
            case "preempt":
                self._preempt("swapped")
            case "batch":
                self._preempt("batched")

    def _condition(self) -> None:
        """Every group begins just after its engine has left, whatever was done before."""
        ask(self._session.address, self._body)
        self._session.quiet(self._model)
        self._session.swap_out(self._model)

    def _run_pairs(self) -> None:
        legs = {"bare": self._bare, "swap_in": self._swap_in}
        for order in self._step.legs:
            pair = self._experiment.next_pair()
            for leg in order:
                time.sleep(self._step.idle_s)
                legs[leg](pair)

    def _bare(self, pair: int) -> None:
        engine = locate(self._session.context, EngineName(self._model))
        on = self._block.huge_pages == "on"
        with (
            watched() as machine,
            self._experiment.bare.restored(engine, self._body, huge_pages=on) as found,
        ):
            assert found.answer is not None
            self._experiment.check_text(self._kind, found.answer)
        self._add(
            "bare",
            pair=pair,
            seconds=found.first_token_s,
            restore_s=found.restore_s,
            kill_s=found.kill_s,
            machine=machine,
        )

    def _swap_in(self, pair: int) -> None:
        with watched() as machine:
            answer = ask(self._session.address, self._body)
        self._experiment.check_text(self._kind, answer)
        status = self._session.quiet(self._model)
        swap = _of(status.last_swap, "golden")
        hot = ask(self._session.address, self._body)
        self._session.quiet(self._model)
        out_s, out = self._session.swap_out(self._model)
        _of(out, "discard")
        self._add(
            "swap_in",
            pair=pair,
            seconds=answer.first_token_s,
            image_bytes=status.image_bytes,
            swap=asdict(swap),
            machine=machine,
        )
        self._add("hot", pair=pair, seconds=hot.first_token_s)
        self._add("discard", pair=pair, seconds=out_s, swap=asdict(out))

    def _cold(self) -> None:
        model = self._kind.model("cold")
        time.sleep(self._step.idle_s)
        with watched() as machine:
            answer = ask(self._session.address, {**self._body, "model": model})
        self._experiment.check_text(self._kind, answer)
        swap = _of(self._session.quiet(model).last_swap, "cold")
        # The very first request, slow as it is, belongs to a cold start. It was SwapServe's
        # warm-up, and this one came on top: the same, asked once more, is taken off.
        again = ask(
            self._session.address, {**self._body, "model": model, "max_tokens": CANARY_TOKENS}
        )
        again_s = again.at[-1] - again.started
        self._add(
            "cold",
            seconds=answer.first_token_s - again_s,
            through_s=answer.first_token_s,
            again_s=again_s,
            swap=asdict(swap),
            machine=machine,
        )
        self._session.swap_out(model)

    def _preempt(self, variant: Variant) -> None:
        work = preempt.exact if variant == "swapped" else preempt.batched
        with watched() as machine:
            found = work(self._session, self._kind, number=self._block.cycle + 1, away_s=AWAY_S)
        self._add(self._step.what, **found.as_json(), machine=machine)
        model = self._kind.model(variant)
        self._session.quiet(model)
        self._session.swap_out(model)

    def _add(self, what: str, **values: Any) -> None:  # noqa: ANN401
        self._experiment.add(self._block, self._step, what, **values)


def _of(swap: SwapSummary | None, mechanism: str) -> SwapSummary:
    if swap is None or swap.error is not None or swap.mechanism != mechanism:
        raise WrongAnswer(f"expected a {mechanism} move, the daemon says {swap}")
    return swap


def new_paces(samples: Sequence[Sample], paces: dict[str, Pace]) -> None:
    """Take in what the parts really take, for the estimate of what is left."""
    for name, pace in paces.items():
        for attribute, what in (("cold_s", "cold"), ("swap_in_s", "swap_in")):
            found = [s["seconds"] for s in samples if s["engine"] == name and s["what"] == what]
            if found:
                setattr(pace, attribute, statistics.median(found))
