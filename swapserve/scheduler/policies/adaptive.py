"""The default policy: who comes and who leaves by what is predicted and what was measured. Pure.

**Who comes.** Each wish has a time by which it is due: its requests' time to first token, by
priority and deadline, and for suspended streams the moment at which their readers have read what
was generated ahead of them, but no later than `max_wait`. Earliest due first. Batch work comes
after that, by arrival, until it is near its limit: then it is due, too.

**Who leaves.** Of idle engines the one whose return is expected to cost least: its rate of
arrivals times what the way back and the loss of its cache would take. Of busy ones the one whose
readers have most left to read of what it has generated.

**When.** An idle engine leaves at once. A busy one runs for a slice that grows with the cost of
the swap; over a long time, swaps under contention take no more than `overhead_share` of a device.
If its requests are about to end, they are waited for, since that is cheaper than a preemption.
Batch work makes way for what is interactive after the least slice. A wish whose `max_wait` is
near ends every slice but the least one, without which engines whose swaps take longer than that
would evict each other for ever without a token in between.

Token-level scheduling with quotas from the time between tokens that a reader needs, and groups of
at most eight arrivals, are ideas of Aegaeon (SOSP'25), which rewrites the engine for them.
"""

from itertools import islice
from typing import ClassVar

from swapserve.messages import Rules
from swapserve.scheduler.demand import GROUP_MAX, Engine, Lease, owes_first
from swapserve.scheduler.policies.base import (
    NEVER,
    Leave,
    View,
    Wish,
    comes_in_s,
    last_call,
    limit,
    share,
)
from swapserve.states import EngineState, Priority

LEAST_SLICE = 0.3
"""The shortest slice, in units of the swap that ends it: no age makes it shorter."""
SLICE = 1.0
"""The usual shortest slice, in the same units, as long as the device's overhead is low."""
BATCH_SLICE = 4.0
"""Where its swaps are too dear for `max_wait`, batch work is cut off for other batch work so many
times more seldom than the overhead's share allows: nobody waits for its first token."""
LOOKED_AT = 16
"""Running requests of an engine that are looked at: the latest run longest from now on."""


class Adaptive:
    """Deadlines, predicted work and measured costs."""

    name: ClassVar[str] = "adaptive"
    swaps: ClassVar[bool] = True
    bounded: ClassVar[bool] = True

    def urgency(self, view: View, wish: Wish) -> tuple[float, ...]:
        """Return: those due soonest, then batch work by arrival, unless it is near its limit."""
        engine = wish.engine
        if engine is None:
            return (0.0, wish.since[0])
        if engine.pressing:
            return (0.0, _due(view, engine))
        if last_call(view, wish) <= view.now:
            return (0.0, limit(view, wish))
        return (1.0, _first_arrival(engine))

    def leave(self, view: View, victim: Engine, wish: Wish) -> Leave:
        """Return: idle engines at once, busy ones after their slice or their last request."""
        if victim.idle:
            return Leave(0.0, 0.0, (0.0, _worth(view, victim), victim.idle_since, victim.index))
        at, cut_at = _slice(view, victim, wish)
        draining = victim.state is EngineState.DRAINING
        rank = (1.0, 0.0 if draining else 1.0, -_all_read_at(view, victim), victim.index)
        return Leave(at, cut_at, rank)


# ------------------------------------------------------------------ who comes


def _due(view: View, engine: Engine) -> float:
    """Return by when the engine should be back, for the most pressing of its requests."""
    rules, slo = view.rules, slo_ttft_s(view.rules, engine)
    due = float("inf")
    patience = (0.0, slo, rules.max_wait_s)
    for lease in engine.waiting.heads():
        wanted = lease.since[0] + patience[lease.ask.priority]
        due = min(due, wanted)
    for lease in engine.waiting if engine.waiting.deadlines else ():
        if lease.ask.deadline_s is not None:
            due = min(due, lease.arrived + lease.ask.deadline_s)
    for lease in islice(engine.suspended.values(), LOOKED_AT):
        if _interactive(lease):
            due = min(due, _back_at(view, engine, lease, slo))
    if engine.ins:
        due = min(due, engine.ins_since[0] + slo)
    return due


