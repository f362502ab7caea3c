"""`mechanism: auto` against each single mechanism, on the stand-in for NVIDIA's driver.

`python -m evaluation mechanisms --json FILE`: one engine for each mechanism and one that chooses by
itself, all of the same size, on a GPU that holds one of them. They take turns in random order, so
that all see the same machine. How long each way takes is set by a table: the driver's time per byte
and the engine's own calls. After some turns, in which `auto` learns, its seconds out and in are
compared with those of the mechanism that was the cheapest in the same turns.

No figure of this is one of a GPU: what is shown is that the choice costs little beyond the best.
"""

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from evaluation.stats import Interval, interval
from swapserve.status import SwapSummary
from tests.support.daemon import Daemon
from tests.support.gpu_daemon import MIB, gpu_site
from tests.support.oracle import completion, stream

SINGLE = ("checkpoint", "lean", "sleep", "deep_sleep", "restart")
ARMS = (*SINGLE, "auto")
BOUND = 1.1
GPU_BYTES = 96 * MIB
CACHE_MB = 24
"""Of the 57 that an engine holds: what `lean` does not copy."""
TOKENS = 4


@dataclass(frozen=True, slots=True)
class Table:
    """What things cost on one imagined machine, in seconds beyond the programs' own.

    Attributes:
        ns_out, ns_in: of the driver, per byte.
        sleep_s, deep_s: of the engine's call, level 1 and 2.
        wake_s: of waking up, either level.
        reload_s: of reading the weights again, after level 2.
        start_s: of a cold start.
    """

    name: str
    ns_out: float
    ns_in: float
    sleep_s: float
    deep_s: float
    wake_s: float
    reload_s: float
    start_s: float

    @property
    def habits(self) -> str:
        """The engine's calls, for its command line."""
        seconds = {
            "/sleep?level=1&mode=keep": self.sleep_s,
            "/sleep?level=2&mode=keep": self.deep_s,
            "/wake_up?tags=weights": self.wake_s,
            "/collective_rpc": self.reload_s,
        }
        return json.dumps({"seconds": seconds})


TABLES = {
    name: Table(name, *row)
    for name, row in {
        "driver": (2, 2, 0.6, 0.4, 0.3, 0.6, 1.0),
        "lean": (12, 12, 1.5, 0.9, 0.05, 0.9, 1.5),
        "sleep": (16, 16, 0.2, 0.1, 0.1, 0.9, 1.5),
        # A fourth of what a third party measured with a model of 3 billion parameters; but it took
        # 5 s to start.
        "deep sleep": (12, 12, 0.5, 0.05, 0.1, 0.2, 2.0),
        "restart": (24, 24, 1.5, 1.2, 1.0, 1.5, 0.0),
    }.items()
}
"""By the mechanism that is meant to win."""


class Turns:
    """Lets the engines take turns, and keeps what each turn cost each of them."""

    def __init__(self, daemon: Daemon, table: Table, say: Callable[[str], None]) -> None:
        self.samples: list[dict[str, Any]] = []
        self._daemon = daemon
        self._table = table
        self._say = say
        self._seen: dict[str, float] = dict.fromkeys(ARMS, 0.0)
        self._texts: dict[str, str] = {}

    def run(self, turns: int, chance: random.Random) -> None:
        """Let every engine answer once per turn, in random order."""
        for turn in range(turns + 1):
            for arm in chance.sample(ARMS, k=len(ARMS)):
                asyncio.run(self._ask(arm))
            if turn:  # before the first one nothing has left yet
                self._collect(turn)

    async def _ask(self, arm: str) -> None:
        async with self._daemon.http() as http:
            answer = await stream(http, self._daemon.completions, completion(arm, TOKENS))
        text = answer.text
        if answer.error is not None or text != self._texts.setdefault(arm, text):
            raise RuntimeError(f"{self._table.name}: {arm} said {text!r}, {answer.error}")

    def _collect(self, turn: int) -> None:
        for arm in ARMS:
            # The daemon keeps the last events only, so what is new is told by its time.
            pairs = out_and_in(self._daemon.swaps(arm))
            for out, back in (pair for pair in pairs if pair[1].finished_at > self._seen[arm]):
                self.samples.append(
                    {
                        "turn": turn,
                        "arm": arm,
                        "mechanism": out.mechanism,
                        "out_s": out.seconds,
                        "in_s": back.seconds,
                    }
                )
                self._seen[arm] = back.finished_at
        last = {s["arm"]: s for s in self.samples if s["turn"] == turn}
        took = {arm: f"{s['out_s'] + s['in_s']:.2f}" for arm, s in last.items()}
        self._say(f"{self._table.name}, turn {turn}: {took}, auto by {_of(last, 'auto')}")


