"""Drives the scheduler's core over a workload: the loop of a daemon without a daemon.

The core gets the very events that it would get from front door and engines, at simulated times, and
what it asks for is done by `World`. The same arguments give the same outcome, to the last digit.
"""

import time
from collections.abc import Callable
from typing import Any

from evaluation.simulate.agenda import ARRIVAL, STEP, Agenda
from evaluation.simulate.cluster import Cluster
from evaluation.simulate.engine import IllegalEffect
from evaluation.simulate.outcome import UNSET, Outcome, Records
from evaluation.simulate.server import NEVER, NOBODY, Requests
from evaluation.simulate.workload import OPEN, Workload
from evaluation.simulate.world import World
from swapserve.ids import LeaseId
from swapserve.messages import (
    Ask,
    BringIn,
    Drain,
    Effect,
    Event,
    GrantLease,
    LeaseBegan,
    LeaseEnded,
    LeaseRequested,
    RefuseLease,
    ResumeLease,
    Rules,
    SetTimer,
    SuspendLease,
    SwapOut,
    Tick,
    Used,
)
from swapserve.scheduler.core import Core
from swapserve.scheduler.knowledge import Knowledge
from swapserve.scheduler.policies.base import Policy
from swapserve.scheduler.policies.registry import POLICIES

RULES = Rules(max_wait_s=30.0, queue_limit=1_000_000, queue_timeout_s=3600.0, retry_backoff_s=2.0)
"""The daemon's defaults, but a queue may be of any length, and one may wait there for an hour."""
MOST_TICKS = 10_000
"""A core that asks for so many ticks in a row at the same moment will never stop."""

_WAITING, _ACTIVE, _SUSPENDED, _OVER = 1, 2, 3, 4
_BEFORE_FIRST, _AFTER_FIRST = 1, 2


class Stuck(Exception):
    """Requests wait and nothing will ever happen any more: a bug of core or simulator."""


