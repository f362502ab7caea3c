"""What engines really hold of GPUs and host memory, and how GPUs divide their time. Strict."""

from collections.abc import Callable, Sequence

from evaluation.simulate.engine import Engine, IllegalEffect
from evaluation.simulate.outcome import Activity
from swapserve.states import Tier


class _Gpu:
    __slots__ = ("busy_since", "capacity", "mover", "used", "workers")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.mover: Engine | None = None
        self.workers: dict[int, Engine] = {}
        self.busy_since = 0.0


class Books:
    """Bytes, turns and working time of every GPU, and the bytes of host memory.

    Engines of one GPU that work at the same time get equal parts of it; one on several GPUs is as
    slow as on the busiest of them.
    """

    def __init__(self, gpu_bytes: Sequence[int], ram_bytes: int, activity: Activity) -> None:
        self._gpus = [_Gpu(size) for size in gpu_bytes]
        self._ram = ram_bytes
        self._ram_used = 0
        self._activity = activity

    # ------------------------------------------------------------------- turns

    def occupy(self, engine: Engine) -> None:
        """Begin a move on the engine's GPUs.

        Raises:
            IllegalEffect: another one is under way there.
        """
        for number in engine.gpus:
            other = self._gpus[number].mover
            if other is not None:
                raise IllegalEffect(f"{engine.name}: {other.name} moves on gpu{number} already")
            self._gpus[number].mover = engine

    def vacate(self, engine: Engine) -> None:
        """End it."""
        for number in engine.gpus:
            if self._gpus[number].mover is engine:
                self._gpus[number].mover = None

    def moves(self, engine: Engine) -> bool:
        """Return whether a move of the engine occupies its GPUs."""
        return any(self._gpus[number].mover is engine for number in engine.gpus)

    # ------------------------------------------------------------------- bytes

    def fits(self, engine: Engine) -> bool:
        """Return whether there is room for what the engine needs to serve."""
        return all(
            self._gpus[number].used + engine.kind.bytes <= self._gpus[number].capacity
            for number in engine.gpus
        )

    def fits_ram(self, engine: Engine) -> bool:
        """Return whether host memory has room for its state without its cache."""
        needed = engine.kind.lean_bytes * len(engine.gpus)
        return self._ram_used + needed <= self._ram

    def hold(self, engine: Engine) -> None:
        """Take what the engine needs to serve, beyond what it has kept of its GPUs.

        Raises:
            IllegalEffect: it is not free.
        """
        kept = engine.kind.residue_bytes if engine.tier is Tier.HOST else 0
        for number in engine.gpus:
            gpu = self._gpus[number]
            gpu.used += engine.kind.bytes - kept
            if gpu.used > gpu.capacity:
                raise IllegalEffect(
                    f"{engine.name}: {gpu.used} bytes on gpu{number}, which has {gpu.capacity}"
                )

    def give_back(self, engine: Engine, size: int) -> None:
        """Free so many bytes of each of its GPUs."""
        for number in engine.gpus:
            self._gpus[number].used -= size

    def hold_ram(self, engine: Engine, *, kept: bool) -> None:
        """Take the host memory that its state needs, with its cache or without.

        Raises:
            IllegalEffect: it is not free.
        """
        each = engine.kind.bytes if kept else engine.kind.lean_bytes
        engine.host_bytes = each * len(engine.gpus)
        self._ram_used += engine.host_bytes
        if self._ram_used > self._ram:
            raise IllegalEffect(
                f"{engine.name}: {self._ram_used} bytes of host memory, of {self._ram}"
            )

    def give_back_ram(self, engine: Engine) -> None:
        """Free its host memory."""
        self._ram_used -= engine.host_bytes
        engine.host_bytes = 0

    # -------------------------------------------------------------------- time

    def share(self, engine: Engine, now: float, changed: Callable[[Engine], None]) -> None:
        """Divide the GPUs' time anew after the engine has begun or ceased to work.

        `changed` is told of each engine whose part is another one now.
        """
        for number in engine.gpus:
            gpu = self._gpus[number]
            if engine.works:
                if not gpu.workers:
                    gpu.busy_since = now
                gpu.workers[engine.index] = engine
            else:
                del gpu.workers[engine.index]
                if not gpu.workers:
                    self._activity.serving_s += now - gpu.busy_since
        for number in engine.gpus:
            for worker in self._gpus[number].workers.values():
                parts = max(len(self._gpus[other].workers) for other in worker.gpus)
                if parts != worker.parts:
                    worker.parts = parts
                    worker.server.advance(now)
                    worker.server.share(parts)
                    changed(worker)

    def close(self, now: float) -> None:
        """Add up the working time of GPUs that still work."""
        for gpu in self._gpus:
            if gpu.workers:
                self._activity.serving_s += now - gpu.busy_since
                gpu.busy_since = now
