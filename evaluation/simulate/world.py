"""The simulated machine: engines that carry out what the core asks for, and answer it.

It is strict. An effect that a real machine could not carry out, or only at the price of an answer,
raises `IllegalEffect`: a move onto memory that is not free, two moves on one GPU, a request let
into an engine that is away or drains, requests lost in a swap. So each simulation is also a test of
the core.
"""

import math
import random

from evaluation.simulate.agenda import MOVED, STEP, Agenda
from evaluation.simulate.books import Books
from evaluation.simulate.cluster import Cluster
from evaluation.simulate.costs import Way
from evaluation.simulate.engine import Engine, IllegalEffect
from evaluation.simulate.outcome import Activity
from evaluation.simulate.server import NEVER, NOBODY, Requests, Server
from swapserve.messages import BringIn, Drain, EngineLeft, EngineReady, EngineSeen, SwapOut
from swapserve.states import EngineState, Tier

_S = EngineState
_AWAY = frozenset({_S.STOPPED, _S.SWAPPED_OUT})
_SERVING = frozenset({_S.READY, _S.DRAINING})
_BELOW = frozenset({Tier.HOST, Tier.DISK})


class World:
    """All engines, and the books of what they hold."""

    def __init__(
        self, cluster: Cluster, requests: Requests, agenda: Agenda, *, noise: float, seed: int
    ) -> None:
        self.engines = [
            Engine(index, model, Server(model.kind.speed, requests))
            for index, model in enumerate(cluster.models)
        ]
        self.by_name = {engine.name: engine for engine in self.engines}
        self.activity = Activity(gpus=cluster.gpus)
        self._books = Books(cluster.gpu_bytes, cluster.ram_bytes, self.activity)
        self._agenda = agenda
        self._noise = noise
        self._rng = random.Random(f"{seed} moves")

    def seen(self) -> list[EngineSeen]:
        """Put all engines in their first place and return what a daemon would find.

        Each has been started once and left an image. The first ones, which are the most popular,
        serve as long as they fit, the next ones rest in host memory.
        """
        return [self._place(engine) for engine in self.engines]

    def _place(self, engine: Engine) -> EngineSeen:
        kind = engine.kind
        if self._books.fits(engine):
            self._books.hold(engine)
            engine.state, engine.tier = _S.READY, Tier.DEVICE
        else:
            engine.server.freeze()
            if kind.has(Tier.HOST) and self._books.fits_ram(engine):
                engine.state, engine.tier = _S.SWAPPED_OUT, Tier.HOST
                self._books.hold_ram(engine, kept=False)
                self._books.give_back(engine, -kind.residue_bytes)
            elif kind.has(Tier.DISK):
                engine.state, engine.tier = _S.SWAPPED_OUT, Tier.DISK
        return EngineSeen(
            engine=engine.name,
            state=engine.state,
            tier=engine.tier,
            footprint=engine.footprint(),
            can_preempt=kind.preempts,
            can_dump=kind.dumps,
            host_bytes=engine.host_bytes,
            residue=engine.residue(),
        )

    # --------------------------------------------------------------- requests

    def grant(self, engine: Engine, request: int, now: float) -> None:
        """Let a request into its engine."""
        if engine.state is not _S.READY:
            raise IllegalEffect(f"{engine.name}: request {request} let in while {engine.state}")
        slots = engine.model.slots
        if slots is not None and engine.active >= slots:
            raise IllegalEffect(f"{engine.name}: more than {slots} requests inside")
        engine.active += 1
        engine.server.advance(now)
        engine.server.add(request)
        self._settle(engine, now)

    def suspend(self, engine: Engine, request: int, now: float) -> None:
        """Take note that a request's engine is about to go."""
        engine.active -= 1
        engine.suspended += 1
        engine.server.advance(now)
        self.activity.preemptions += 1
        self.activity.tokens_preempted += engine.server.tokens_made(request)

    def resume(self, engine: Engine, request: int) -> None:
        """Take note that a request goes on."""
        if engine.state is not _S.READY:
            raise IllegalEffect(f"{engine.name}: request {request} resumed while {engine.state}")
        engine.suspended -= 1
        engine.active += 1

    def step(self, engine: Engine, at: float) -> list[int]:
        """Do what is due in an engine; return which requests got their last token."""
        if at != engine.pending:
            return []  # an entry that an earlier one has replaced
        engine.pending = NEVER
        server = engine.server
        if server.due > at:
            self._schedule(engine)
            return []
        server.advance(at)
        done = server.step()
        engine.active -= len(done)
        self._settle(engine, at)
        return done

    def began(self, engine: Engine) -> int:
        """Return whose first token came in the engine's last step, once; `NOBODY`: nobody's."""
        found, engine.server.began = engine.server.began, NOBODY
        return found

    # ------------------------------------------------------------------ moves

    def bring_in(self, effect: BringIn, now: float) -> None:
        """Begin to bring an engine onto its devices, or from disk into host memory."""
        engine = self.by_name[effect.engine]
        if engine.state not in _AWAY:
            raise IllegalEffect(f"{engine.name}: brought in while {engine.state}")
        if effect.to is Tier.HOST:
            self._raise(engine, now)
            return
        self._books.occupy(engine)
        self._books.hold(engine)
        if engine.tier is Tier.NONE:
            seconds = engine.kind.cold_s
            engine.state = _S.STARTING
            self.activity.cold_starts += 1
        else:
            seconds = engine.kind.cheapest(engine.tier, kept=engine.kept).in_s
            engine.state = _S.SWAPPING_IN
            self.activity.swaps_in += 1
        self._begin(engine, Tier.DEVICE, seconds, now, on_gpus=True)

    def _raise(self, engine: Engine, now: float) -> None:
        if engine.tier is not Tier.DISK or not engine.kind.has(Tier.HOST):
            raise IllegalEffect(f"{engine.name}: brought to host memory from {engine.tier}")
        self._books.hold_ram(engine, kept=engine.kept)
        engine.state = _S.SWAPPING_IN
        whole = engine.kind.cheapest(Tier.DISK, kept=engine.kept).in_s
        rest = engine.kind.cheapest(Tier.HOST, kept=engine.kept).in_s
        self.activity.raised += 1
        self._begin(engine, Tier.HOST, max(0.0, whole - rest), now, on_gpus=False)

    def swap_out(self, effect: SwapOut, now: float) -> None:
        """Begin to move an engine off its devices, or from host memory to disk."""
        engine = self.by_name[effect.engine]
        if effect.to not in _BELOW:
            raise IllegalEffect(f"{engine.name}: swapped out to {effect.to}")
        if effect.in_flight != engine.suspended or engine.active:
            raise IllegalEffect(
                f"{engine.name}: {engine.active} requests run and {engine.suspended} are suspended,"
                f" not {effect.in_flight}"
            )
        if engine.state is _S.SWAPPED_OUT and engine.tier is Tier.HOST:
            self._lower(engine, effect, now)
        elif engine.state in _SERVING:
            self._leave(engine, effect, now)
        else:
            raise IllegalEffect(f"{engine.name}: swapped out while {engine.state}")

    def _leave(self, engine: Engine, effect: SwapOut, now: float) -> None:
        tier, kind = effect.to, engine.kind
        if tier is Tier.HOST and not kind.has(tier):
            raise IllegalEffect(f"{engine.name}: it has no host tier")
        self._books.occupy(engine)
        kept, seconds = self._way_out(engine, tier, effect.in_flight, effect.cache_s)
        if not kind.has(tier):
            tier = Tier.NONE
        if tier is Tier.HOST:
            self._books.hold_ram(engine, kept=kept)
        engine.server.advance(now)
        engine.server.freeze()
        self._settle(engine, now)
        engine.kept = kept
        engine.state = _S.SWAPPING_OUT
        self.activity.swaps_out += 1
        self.activity.caches_dropped += not kept
        self._begin(engine, tier, seconds, now, on_gpus=True)

    def _way_out(
        self, engine: Engine, tier: Tier, in_flight: int, cache_s: float
    ) -> tuple[bool, float]:
        """Return whether requests and cache come along, and the seconds that it takes."""
        keep, drop = (engine.kind.ways.get((tier, kept)) for kept in (True, False))
        if in_flight:
            if keep is None:
                raise IllegalEffect(f"{engine.name}: {in_flight} requests would not survive this")
            return True, keep.out_s
        if keep is None:
            return False, engine.kind.kill_s if drop is None else drop.out_s
        if drop is None or cache_s > _both(keep) - _both(drop):
            return True, keep.out_s
        return False, drop.out_s

    def _lower(self, engine: Engine, effect: SwapOut, now: float) -> None:
        """From host memory to disk, or to nothing where the image on disk is as good.

        To HOST: only what it has kept of its GPU has to go; no way is known that spares the rest.
        """
        kind, tier = engine.kind, effect.to
        if tier is Tier.HOST and not kind.residue_bytes:
            raise IllegalEffect(f"{engine.name}: lowered to host, where it is")
        whole = kind.down_s if engine.kept and tier is Tier.DISK and kind.dumps else None
        if effect.in_flight and whole is None:
            raise IllegalEffect(f"{engine.name}: its requests would not survive this")
        if whole is not None and (effect.in_flight or effect.cache_s > whole):
            tier, seconds = Tier.DISK, whole
        else:
            tier = Tier.DISK if (Tier.DISK, False) in kind.ways else Tier.NONE
            seconds = kind.kill_s
            engine.kept = False
        if kind.residue_bytes:
            self._books.occupy(engine)
        engine.state = _S.SWAPPING_OUT
        self.activity.lowered += 1
        self._begin(engine, tier, seconds, now, on_gpus=bool(kind.residue_bytes))

    def drain(self, effect: Drain) -> None:
        """Show an engine as draining, or as ready again."""
        engine = self.by_name[effect.engine]
        before, after = (_S.READY, _S.DRAINING) if effect.on else (_S.DRAINING, _S.READY)
        if engine.state is not before:
            raise IllegalEffect(f"{engine.name}: drain {effect.on} while {engine.state}")
        engine.state = after
        self.activity.drains += effect.on

    def _begin(
        self, engine: Engine, target: Tier, seconds: float, now: float, *, on_gpus: bool
    ) -> None:
        if self._noise:
            seconds *= math.exp(self._rng.gauss(0.0, self._noise))
        engine.target = target
        engine.took_s = seconds
        engine.move_end = now + seconds
        if on_gpus:
            self.activity.moving_s += seconds * len(engine.gpus)
        self._agenda.put(engine.move_end, MOVED, engine.index)

    def finish(self, engine: Engine, now: float) -> EngineReady | EngineLeft:
        """End an engine's move; return what the core is told."""
        self._books.vacate(engine)
        if engine.target is Tier.DEVICE:
            self._books.give_back_ram(engine)
            engine.state, engine.tier = _S.READY, Tier.DEVICE
            engine.server.advance(now)
            engine.server.thaw()
            self._settle(engine, now)
            return EngineReady(
                engine=engine.name, footprint=engine.footprint(), seconds=engine.took_s
            )
        self._off(engine)
        return EngineLeft(
            engine=engine.name,
            tier=engine.tier,
            seconds=engine.took_s,
            cache_kept=engine.kept,
            host_bytes=engine.host_bytes,
            residue=engine.residue(),
        )

    def _off(self, engine: Engine) -> None:
        before = engine.tier
        engine.tier = engine.target
        engine.state = _S.STOPPED if engine.target is Tier.NONE else _S.SWAPPED_OUT
        residue = engine.kind.residue_bytes
        if before is Tier.DEVICE:
            stays = residue if engine.tier is Tier.HOST else 0
            self._books.give_back(engine, engine.kind.bytes - stays)
        elif before is Tier.HOST:
            self._books.give_back_ram(engine)
            self._books.give_back(engine, residue)
        if not engine.kept:
            engine.server.forget()

    # ------------------------------------------------------------------- time

    def _settle(self, engine: Engine, now: float) -> None:
        """Note whether an engine works, which concerns its neighbours, and plan its next step."""
        works = engine.server.working
        if works != engine.works:
            engine.works = works
            self._books.share(engine, now, self._schedule)
        if engine.server.due < engine.pending:
            self._schedule(engine)

    def _schedule(self, engine: Engine) -> None:
        due = engine.server.due
        if due < engine.pending:
            engine.pending = due
            self._agenda.put(due, STEP, engine.index)

    def close(self, now: float) -> None:
        """Add up what is still under way at the end."""
        self._books.close(now)
        for engine in self.engines:
            if self._books.moves(engine):
                self.activity.moving_s -= (engine.move_end - now) * len(engine.gpus)
        self.activity.prompt_tokens = sum(engine.server.prompt_tokens for engine in self.engines)


def _both(way: Way) -> float:
    return way.out_s + way.in_s