def simulate(
    cluster: Cluster,
    workload: Workload,
    policy: str | Policy,
    *,
    rules: Rules = RULES,
    noise: float = 0.0,
    seed: int = 1,
    timed: bool = False,
    knowledge: Knowledge | None = None,
) -> Outcome:
    """Run a workload to its end.

    Args:
        cluster: GPUs and engines. Under `static` its GPUs hold everything at once.
        workload: what is asked.
        policy: a policy, or the name of one of SwapServe's own.
        rules: limits and targets; `slo_itl_s` is only the core's, readers have their own.
        noise: standard deviation of the logarithm of a move's duration; 0: always as in the table.
        seed: of the noise.
        timed: measure how long the core itself takes.
        knowledge: what was learnt before, of engines by the same names; it goes on learning.

    Raises:
        ValueError: no such policy, or a workload that is none.
        IllegalEffect: the core asked for something that cannot be done.
        Stuck: requests wait and nothing will ever happen any more.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"'{policy}' is none of {', '.join(POLICIES)}")
        policy = POLICIES[policy]()
    workload.check(len(cluster.models))
    if not policy.swaps:
        cluster = cluster.boundless()
    run = _Run(cluster, workload, policy, rules, noise=noise, seed=seed, knowledge=knowledge)
    if timed:
        run.time_core()
    return run.to_the_end()


class _Run:
    """One run: the clock, the core, the world, and where each request stands."""

    def __init__(
        self,
        cluster: Cluster,
        workload: Workload,
        policy: Policy,
        rules: Rules,
        *,
        noise: float,
        seed: int,
        knowledge: Knowledge | None = None,
    ) -> None:
        count = len(workload)
        self.workload = workload
        self.records = Records(count)
        self.agenda = Agenda()
        requests = Requests(
            tokens_in=workload.tokens_in,
            tokens_out=workload.tokens_out,
            conversation=workload.conversation,
            first_at=self.records.first_at,
        )
        self.world = World(cluster, requests, self.agenda, noise=noise, seed=seed)
        self.core = Core(*cluster.specs(), rules, policy, knowledge)
        self.policy = policy
        self.now = 0.0
        self.timer: float | None = None
        self.left = count
        self.core_s = 0.0
        self._ticks = 0
        self._handle: Callable[[Event, float], list[Effect]] = self.core.handle
        self._where = bytearray(count)
        self._since = [0.0] * count
        """Of those that are suspended: since when."""
        self._leases = [LeaseId(str(number)) for number in range(count)]
        self._engines = [self.world.engines[model] for model in workload.model]
        self._open = sorted(
            (number for number in range(count) if workload.after[number] == OPEN),
            key=workload.arrival.__getitem__,
        )
        self._next_open = 0
        self._stage_left: dict[int, int] = {}
        self._dependents: dict[int, list[int]] = {}
        for number, stage in enumerate(workload.stage):
            if stage != OPEN:
                self._stage_left[stage] = self._stage_left.get(stage, 0) + 1
            if workload.after[number] != OPEN:
                self._dependents.setdefault(workload.after[number], []).append(number)
        self._do: dict[type[Any], Callable[[Any], None]] = {
            GrantLease: self._grant,
            RefuseLease: self._refuse,
            SuspendLease: self._suspend,
            ResumeLease: self._resume,
            BringIn: lambda effect: self.world.bring_in(effect, self.now),
            SwapOut: lambda effect: self.world.swap_out(effect, self.now),
            Drain: self.world.drain,
            SetTimer: self._set_timer,
        }

    # ------------------------------------------------------------------- loop

    def time_core(self) -> None:
        """From now on, measure how long the core takes."""
        handle = self.core.handle

        def timed(event: Event, now: float) -> list[Effect]:
            begun = time.process_time()
            effects = handle(event, now)
            self.core_s += time.process_time() - begun
            return effects

        self._handle = timed

    def to_the_end(self) -> Outcome:
        begun = time.process_time()
        for seen in self.world.seen():
            self._tell(seen)
        heap, arrival = self.agenda.heap, self.workload.arrival
        while self.left:
            soonest = heap[0][0] if heap else NEVER
            coming = NEVER
            if self._next_open < len(self._open):
                coming = arrival[self._open[self._next_open]]
            next_at = min(soonest, coming)
            if self.timer is not None and self.timer <= next_at and self.timer != NEVER:
                self._tick(self.timer)
            elif coming <= soonest and coming != NEVER:
                self.now = coming
                self._next_open += 1
                self._arrive(self._open[self._next_open - 1])
            elif heap:
                self._happen()
            else:
                raise Stuck(f"{self.left} requests are left at {self.now:.3f} s and nothing is due")
        return self._outcome(time.process_time() - begun)

    def _happen(self) -> None:
        at, _, kind, who = self.agenda.take()
        if kind == ARRIVAL:
            self.now = at
            self._arrive(who)
        elif kind == STEP:
            engine = self.world.engines[who]
            done = self.world.step(engine, at)
            if (began := self.world.began(engine)) != NOBODY and began not in done:
                self.now = at
                self._tell(LeaseBegan(lease=self._leases[began]))
            if done:
                self.now = at
                for request in done:
                    self._answered(request)
        else:
            self.now = at
            self._tell(self.world.finish(self.world.engines[who], at))

    def _tick(self, at: float) -> None:
        self._ticks = self._ticks + 1 if at <= self.now else 0
        if self._ticks > MOST_TICKS:
            raise Stuck(f"{MOST_TICKS} ticks at {self.now:.3f} s")
        self.now = max(self.now, at)
        self.timer = None
        self._tell(Tick())

    def _tell(self, event: Event) -> None:
        self.world.activity.events += 1
        for effect in self._handle(event, self.now):
            do = self._do.get(type(effect))
            if do is None:
                raise IllegalEffect(f"nobody asked for {effect}")
            do(effect)

    # --------------------------------------------------------------- requests

    def _arrive(self, request: int) -> None:
        work = self.workload
        self.records.arrived[request] = self.now
        self._where[request] = _WAITING
        self._tell(
            LeaseRequested(
                lease=self._leases[request],
                engine=self._engines[request].name,
                ask=Ask(
                    priority=work.priority[request],
                    tokens_in=work.tokens_in[request],
                    tokens_max=work.tokens_max[request] or None,
                    key=work.key[request],
                    conversation=work.conversation[request],
                    streams=True,
                ),
            )
        )

    def _grant(self, effect: GrantLease) -> None:
        request = int(effect.lease)
        self._expect(request, _WAITING, "granted")
        self._where[request] = _ACTIVE
        self.records.granted[request] = self.now
        self.world.grant(self._engines[request], request, self.now)

    def _suspend(self, effect: SuspendLease) -> None:
        request = int(effect.lease)
        self._expect(request, _ACTIVE, "suspended")
        self._where[request] = _SUSPENDED
        self._since[request] = self.now
        records = self.records
        before = records.first_at[request] == UNSET
        records.parts[request] |= _BEFORE_FIRST if before else _AFTER_FIRST
        records.spells[request] += 1
        self.world.suspend(self._engines[request], request, self.now)

    def _resume(self, effect: ResumeLease) -> None:
        request = int(effect.lease)
        self._expect(request, _SUSPENDED, "resumed")
        self._where[request] = _ACTIVE
        records = self.records
        spell = self.now - self._since[request]
        records.suspended_s[request] += spell
        records.spell_s[request] = max(records.spell_s[request], spell)
        self.world.resume(self._engines[request], request)

    def _refuse(self, effect: RefuseLease) -> None:
        request = int(effect.lease)
        self._expect(request, _WAITING, "refused")
        self.records.refused[request] = type(effect.error).__name__
        self._over(request)

    def _expect(self, request: int, where: int, what: str) -> None:
        if self._where[request] != where:
            raise IllegalEffect(f"request {request} was {what} in state {self._where[request]}")

    def _answered(self, request: int) -> None:
        records, work = self.records, self.workload
        records.ended[request] = self.now
        parts = records.parts[request]
        first = records.first_at[request]
        self._over(request)
        self._tell(
            LeaseEnded(
                lease=self._leases[request],
                used=Used(
                    tokens_in=work.tokens_in[request],
                    tokens_out=work.tokens_out[request],
                    prefill_s=None if parts & _BEFORE_FIRST else first - records.granted[request],
                    decode_s=None if parts & _AFTER_FIRST else self.now - first,
                ),
            )
        )

    def _over(self, request: int) -> None:
        self._where[request] = _OVER
        self.left -= 1
        stage = self.workload.stage[request]
        if stage == OPEN:
            return
        self._stage_left[stage] -= 1
        if not self._stage_left[stage]:
            for number in self._dependents.get(stage, ()):
                self.agenda.put(self.now + self.workload.arrival[number], ARRIVAL, number)

    def _set_timer(self, effect: SetTimer) -> None:
        self.timer = effect.at

    # ----------------------------------------------------------------- result

    def _outcome(self, cpu_s: float) -> Outcome:
        work = self.workload
        self.world.close(self.now)
        activity = self.world.activity
        activity.seconds = self.now - min(self.records.arrived, default=0.0)
        speeds = [engine.kind.speed for engine in self.world.engines]
        alone = [
            speeds[model].alone_s(tokens_in, tokens_out)
            for model, tokens_in, tokens_out in zip(
                work.model, work.tokens_in, work.tokens_out, strict=True
            )
        ]
        return Outcome(
            workload=work,
            policy=self.policy.name,
            records=self.records,
            activity=activity,
            alone_s=alone,
            covered=self.core.knowledge.service.coverage(),
            cpu_s=cpu_s,
            core_s=self.core_s,
        )