def _back_at(view: View, engine: Engine, lease: Lease, slo: float) -> float:
    """Return by when a suspended request should go on: before its reader has read all there is."""
    since, most = lease.since[0], view.rules.max_wait_s
    if _first_at(view, engine, lease) > view.now:
        return min(lease.arrived + slo, since + most)  # it owes its first token
    return max(since + slo, min(since + most, _runs_dry_at(view, engine, lease)))


def _first_arrival(engine: Engine) -> float:
    """Return when the oldest of its requests came: what has begun ends before more is begun."""
    leases = (*engine.waiting.heads(), *engine.suspended.values())
    return min((lease.arrived for lease in leases), default=0.0)


def slo_ttft_s(rules: Rules, engine: Engine) -> float:
    """Return the time in which its interactive requests should get their first token."""
    own = engine.spec.slo_ttft_s
    return min(rules.max_wait_s, rules.slo_ttft_s if own is None else own)


def slo_itl_s(rules: Rules, engine: Engine) -> float:
    """Return the mean gap between tokens that its readers do not mind."""
    own = engine.spec.slo_itl_s
    return rules.slo_itl_s if own is None else own


# ----------------------------------------------------------------- who leaves


def _worth(view: View, victim: Engine) -> float:
    """Return the seconds that keeping an idle engine for `max_wait` is expected to save."""
    knowledge, name, to = view.knowledge, victim.name, view.below(victim)
    costs = knowledge.costs
    returns = knowledge.arrivals.rate(name, view.now) * view.rules.max_wait_s
    back = costs.in_s(name, to, busy=False)
    # A cache that is worth more than its copy is copied, and so not lost.
    copy = costs.out_s(name, to, busy=True) + costs.in_s(name, to, busy=True)
    copy -= costs.out_s(name, to, busy=False) + back
    return returns * back + min(knowledge.caches.worth_s(name, view.now), max(0.0, copy))


def _all_read_at(view: View, victim: Engine) -> float:
    """Return until when all of its readers could go on reading if it stopped now."""
    leases = islice(reversed(victim.active.values()), LOOKED_AT)
    return min(_runs_dry_at(view, victim, lease) for lease in leases)


def _runs_dry_at(view: View, engine: Engine, lease: Lease) -> float:
    """Return when its reader will have read all tokens that there are by now."""
    if not _interactive(lease):
        return view.now + view.rules.max_wait_s
    service = view.knowledge.service
    first_s = service.first_s(engine.name, lease.ask)
    began_at = lease.granted_at + first_s if lease.began_at is None else lease.began_at
    tokens = max(0.0, lease.ran(view.now) - first_s) / service.itl_s(engine.name)
    return began_at + tokens * slo_itl_s(view.rules, engine)


def _interactive(lease: Lease) -> bool:
    return lease.ask.priority is not Priority.BATCH


# ----------------------------------------------------------------------- when


