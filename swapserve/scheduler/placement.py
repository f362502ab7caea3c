"""Who comes onto one device, who leaves it, and when to look again. Pure.

A plan is made afresh from the present demand, oldest wish first, so nothing planned can be out
of date: if the client that called for an engine leaves, its claim and the drain of its victim are
gone with the next plan. Only transitions that have begun stay.

Each wish takes free bytes, then bytes that are leaving already, then victims. A wish whose
victims may not leave yet (quantum, pause after a failure) blocks younger ones on that device:
else a stream of small wishes could keep a large one out for ever. It does not block when only
an engine that cannot be moved at all now stands in its way.
"""

from collections.abc import Iterable

from swapserve.errors import CapacityError
from swapserve.ids import DeviceName
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import AWAY, BRINGING_IN, LEAVING, SERVING, Engine, Since
from swapserve.scheduler.policy import (
    Candidate,
    choose,
    over_age_at,
    preempts,
    victim_from,
    victim_rank,
)
from swapserve.states import EngineState, Tier


def available(board: Board, engine: Engine) -> int:
    """Return how many bytes its device could offer it if every unpinned engine left."""
    device = engine.spec.device
    pinned = sum(
        board.held(other)
        for other in board.by_device[device]
        if other.pinned
        and other is not engine
        and other.state not in LEAVING
        # A placeholder for bytes that nobody knows yet must not make others fail.
        and not (other.need is None and other.state in BRINGING_IN)
    )
    return max(0, board.ledger.capacity(device) - pinned)


def needed(board: Board, engine: Engine) -> int:
    """Return the bytes to promise it: an unknown footprint takes all that is not pinned."""
    if engine.need is None:
        return max(1, available(board, engine))
    if engine.suspended:
        # It ran here before, so it gets another chance with the device to itself.
        return min(engine.need, board.ledger.capacity(engine.spec.device))
    return engine.need


def capacity_error(board: Board, engine: Engine) -> CapacityError | None:
    """Return why the engine cannot fit whatever leaves, or None."""
    offered = available(board, engine)
    wanted = max(1, offered) if engine.need is None else engine.need
    if wanted <= offered:
        return None
    return CapacityError(engine.name, engine.spec.device, wanted, offered)


def place(board: Board, device: DeviceName) -> tuple[float | None, bool]:
    """Plan one device and start what can start.

    Returns:
        When to look again though nothing happens (None: never), and whether anybody still waits
        for bytes, so that an engine becoming idle matters.
    """
    return _Plan(board, device).run()