def _of(samples: dict[str, dict[str, Any]], arm: str) -> str:
    return str(samples[arm]["mechanism"]) if arm in samples else "-"


def out_and_in(moves: Sequence[SwapSummary]) -> list[tuple[SwapSummary, SwapSummary]]:
    """Return each way out with the way back in that followed it."""
    pairs = []
    out: SwapSummary | None = None
    for move in moves:
        if move.error is not None:
            continue
        if move.kind == "swap_out":
            out = move
        elif out is not None and move.kind in {"swap_in", "cold_start"}:
            pairs.append((out, move))
            out = None
    return pairs


# ------------------------------------------------------------------ judging


def judge(samples: Sequence[dict[str, Any]], *, after: int) -> dict[str, Any]:
    """Compare `auto` with the best single mechanism, in the turns after the first ones.

    The best one is the one with the smallest median, as nobody can know better beforehand. The
    ratio is of what both cost in all those turns, so a dear attempt of `auto` counts in full; its
    interval comes from the ratios within single turns.
    """
    counted = [sample for sample in samples if sample["turn"] > after]
    cost: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    for sample in counted:
        seconds = sample["out_s"] + sample["in_s"]
        cost[sample["arm"]][sample["turn"]] = cost[sample["arm"]].get(sample["turn"], 0.0) + seconds
    medians = {arm: median(turns.values()) for arm, turns in cost.items() if turns}
    best = min((arm for arm in medians if arm != "auto"), key=medians.__getitem__)
    both = sorted(cost["auto"].keys() & cost[best].keys())
    sums = [sum(cost[arm][turn] for turn in both) for arm in ("auto", best)]
    within: Interval = interval([cost["auto"][turn] / cost[best][turn] for turn in both])
    return {
        "best": best,
        "median_s": medians,
        "ratio": sums[0] / sums[1],
        "within_turns": asdict(within),
        "turns": len(both),
        "used": {
            name: sum(s["arm"] == "auto" and s["mechanism"] == name for s in counted)
            for name in dict.fromkeys(s["mechanism"] for s in counted if s["arm"] == "auto")
        },
        "met": sums[0] / sums[1] <= BOUND,
    }


def measure(
    table: Table, *, turns: int, after: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run all engines under one table; return samples and verdict."""
    begun = time.monotonic()
    model = {"tiers": ["host"], "sandbox": False, "keep_cache": "never", "golden": False}
    with (
        tempfile.TemporaryDirectory(prefix="swapserve-mechanisms-") as directory,
        gpu_site(
            Path(directory),
            ARMS,
            gpus=(GPU_BYTES,),
            recipe_changes={
                "adapter": "vllm",
                "gpu_args": ["--enable-sleep-mode"],
                "gpu_env": {"VLLM_SERVER_DEV_MODE": "1"},
                "mechanisms": list(SINGLE),
            },
            args=[
                "--dialect=vllm",
                f"--cache-mb={CACHE_MB}",
                f"--startup-delay={table.start_s}",
                f"--habits={table.habits}",
            ],
            model=model,
            standing={
                "checkpoint_ns_per_byte": table.ns_out,
                "restore_ns_per_byte": table.ns_in,
                "context_bytes": MIB,
            },
        ) as here,
    ):
        config = json.loads(here.site.config.read_text())
        for entry in config["models"]:
            entry["mechanism"] = entry["name"]
        here.site.config.write_text(json.dumps(config))
        found = Turns(here.start(), table, say)
        found.run(turns, random.Random(seed))
        here.check()
    verdict = judge(found.samples, after=after)
    seconds = time.monotonic() - begun
    return {"table": asdict(table), **verdict, "seconds": seconds, "samples": found.samples}


def render(tables: dict[str, dict[str, Any]]) -> str:
    """Return the verdicts as text."""
    lines = []
    for name, found in tables.items():
        medians = ", ".join(f"{arm} {seconds:.2f}" for arm, seconds in found["median_s"].items())
        within = found["within_turns"]
        lines.append(
            f"{name}: auto costs {found['ratio']:.3f} of {found['best']}"
            f" ({'met' if found['met'] else 'NOT MET'}; median of turns {within['median']:.3f},"
            f" {within['low']:.3f}-{within['high']:.3f}, n={within['n']});"
            f" it used {found['used']}\n  seconds out and in: {medians}"
        )
    return "\n".join(lines)
