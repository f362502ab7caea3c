"""Who comes onto the devices of one group, who leaves them, and when to look again. Pure.

A plan is made afresh from the present demand, in the policy's order, so nothing planned can be out
of date: if the client that called for an engine leaves, its claim and the drain of its victim are
gone with the next plan. Only transitions that have begun stay.

Each wish takes free bytes on all of its devices, then bytes that are leaving already, then
victims. A wish whose victims may not leave yet (quantum, pause after a failure) blocks younger
ones on its devices: else a stream of small wishes could keep a large one out for ever. It does
not block when only an engine that cannot be moved at all now stands in its way.

On an exclusive device (a GPU) one transition is under way at a time. What would begin takes its
turn on all the devices that it touches, in the order of this plan, and what has to wait keeps its
turn before everything younger. Nothing holds a turn from one plan to the next, so nobody waits in
a circle, and the oldest waits only for what is under way.
"""

from collections.abc import Iterable, Sequence

from swapserve.ids import DeviceName
from swapserve.messages import Footprint
from swapserve.scheduler import commands
from swapserve.scheduler.ahead import ahead
from swapserve.scheduler.board import Board
from swapserve.scheduler.demand import AWAY, BRINGING_IN, MOVING, SERVING, Engine
from swapserve.scheduler.groups import uses
from swapserve.scheduler.needs import capacity_error, needed
from swapserve.scheduler.order import hand_over
from swapserve.scheduler.policies.base import NEVER, Wish, last_call
from swapserve.scheduler.victims import Candidate, candidates, choose, hopeful, spared
from swapserve.states import EngineState, Tier


def place(board: Board, group: int) -> tuple[float | None, bool]:
    """Plan one group of devices and start what can start.

    Returns:
        When to look again though nothing happens (None: never), and whether anybody still waits
        for bytes, so that an engine becoming idle matters.
    """
    return _Plan(board, group).run()


