"""Ask a daemon what a trace says, when it says so, and note what became of each request."""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from evaluation.schedule.client import Stream, ask, body, http_client
from evaluation.schedule.figures import Request, Run
from evaluation.schedule.ground import Ground
from evaluation.schedule.prompts import prompt
from evaluation.session import Session
from evaluation.simulate import Workload
from evaluation.simulate.workload import OPEN

LEAD_S = 0.5
"""From the beginning of a replay to the trace's own."""
SETTLE_S = 0.5
"""After the last token, until everything that the daemon has to tell is told."""
SUSPENDED = 8.0
"""Times the median: a longer gap between two tokens is a swap."""
_MOVES = frozenset({"swap_in", "swap_out", "cold_start", "stop", "promote"})


@dataclass(slots=True)
class Replayed:
    """A real run: its figures, every move, and how late requests were sent.

    Attributes:
        moves: the daemon's own accounts of its moves.
        late_s: by how much the client missed the trace's time, at worst.
        itl_s: the mean gap between two tokens of a stream, without suspensions.
    """

    run: Run
    itl_s: float
    moves: list[dict[str, Any]] = field(default_factory=list)
    late_s: float = 0.0

    def ways_in(self, mechanism: str) -> list[float]:
        """Return the seconds of its ways in of that kind, as the daemon says."""
        moves = (move for move in self.moves if move["kind"] == "swap_in")
        return [move["seconds"] for move in moves if move["mechanism"] == mechanism]

    def as_json(self) -> dict[str, Any]:
        """Return requests as rows, and moves."""
        return {
            "figures": self.run.figures(),
            "late_s": self.late_s,
            "itl_s": self.itl_s,
            "forecasts": self.run.forecasts,
            "forecasts_met": self.run.forecasts_met,
            "requests": [
                [one.model, one.priority, one.tokens_out, one.sent, one.first, one.last, one.error]
                for one in self.run.requests
            ],
            "moves": self.moves,
        }


def _itl_s(gaps: Sequence[float]) -> float:
    most = SUSPENDED * statistics.median(gaps)
    return statistics.fmean(gap for gap in gaps if gap <= most)


def replay(ground: Ground, session: Session, workload: Workload) -> Replayed:
    """Replay the trace, with the first engines there at the beginning as in the simulator.

    Raises:
        SwapServeError: a command was refused.
    """
    return asyncio.run(_Replay(ground, session, workload).run())


class _Replay:
    def __init__(self, ground: Ground, session: Session, workload: Workload) -> None:
        self._session = session
        self._work = workload
        self._first = ground.names[: ground.held]
        self._bodies = [
            body(
                ground.names[workload.model[number]],
                prompt(workload.tokens_in[number], number),
                workload.tokens_out[number],
                most=workload.tokens_max[number],
            )
            for number in range(len(workload))
        ]
        self._streams = [Stream() for _ in self._bodies]
        self._left: dict[int, int] = {}
        for stage in workload.stage:
            self._left[stage] = self._left.get(stage, 0) + 1
        self._over = {stage: asyncio.Event() for stage in self._left}
        self._moves: list[dict[str, Any]] = []
        self._suspensions = 0
        self._late_s = 0.0

    async def run(self) -> Replayed:
        async with http_client() as http:
            await self._bring_in(http)
            listening = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                events = tasks.create_task(self._listen(http, listening))
                await listening.wait()
                self._start = time.monotonic() + LEAD_S
                async with asyncio.TaskGroup() as clients:
                    for number in range(len(self._work)):
                        clients.create_task(self._client(http, number))
                await asyncio.sleep(SETTLE_S)
                status = await asyncio.to_thread(self._session.control.status)
                events.cancel()
        requests = [self._request(number) for number in range(len(self._work))]
        ends = [one.last for one in requests if one.last is not None]
        return Replayed(
            run=Run(
                requests=requests,
                seconds=max(ends, default=0.0) - min(one.sent for one in requests),
                swaps=sum(move["kind"] in {"swap_in", "cold_start"} for move in self._moves),
                moving_s=sum(move["seconds"] for move in self._moves),
                preemptions=self._suspensions,
                forecasts=status.forecasts,
                forecasts_met=status.forecasts_met,
            ),
            itl_s=_itl_s([gap for stream in self._streams for gap in stream.gaps]),
            moves=self._moves,
            late_s=self._late_s,
        )

    async def _bring_in(self, http: aiohttp.ClientSession) -> None:
        """Ask the first engines for something: what an operator brings in stays for a while."""
        for name in self._first:
            await ask(http, self._session.address, body(name, prompt(1, 0), 1))
            await asyncio.to_thread(self._session.quiet, name)

    async def _client(self, http: aiohttp.ClientSession, number: int) -> None:
        work = self._work
        after, due = work.after[number], self._start
        if after != OPEN:
            await self._over[after].wait()
            due = time.monotonic()
        due += work.arrival[number]
        await asyncio.sleep(due - time.monotonic())
        stream = self._streams[number]
        stream.sent = time.monotonic()
        self._late_s = max(self._late_s, stream.sent - due)
        await ask(
            http,
            self._session.address,
            self._bodies[number],
            priority=work.priority[number],
            stream=stream,
        )
        stage = work.stage[number]
        self._left[stage] -= 1
        if not self._left[stage]:
            self._over[stage].set()

    async def _listen(self, http: aiohttp.ClientSession, listening: asyncio.Event) -> None:
        url = f"http://{self._session.address}/admin/v1/events"
        async with http.get(url, params={"follow": "true"}) as response:
            response.raise_for_status()
            listening.set()
            async for line in response.content:
                if line.startswith(b"data:"):
                    self._take(json.loads(line.removeprefix(b"data:")))

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "request_ended":
            self._suspensions += event["suspensions"]
        elif event["event"] == "swap_ended" and event["summary"]["kind"] in _MOVES:
            told = ("kind", "mechanism", "seconds", "finished_at", "error")
            self._moves.append(
                {"engine": event["engine"], **{key: event["summary"][key] for key in told}}
            )

    def _request(self, number: int) -> Request:
        stream, work = self._streams[number], self._work
        error = stream.error
        if error is None and len(stream.at) != work.tokens_out[number]:
            error = f"{len(stream.at)} tokens, not {work.tokens_out[number]}"
        return Request(
            model=work.model[number],
            priority=work.priority[number].name.lower(),
            tokens_out=work.tokens_out[number],
            sent=stream.sent - self._start,
            first=stream.at[0] - self._start if stream.at else None,
            last=stream.at[-1] - self._start if stream.at else None,
            error=error,
        )