class _Plan:
    """One pass over one device."""

    def __init__(self, board: Board, device: DeviceName) -> None:
        board.ledger.drop_claims(device)
        self.board = board
        self.device = device
        self.engines = board.by_device.get(device, [])
        self.wake: float | None = None
        self.pending = False
        self.kept_draining: set[int] = set()
        self._swap_out_for_operator()
        self.room = board.ledger.room(device)
        self.soon = sum(board.held(e) for e in self.engines if e.state in LEAVING or e.outs)

    def run(self) -> tuple[float | None, bool]:
        if self.board.shutting_down:
            self._open_spared()
            return None, False
        self._pay_debt()
        for engine, since in self._wishes():
            # An older wish may just have made this one leave, broken as it was.
            if engine.state in AWAY and not self._serve(engine, since):
                break
        self._open_spared()
        self._expire_idle()
        self._preload()
        return self.wake, self.pending

    def _look_at(self, time: float) -> None:
        if self.wake is None or time < self.wake:
            self.wake = time

    # ------------------------------------------------------------------ coming

    def _wishes(self) -> list[tuple[Engine, Since]]:
        """Return who wants to come in and may, oldest wish first."""
        wishes = []
        for engine in self.engines:
            since = engine.calling()
            if engine.state not in AWAY or since is None:
                continue
            not_before = max(engine.retry_at, engine.hold_until)
            if not_before > self.board.now:
                self._look_at(not_before)
            elif self._can_fit(engine):
                wishes.append((engine, since))
        return sorted(wishes, key=lambda wish: wish[1])

    def _can_fit(self, engine: Engine) -> bool:
        error = capacity_error(self.board, engine)
        if error is None:
            return True
        self.board.refuse_waiting(engine, error)
        self.board.answer(engine.ins, error)
        if not engine.suspended:
            return False
        return needed(self.board, engine) <= available(self.board, engine)

    def _serve(self, engine: Engine, since: Since) -> bool:
        """Bring the engine in or make room for it; False if younger wishes must stand back."""
        size = needed(self.board, engine)
        missing = size - self.board.held(engine) - self.room
        if missing <= 0:
            self.board.bring_in(engine, size)
            self.room = -missing
            return True
        self.pending = True
        short = missing - self.soon
        if short > 0:
            candidates = self._candidates(engine, since)
            victims = choose(candidates, short, self.board.now)
            if not victims:
                self._look_again_for(candidates)
                if not self._hopeful(candidates, short):
                    return True
                self._claim(engine)
                return False
            self._make_leave(victims, since, f"room for {engine.name}")
        self.soon -= missing
        self._claim(engine)
        return True

    def _claim(self, engine: Engine) -> None:
        if self.room > 0:
            self.board.ledger.claim(self.device, engine.name, self.room)
        self.room = 0

    def _preload(self) -> None:
        """Bring in preload engines while that costs nobody anything."""
        board = self.board
        for engine in self.engines:
            if engine.state not in AWAY:
                engine.preload = False
            if not engine.preload:
                continue
            size = needed(board, engine)
            if capacity_error(board, engine) is None and self.room >= size:
                board.bring_in(engine, size)
                self.room -= size
            elif not any(other.state in BRINGING_IN for other in self.engines):
                engine.preload = False

    # ----------------------------------------------------------------- leaving

    def _candidates(self, engine: Engine | None, since: Since) -> list[Candidate]:
        policy = self.board.policy
        return [
            Candidate(victim, size, victim_from(policy, victim, since), victim_rank(victim))
            for victim in self.engines
            if victim is not engine
            and victim.index not in self.kept_draining
            and _may_be_victim(victim)
            and (size := self.board.held(victim)) > 0
        ]

    def _hopeful(self, candidates: Iterable[Candidate], short: int) -> bool:
        """Return whether time alone will let enough engines leave."""
        now = self.board.now
        soon = sum(one.size for one in candidates if one.engine.out_retry_at <= now)
        coming = sum(
            self.board.held(other)
            for other in self.engines
            if other.state in BRINGING_IN and not other.pinned
        )
        return soon + coming >= short

    def _look_again_for(self, candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            if candidate.from_time > self.board.now:
                self._look_at(candidate.from_time)

    def _make_leave(self, victims: Iterable[Candidate], since: Since, cause: str) -> None:
        board = self.board
        for victim in victims:
            engine = victim.engine
            self.soon += victim.size
            if engine.state is EngineState.FAILED:
                board.stop(engine, cause)
            elif engine.idle or preempts(board.policy, engine, since, board.now):
                board.swap_out(engine, cause)
            else:
                self._drain(engine, since)

    def _drain(self, engine: Engine, since: Since) -> None:
        self.kept_draining.add(engine.index)
        if engine.state is EngineState.READY:
            self.board.drain(engine)
        if engine.can_preempt:
            self._look_at(over_age_at(self.board.policy, since))

    def _pay_debt(self) -> None:
        """Make others leave while measured use is beyond the device's size."""
        debt = -self.room - self.soon
        if debt <= 0:
            return
        self.pending = True
        since = (self.board.now, 0)
        candidates = [
            one
            for one in self._candidates(None, since)
            if not self.board.ledger.excess(self.device, one.engine.name)
        ]
        victims = choose(candidates, debt, self.board.now)
        if victims:
            self._make_leave(victims, since, "overcommitted")
        else:
            self._look_again_for(candidates)

    def _swap_out_for_operator(self) -> None:
        for engine in self.engines:
            if engine.outs and engine.state in SERVING and engine.idle:
                self.board.swap_out(engine, "operator")

    def _open_spared(self) -> None:
        for engine in self.engines:
            spared = engine.index not in self.kept_draining and not engine.outs
            if engine.state is EngineState.DRAINING and spared:
                self.board.open_again(engine)
        self.pending = self.pending or bool(self.kept_draining)

    def _expire_idle(self) -> None:
        for engine in self.engines:
            ttl = engine.spec.ttl_s
            if ttl is None or engine.pinned or not engine.idle:
                continue
            if engine.state is EngineState.READY:
                due = max(engine.idle_since + ttl, engine.out_retry_at)
                if due <= self.board.now:
                    self.board.swap_out(engine, "ttl")
                else:
                    self._look_at(due)


def _may_be_victim(engine: Engine) -> bool:
    if engine.pinned or engine.outs:
        return False
    if engine.state is EngineState.FAILED:
        # Dead weight: a broken engine that may still hold bytes, and nothing worth keeping.
        return engine.tier is Tier.DEVICE and not engine.suspended
    return engine.state in SERVING