def _slice(view: View, victim: Engine, wish: Wish) -> tuple[float, float]:
    """Return from when a busy victim is asked to leave, and from when it is cut off."""
    rules, costs = view.rules, view.knowledge.costs
    to = view.below(victim)
    out = costs.out_s(victim.name, to, busy=True)
    comes = 0.0 if wish.engine is None else comes_in_s(view, wish.engine)
    swap = out + comes
    if wish.engine is None:  # bytes that are in use already cannot wait for anybody's last token
        at = victim.ready_since + LEAST_SLICE * swap
        return at, at
    if _yields(victim, wish):
        least = at = victim.ready_since + LEAST_SLICE * swap
    else:
        least = victim.ready_since + _least_slice(view, victim, swap)
        if rules.quantum_s is not None:
            base = victim.ready_since + rules.quantum_s
            least = min(least, base)
        else:
            base = max(victim.ready_since + SLICE * swap, _affordable_at(view, victim, swap))
        at = max(least, min(base, last_call(view, wish)))
        if _overtaken(victim, wish):
            at = min(at, max(least, view.now))
    cut_at = max(at, min(_first_tokens_at(view, victim), last_call(view, wish)))
    if not _overtaken(victim, wish):
        at = cut_at  # it serves whoever comes until it goes
    # Waiting is worth what a preemption costs more than a drain, there and back.
    dearer = max(0.0, out - costs.out_s(victim.name, to, busy=False))
    patience = dearer + costs.in_s(victim.name, to, busy=True)
    left = _remaining_s(view, victim)
    beyond = limit(view, wish) > wish.since[0] + rules.max_wait_s
    if beyond and _both_batch(victim, wish):
        return at, max(at, victim.ready_since + BATCH_SLICE * swap / share(view))
    latest = last_call(view, wish)
    if left <= dearer or (left <= patience and view.now + left <= latest):
        begun = max(least, wish.since[0])
        longest = begun + 2 * dearer if left <= dearer else min(begun + 2 * patience, latest)
        return begun, max(begun, min(view.now + patience, longest))
    return at, cut_at


def _first_tokens_at(view: View, victim: Engine) -> float:
    """Return when those of its requests that somebody waits for should all have begun to answer.

    Until then nobody has anything to read, and an engine that is cut off again and again would
    never get so far.
    """
    return max((_first_at(view, victim, one) for one in victim.active.values()), default=0.0)


def _first_at(view: View, engine: Engine, lease: Lease) -> float:
    """Return when a request's first token has come or is expected; nobody waits for a batch's."""
    if not _interactive(lease) or lease.began_at is not None:
        return 0.0
    if owes_first(lease):
        return NEVER
    left = view.knowledge.service.first_s(engine.name, lease.ask) - lease.ran(view.now)
    return view.now + max(0.0, left)


def _least_slice(view: View, victim: Engine, swap: float) -> float:
    """Return how long the victim runs, in seconds, however old the wish is.

    If so many engines want the device that not even the least slices let everybody be served within
    `max_wait`, nothing is gained by them but overhead.
    """
    rules = view.rules
    round_s = max(view.round_s.get(device, swap) for device in victim.spec.devices)
    if (1.0 + LEAST_SLICE) * round_s <= rules.max_wait_s:
        return LEAST_SLICE * swap
    return max(LEAST_SLICE, (1.0 - share(view)) / share(view)) * swap


def _yields(victim: Engine, wish: Wish) -> bool:
    """Return whether an interactive wish meets a victim that does only batch work."""
    pressing = wish.engine is not None and wish.engine.pressing
    return pressing and not any(map(_interactive, victim.active.values()))


def _both_batch(victim: Engine, wish: Wish) -> bool:
    """Return whether batch work wants the place of batch work."""
    wanted = wish.engine is not None and not wish.engine.pressing
    return wanted and not any(map(_interactive, victim.active.values()))


def _affordable_at(view: View, victim: Engine, swap: float) -> float:
    """Return from when the swap keeps the device's overhead within its share."""
    return max(
        view.overhead[device].allowed_at(2 * swap, share(view), view.now)
        for device in victim.spec.devices
    )


def _overtaken(victim: Engine, wish: Wish) -> bool:
    """Return whether a whole group of requests of the victim has overtaken the wish."""
    return len(victim.granted) == GROUP_MAX and victim.granted[0] > wish.since[0]


def _remaining_s(view: View, victim: Engine) -> float:
    """Return the seconds until its requests are expected to be done."""
    service, name = view.knowledge.service, victim.name
    leases = islice(reversed(victim.active.values()), LOOKED_AT)
    return max(service.remaining(name, lease.ask, lease.ran(view.now)).p50_s for lease in leases)