class _Plan:
    """One pass over one group."""

    def __init__(self, board: Board, group: int) -> None:
        self.board = board
        self.group = group
        self.devices = board.groups[group]
        self.engines = board.by_group[group]
        self.wake: float | None = None
        self.pending = False
        self.chosen: set[int] = set()
        """Victims of this plan; some drain, or wait for their turn."""
        self.blocked: set[DeviceName] = set()
        """Devices on which younger wishes stand back."""
        for device in self.devices:
            board.ledger.drop_claims(device)
            board.wished_since.pop(device, None)
        self.taken = self._run_commands()
        """Exclusive devices with a transition under way, or with somebody's turn before ours."""
        self.room = {device: board.ledger.room(device) for device in self.devices}
        self.soon = dict.fromkeys(self.devices, 0)
        for engine in self.engines:
            if engine.outs or engine.state in MOVING:
                for device in uses(engine.spec):
                    self.soon[device] += self._going(engine, device)

    def run(self) -> tuple[float | None, bool]:
        if self.board.shutting_down:
            self._open_spared()
            return None, False
        board = self.board
        self._add_up_round()
        self._pay_debts()
        for engine, wish in self._wishes():
            if engine.state not in AWAY:
                continue  # another wish has just made this one leave, broken or parked as it was
            devices = engine.spec.devices
            if not self.blocked.isdisjoint(devices) or not self._serve(engine, wish):
                self.blocked.update(devices)
                for device in devices:
                    oldest = board.wished_since.get(device, NEVER)
                    board.wished_since[device] = min(oldest, wish.since[0])
                over_age = wish.since[0] + self.board.rules.max_wait_s
                for time in (last_call(self.board.view, wish), over_age):
                    if time > self.board.now:
                        # It may be first then; a timer must see to it, not the next arrival.
                        self._look_at(time)
        self._open_spared()
        self._expire_idle()
        self._look_ahead()
        return self.wake, self.pending

    def _look_at(self, time: float) -> None:
        if time < (NEVER if self.wake is None else self.wake):
            self.wake = time

    def _take_turn(self, devices: Iterable[DeviceName]) -> bool:
        """Return whether a transition that touches these may begin; if not, it is next."""
        exclusive = self.board.exclusive.intersection(devices)
        free = self.taken.isdisjoint(exclusive)
        self.taken |= exclusive
        return free

    def _going(self, engine: Engine, device: DeviceName) -> int:
        """Return the bytes that the engine is about to give back there in any case."""
        if engine.outs and engine.state in SERVING:
            return self.board.held(engine, device)
        return self.board.frees(engine, device)

    # --------------------------------------------------------------- operators

    def _run_commands(self) -> set[DeviceName]:
        """Carry out commands that waited for their turn; return the exclusive devices in use."""
        waiting: set[DeviceName] = set()
        for engine in self.engines:
            commands.run_queued(self.board, engine)
            if engine.outs and engine.state in SERVING:
                commands.leave(self.board, engine)
            if engine.state not in MOVING and (engine.queued or self._goes_for_operator(engine)):
                waiting |= self.board.touched(engine)
        return waiting | self.board.in_use(self.devices)

    def _goes_for_operator(self, engine: Engine) -> bool:
        return bool(engine.outs) and (engine.idle or self.board.survives(engine))

    # ------------------------------------------------------------------ coming

    def _add_up_round(self) -> None:
        costs, below = self.board.knowledge.costs, self.board.below
        round_s = dict.fromkeys(self.devices, 0.0)
        for engine in self.engines:
            if engine.active or engine.calling() is not None:
                to, busy = below(engine), bool(engine.active or engine.suspended)
                seconds = costs.out_s(engine.name, to, busy=busy)
                seconds += costs.in_s(engine.name, to, busy=busy)
                for device in engine.spec.devices:
                    round_s[device] += seconds
        self.board.view.round_s = round_s

    def _wishes(self) -> list[tuple[Engine, Wish]]:
        """Return who wants to come in and may, in the policy's order."""
        wishes = []
        policy, view = self.board.policy, self.board.view
        for engine in self.engines:
            if engine.left_for is not None and engine.left_for.calling() is None:
                engine.left_for = None  # nobody waits for that one any more
            since = engine.calling()
            if engine.state not in AWAY or since is None:
                continue
            not_before = max(engine.retry_at, engine.hold_until)
            if not_before > self.board.now:
                self._look_at(not_before)
            elif self._can_fit(engine):
                wish = Wish(since, engine)
                wishes.append((policy.urgency(view, wish), since, engine, wish))
        wishes.sort(key=lambda one: one[:2])
        return hand_over([(engine, wish) for _, _, engine, wish in wishes])

    def _can_fit(self, engine: Engine) -> bool:
        error = capacity_error(self.board, engine)
        if error is None:
            return True
        self.board.refuse_waiting(engine, error)
        self.board.answer(engine.ins, error)
        return bool(engine.suspended)

    def _serve(self, engine: Engine, wish: Wish) -> bool:
        """Bring the engine in or make room for it; False if younger wishes must stand back."""
        board = self.board
        sizes = needed(board, engine)
        missing = {
            device: size - board.held(engine, device) - self.room[device]
            for device, size in sizes.items()
        }
        if max(missing.values()) <= 0:
            if self._take_turn(sizes):
                self._bring_in(engine, sizes)
            else:
                self._claim(engine, sizes)
            return True
        self.pending = True
        short = {
            device: size - self.soon[device]
            for device, size in missing.items()
            if size > max(0, self.soon[device])
        }
        if short:
            found = candidates(board, self.chosen, short, wish)
            made = self._make_room(found, short, engine)
            if made is None:
                return True
            if not made:
                self._claim(engine, sizes)
                return False
        for device, size in missing.items():
            self.soon[device] -= max(0, size)
        self._claim(engine, sizes)
        return True

    def _bring_in(self, engine: Engine, sizes: Footprint) -> None:
        for device, size in sizes.items():
            self.room[device] -= max(0, size - self.board.held(engine, device))
        self.board.bring_in(engine, sizes)

    def _claim(self, engine: Engine, sizes: Footprint) -> None:
        """Set aside what is free of what it needs; the debt of a device is counted only once."""
        claims = {}
        for device, size in sizes.items():
            room = max(0, self.room[device])
            claims[device] = min(room, max(0, size - self.board.held(engine, device)))
            self.room[device] = room - claims[device]
        self.board.ledger.claim(engine.name, claims)

    def _look_ahead(self) -> None:
        """Bring engines nearer that nobody has asked for yet, while that costs nobody anything."""
        wanted, again = ahead(self.board, self.board.view, self.group)
        if again is not None:
            self._look_at(again)
        for engine, tier in wanted:
            if tier is Tier.HOST:
                if self._promote(engine):
                    return
                continue
            sizes = needed(self.board, engine)
            if self._has_room(engine, sizes):
                if self._take_turn(sizes):
                    configured = engine.preload
                    self._bring_in(engine, sizes)
                    if not configured:
                        engine.ahead_to = tier
                        return
            elif not self._somebody_comes(engine.spec.devices):
                engine.preload = False

    def _promote(self, engine: Engine) -> bool:
        """Bring it to host memory if there is room; return whether that has begun."""
        ram = engine.spec.ram
        if ram is None or ram in self.blocked or self.room[ram] < self.board.host_size(engine):
            return False
        before = self.board.ledger.room(ram)
        self.board.promote(engine)
        engine.ahead_to = Tier.HOST
        self.room[ram] += self.board.ledger.room(ram) - before
        return True

    def _has_room(self, engine: Engine, sizes: Footprint) -> bool:
        fits = all(self.room[device] >= size for device, size in sizes.items())
        return (
            fits and self.blocked.isdisjoint(sizes) and capacity_error(self.board, engine) is None
        )

    def _somebody_comes(self, devices: Iterable[DeviceName]) -> bool:
        return any(
            engine.state in BRINGING_IN
            for device in devices
            for engine in self.board.by_device[device]
        )

    # ----------------------------------------------------------------- leaving

    def _make_room(
        self, found: Sequence[Candidate], short: Footprint, comes: Engine | None
    ) -> bool | None:
        """Make victims leave. False: time will let enough of them go. None: it will not."""
        usual = [one for one in found if not spared(one.engine)]
        for those in (usual, found):
            victims = choose(those, short, self.board.now)
            if victims:
                self._make_leave(victims, comes)
                return True
            if hopeful(self.board, those, short):
                self._look_again_for(those)
                return False
        self._look_again_for(found)
        return None

    def _look_again_for(self, those: Iterable[Candidate]) -> None:
        for candidate in those:
            if candidate.at > self.board.now:
                self._look_at(candidate.at)

    def _make_leave(self, victims: Iterable[Candidate], comes: Engine | None) -> None:
        """Let each leave as soon as it is its turn; until then it is nobody else's victim."""
        board = self.board
        cause = "overcommitted" if comes is None else f"room for {comes.name}"
        for victim in victims:
            engine = victim.engine
            self.chosen.add(engine.index)
            for device, size in victim.sizes.items():
                self.soon[device] += size
            busy = not engine.idle or (engine.parked and engine.suspended)
            if engine.state is EngineState.FAILED:
                if self._take_turn(board.touched(engine)):
                    board.stop(engine, cause)
            elif busy and not victim.to_disk and self._ram_comes(victim, comes):
                continue
            elif not busy or self._interrupts(victim):
                parked = engine.parked
                self._swap_out(engine, cause, to_disk=victim.to_disk)
                if not parked and engine.state is EngineState.SWAPPING_OUT:
                    engine.left_for = comes
            else:
                self._drain(victim)

    def _interrupts(self, victim: Candidate) -> bool:
        """Return whether a victim with requests inside goes now, and they survive it."""
        wanted = victim.engine.parked or victim.cut_at <= self.board.now
        return wanted and self.board.survives(victim.engine, to_disk=victim.to_disk)

    def _ram_comes(self, victim: Candidate, comes: Engine | None) -> bool:
        """Return whether RAM is being freed for a busy victim that would go to disk otherwise.

        What nobody asks for moves aside: an idle engine's image on disk is often as good as its
        state in RAM, while requests would have to be written there, and read again.
        """
        board, engine = self.board, victim.engine
        ram = engine.spec.ram
        if ram is None or engine.parked or victim.cut_at > board.now or engine.out_failures:
            return False
        short = board.host_size(engine) - board.held(engine, ram) - board.ledger.room(ram)
        if short <= 0:
            return False
        leaving = sum(board.frees(one, ram) for one in board.by_device[ram])
        if leaving >= short:
            return True
        wish = Wish((board.now, 0))
        idle = [
            one
            for one in candidates(board, self.chosen, {ram: short}, wish)
            if one.to_disk and not one.engine.suspended and not spared(one.engine)
        ]
        found = choose(idle, {ram: short - leaving}, board.now)
        self._make_leave(found, comes)
        return bool(found)

    def _swap_out(self, engine: Engine, cause: str, *, to_disk: bool = False) -> None:
        if not self._take_turn(self.board.touched(engine)):
            return
        ram = engine.spec.ram
        before = 0 if ram is None else self.board.ledger.room(ram)
        self.board.swap_out(engine, cause, to_disk=to_disk)
        if ram is not None:
            self.room[ram] += self.board.ledger.room(ram) - before

    def _drain(self, victim: Candidate) -> None:
        engine = victim.engine
        if engine.state is EngineState.READY:
            self.board.drain(engine)
        if engine.can_preempt and self.board.now < victim.cut_at < NEVER:
            self._look_at(victim.cut_at)

    def _pay_debts(self) -> None:
        """Make others leave while measured use is beyond a device's size."""
        wish = Wish((self.board.now, 0))
        for device in self.devices:
            debt = -self.room[device] - self.soon[device]
            if debt > 0:
                self.pending = True
                found = [
                    one
                    for one in candidates(self.board, self.chosen, {device: debt}, wish)
                    if one.engine.parked or not self.board.ledger.excess(device, one.engine.name)
                ]
                self._make_room(found, {device: debt}, None)

    def _open_spared(self) -> None:
        for engine in self.engines:
            needless = engine.index not in self.chosen and not engine.outs
            if engine.state is EngineState.DRAINING and needless:
                self.board.open_again(engine)

    def _expire_idle(self) -> None:
        for engine in self.engines:
            ttl = engine.spec.ttl_s
            if ttl is None or engine.pinned or not engine.idle:
                continue
            if engine.state is EngineState.READY:
                kept = max(engine.guard_until, engine.ready_since + engine.spec.min_resident_s)
                due = max(engine.idle_since + ttl, engine.out_retry_at, kept)
                if due <= self.board.now:
                    self._swap_out(engine, "ttl")
                    engine.ahead_from = self.board.now + ttl
                else:
                    self._look_at(due)
