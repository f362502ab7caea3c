"""A cluster: GPUs, host memory, and which models' engines live on which of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.simulate.costs import Costs, EngineKind
from swapserve.ids import DeviceName, EngineName
from swapserve.messages import DeviceSpec, EngineSpec
from swapserve.states import Tier

RAM = DeviceName("ram")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model with an engine of its own."""

    name: EngineName
    kind: EngineKind
    gpus: tuple[int, ...]
    """All of them are needed at the same time."""
    slots: int | None = None
    """Requests that the scheduler lets into it at once; None: all, and it queues them itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What the scheduler has to divide."""

    models: tuple[Model, ...]
    """The most popular one first."""
    gpu_bytes: tuple[int, ...]
    ram_bytes: int
    """For engines at rest; 0: no host tier."""

    @property
    def gpus(self) -> int:
        """How many GPUs it has."""
        return len(self.gpu_bytes)

    def on_gpu(self, gpu: int) -> list[int]:
        """Return the models that live on the GPU, the most popular one first."""
        return [number for number, model in enumerate(self.models) if gpu in model.gpus]

    def contended(self, gpu: int) -> bool:
        """Whether the GPU has less memory than all its models together need."""
        needed = sum(self.models[number].kind.bytes for number in self.on_gpu(gpu))
        return needed > self.gpu_bytes[gpu]

    def boundless(self) -> "Cluster":
        """Return the same cluster with GPUs that hold all their models at once."""
        needed = tuple(
            sum(self.models[number].kind.bytes for number in self.on_gpu(gpu))
            for gpu in range(self.gpus)
        )
        most = tuple(max(pair) for pair in zip(needed, self.gpu_bytes, strict=True))
        return Cluster(models=self.models, gpu_bytes=most, ram_bytes=self.ram_bytes)

    def round_s(self, gpu: int) -> float:
        """Return what it takes to bring each model of the GPU in once, each out of a busy one.

        Zero where they all fit. Nobody can promise a shorter wait when all are wanted.
        """
        if not self.contended(gpu):
            return 0.0
        return sum(self._turn_s(self.models[number].kind) for number in self.on_gpu(gpu))

    def _turn_s(self, kind: EngineKind) -> float:
        whole = sum(model.kind.bytes * len(model.gpus) for model in self.models)
        tier = Tier.HOST if kind.has(Tier.HOST) and whole <= self.ram_bytes else Tier.DISK
        if not kind.has(tier):
            tier = Tier.HOST
        if not kind.has(tier):
            return kind.kill_s + kind.cold_s
        way = kind.cheapest(tier, kept=True)
        return way.out_s + way.in_s

    def specs(self) -> tuple[tuple[DeviceSpec, ...], tuple[EngineSpec, ...]]:
        """Return devices and engines as the scheduler's core is configured with them."""
        devices = [
            DeviceSpec(name=gpu_name(gpu), capacity_bytes=size, exclusive=True)
            for gpu, size in enumerate(self.gpu_bytes)
        ]
        if self.ram_bytes:
            devices.append(DeviceSpec(name=RAM, capacity_bytes=self.ram_bytes))
        engines = tuple(
            EngineSpec(
                name=model.name,
                devices=tuple(gpu_name(gpu) for gpu in model.gpus),
                memory_bytes=model.kind.bytes,
                pin=False,
                preload=False,
                ttl_s=None,
                ram=RAM if self.ram_bytes and model.kind.has(Tier.HOST) else None,
                slots=model.slots,
            )
            for model in self.models
        )
        return tuple(devices), engines


def gpu_name(gpu: int) -> DeviceName:
    """Return the name of a GPU."""
    return DeviceName(f"gpu{gpu}")


def build(
    costs: Costs,
    *,
    gpus: int,
    models: int,
    held: float = 1.0,
    spread: int = 0,
    kinds: Sequence[str] = (),
) -> Cluster:
    """Return a cluster of engines of the table's kinds in turn, dealt out to the GPUs in turn.

    Args:
        costs: the table.
        gpus: how many.
        models: how many, the most popular one first.
        held: a GPU's memory, as a multiple of the largest engine on it, beside what sleeping ones
            keep; never more than the table's GPU has.
        spread: every N-th model needs two GPUs at the same time, where there are two; 0: none.
        kinds: names of the table's kinds to use; empty: all.

    Raises:
        ValueError: a GPU that could not hold its largest engine, or no such kind.
    """
    if held < 1.0:
        raise ValueError(f"a GPU that holds {held:g} of an engine holds none")
    chosen = [kind for kind in costs.kinds if not kinds or kind.name in kinds]
    if len(chosen) < len(set(kinds)):
        raise ValueError(f"{', '.join(kinds)}: not all of them are in '{costs.name}'")
    found = []
    for number in range(models):
        place, gpu = divmod(number, gpus)
        # Each GPU begins with another kind and gets them all in turn.
        kind = chosen[(place + gpu) % len(chosen)]
        both = spread and gpus > 1 and number % spread == spread - 1
        on = (gpu, (gpu + 1) % gpus) if both else (gpu,)
        found.append(Model(name=EngineName(f"m{number:02d}"), kind=kind, gpus=on))
    sizes = []
    for gpu in range(gpus):
        here = [model.kind for model in found if gpu in model.gpus]
        largest = max((kind.bytes for kind in here), default=costs.gpu_bytes)
        residues = sum(kind.residue_bytes for kind in here)
        sizes.append(min(costs.gpu_bytes, round(held * largest) + residues))
    return Cluster(models=tuple(found), gpu_bytes=tuple(sizes), ram_bytes=costs.ram_bytes * gpus)
