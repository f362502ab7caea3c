"""A hundred swaps under load: every stream is compared, everything left behind is counted.

`python -m evaluation.hundred --swaps 100 --json FILE`: two llama-servers of which only one fits
are both asked without a pause, so each swap preempts a stream in the middle. Exit status 1 unless
all that must be zero is zero.
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click

from swapserve.system.cgroup import mount_point
from tests.support.daemon import Daemon, pair, site
from tests.support.keeper import locks_of
from tests.support.leaks import Traces, host_state, remove, tag_of, traces, wait_for
from tests.support.oracle import Answer, completion, stream

PROMPTS = (" buku dada", " dada buku timo", " A river and a stone")
LONGEST, SHORTEST = 1200, 200
CLIENTS = 2
"""Per engine."""
SETTLE_S = 30.0
PAUSE_S = 0.15
"""A longer silence in the middle of a stream is a swap; tokens come every millisecond or two."""


@dataclass(slots=True)
class Counts:
    """What happened; `swaps` are the moves in that ended well."""

    requests: int = 0
    tokens: int = 0
    preempted: int = 0
    swaps: int = 0
    failed_swaps: int = 0
    mechanisms: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong_tokens: list[str] = field(default_factory=list)
    leaks: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def good(self) -> bool:
        return not (self.lost or self.wrong_tokens or self.failed_swaps or self.leaks)

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "preempted_streams": self.preempted,
            "swaps": self.swaps,
            "failed_swaps": self.failed_swaps,
            "mechanisms": dict(self.mechanisms),
            "lost": len(self.lost),
            "wrong_tokens": len(self.wrong_tokens),
            "leaks": self.leaks,
            "seconds": round(self.seconds, 1),
            "first_failures": [*self.lost[:3], *self.wrong_tokens[:3]],
        }


class Load:
    """Clients that never pause, until enough swaps were counted."""

    def __init__(self, daemon: Daemon, http: aiohttp.ClientSession, swaps: int) -> None:
        self.counts = Counts()
        self._daemon = daemon
        self._http = http
        self._wanted = swaps
        self._enough = asyncio.Event()
        self._expected: dict[tuple[str, str], Answer] = {}

    async def run(self) -> None:
        for model in ("a", "b"):
            for prompt in PROMPTS:
                body = completion(model, LONGEST, prompt=prompt)
                answer = await stream(self._http, self._daemon.completions, body)
                self._expected[model, prompt] = answer
        begun = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            counting = tasks.create_task(self._count_swaps())
            clients = [
                tasks.create_task(self._client(model, random.Random(f"{model}{number}")))
                for model in ("a", "b")
                for number in range(CLIENTS)
            ]
            await asyncio.wait(clients)
            counting.cancel()
        self.counts.seconds = time.monotonic() - begun

    async def _client(self, model: str, chance: random.Random) -> None:
        while not self._enough.is_set():
            prompt, tokens = chance.choice(PROMPTS), chance.randint(SHORTEST, LONGEST)
            body = completion(model, tokens, prompt=prompt)
            self.counts.requests += 1
            try:
                answer = await stream(self._http, self._daemon.completions, body)
            except (aiohttp.ClientError, TimeoutError) as error:
                self.counts.lost.append(f"{model}: {type(error).__name__} {error}")
                continue
            self._judge(answer, self._expected[model, prompt].pieces[:tokens], model)

    def _judge(self, answer: Answer, expected: list[str], model: str) -> None:
        self.counts.tokens += len(answer.pieces)
        if answer.tokens > 1:
            self.counts.preempted += answer.longest_gap()[1] > PAUSE_S
        if answer.error is not None or not answer.done:
            self.counts.lost.append(f"{model}: {answer.error}")
        elif answer.pieces != expected:
            at = next(
                (
                    i
                    for i, (x, y) in enumerate(zip(answer.pieces, expected, strict=False))
                    if x != y
                ),
                min(len(answer.pieces), len(expected)),
            )
            self.counts.wrong_tokens.append(f"{model}: token {at} of {len(expected)}")

    async def _count_swaps(self) -> None:
        counts = self.counts
        url = f"{self._daemon.url}/admin/v1/events"
        async with self._http.get(url, timeout=aiohttp.ClientTimeout(total=None)) as events:
            async for line in events.content:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if event["event"] != "swap_ended":
                    continue
                summary = event["summary"]
                counts.failed_swaps += summary["error"] is not None
                counts.mechanisms[f"{summary['kind']} {summary['mechanism']}"] += 1
                counts.swaps += summary["kind"] == "swap_in" and summary["error"] is None
                if counts.swaps >= self._wanted:
                    self._enough.set()


def held(daemon: Daemon) -> dict[str, int]:
    """Count what daemon and keeper hold of the machine."""
    status = daemon.status()
    left = traces(daemon.site.directory)
    images = daemon.site.directory / "images"
    return {
        "daemon fds": _fds(status.pid),
        "keeper fds": _fds(status.keeper_pid),
        "processes": len(left.get("processes", ())),
        "mounts": len(left.get("mounts", ())),
        "network namespaces": len(left.get("network namespaces", ())),
        "network interfaces": len(left.get("network interfaces", ())),
        "cgroups": _cgroups(daemon),
        "image directories": len(list(images.glob("*/*"))),
        "network locks": sum(len(text.splitlines()) for text in locks_of(daemon.site).values()),
        "firewall rules": len(host_state()["firewall rules"]),
    }


def _fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _cgroups(daemon: Daemon) -> int:
    root = mount_point()
    tag = tag_of(daemon.site.directory / "run")
    return len(list(root.glob(f"swapserve-{tag}/**/cgroup.procs"))) if root else 0


def excess(daemon: Daemon, before: dict[str, int]) -> dict[str, int]:
    now = held(daemon)
    return {what: now[what] - was for what, was in before.items() if now[what] > was}


def resting(daemon: Daemon) -> None:
    """Bring `a` in, `b` out on disk with its golden image only, so that both counts are alike."""
    for model in ("b", "a"):
        daemon.command("swap-in", model)
    wait_for(
        "nothing is in flight",
        lambda: all(e.active + e.waiting + e.suspended == 0 for e in daemon.status().engines),
        SETTLE_S,
        daemon.status,
    )


async def measure(swaps: int, directory: Path) -> Counts:
    models = pair(keep_cache="never")
    with site(directory, models, images={"canary_rate": 0.0}) as here:
        daemon = here.start()
        for model in ("a", "b", "a", "b", "a"):
            daemon.command("start" if daemon.engine(model).state == "stopped" else "swap-in", model)
        resting(daemon)
        before = held(daemon)
        async with daemon.http() as http:
            load = Load(daemon, http, swaps)
            await load.run()
        resting(daemon)
        with suppress(AssertionError):
            wait_for("all is let go", lambda: not excess(daemon, before), SETTLE_S)
        load.counts.leaks.update(excess(daemon, before))
    left: Traces = traces(directory)
    load.counts.leaks.update({f"{kind} after the end": list(what) for kind, what in left.items()})
    remove(directory)
    return load.counts


@click.command(help=(__doc__ or "").split("\n", maxsplit=1)[0])
@click.option("--swaps", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Result.")
def hundred(swaps: int, out: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="swapserve-hundred-") as directory:
        counts = asyncio.run(measure(swaps, Path(directory) / "site"))
    text = json.dumps(counts.as_json(), indent=1)
    if out is not None:
        out.write_text(text + "\n")
    click.echo(text)
    sys.exit(0 if counts.good() and counts.swaps >= swaps else 1)


if __name__ == "__main__":
    hundred()
