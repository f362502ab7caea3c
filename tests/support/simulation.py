"""Small engines and clusters for tests of the simulator, with figures that are easy to add up."""

from dataclasses import replace

from evaluation.simulate.cluster import Cluster, Model
from evaluation.simulate.costs import GB, EngineKind, Way
from evaluation.simulate.server import Speed
from evaluation.simulate.workload import Workload
from swapserve.ids import EngineName
from swapserve.states import Tier

SPEED = Speed(prefill_tokens_per_s=1000.0, itl_s=0.01, max_seqs=8, cache_tokens=10_000)
KIND = EngineKind(
    name="small",
    bytes=10 * GB,
    lean_bytes=4 * GB,
    speed=SPEED,
    cold_s=50.0,
    kill_s=0.5,
    down_s=20.0,
    ways={
        (Tier.HOST, True): Way(out_s=4.0, in_s=3.0),
        (Tier.HOST, False): Way(out_s=2.0, in_s=1.0),
        (Tier.DISK, True): Way(out_s=24.0, in_s=9.0),
        (Tier.DISK, False): Way(out_s=2.5, in_s=7.0),
    },
)
SLEEPER = replace(
    KIND,
    name="sleeper",
    ways={(Tier.HOST, False): Way(out_s=0.5, in_s=6.0)},
    down_s=None,
    residue_bytes=GB,
)
"""Only its own sleep: nothing survives it, and a little stays on the GPU."""


def cluster(
    *kinds: EngineKind, gpus: int = 1, gpu_gb: int = 10, ram_gb: int = 100, slots: int | None = None
) -> Cluster:
    """Return engines m0, m1, ... on the GPUs in turn."""
    models = tuple(
        Model(name=EngineName(f"m{n}"), kind=kind, gpus=(n % gpus,), slots=slots)
        for n, kind in enumerate(kinds)
    )
    return Cluster(models=models, gpu_bytes=(gpu_gb * GB,) * gpus, ram_bytes=ram_gb * GB)


def requests(*rows: tuple[float, int, int, int]) -> Workload:
    """Return a workload of rows of arrival, model, tokens in, tokens out."""
    workload = Workload(name="by hand")
    for arrival, model, tokens_in, tokens_out in rows:
        workload.add(arrival, model, tokens_in, tokens_out)
    return workload
