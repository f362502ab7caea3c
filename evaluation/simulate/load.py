"""How much is asked of a cluster, so that a workload means the same on one GPU and on eight.

Load 1 is what a GPU can just bear that serves its requests one by one in order of arrival and swaps
whenever the next one is for another model. Below 1 every policy keeps up with the hottest GPU, and
what differs is who waits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.simulate.cluster import Cluster
from evaluation.simulate.workload import zipf
from swapserve.states import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of a workload to make."""

    requests: int = 2000
    load: float = 0.7
    alpha: float = 1.0
    """How steeply popularity falls with a model's rank."""
    seed: int = 1


def swap_s(cluster: Cluster, model: int) -> float:
    """Return what it costs to come in and leave again, idle, where its state is likely to rest."""
    kind = cluster.models[model].kind
    resting = sum(each.kind.lean_bytes * len(each.gpus) for each in cluster.models)
    in_ram = min(1.0, cluster.ram_bytes / resting)
    below = kind.kill_s + kind.cold_s
    if kind.has(Tier.DISK):
        disk = kind.cheapest(Tier.DISK, kept=False)
        below = disk.out_s + disk.in_s
    if not kind.has(Tier.HOST):
        return below
    host = kind.cheapest(Tier.HOST, kept=False)
    return in_ram * (host.out_s + host.in_s) + (1.0 - in_ram) * below


def rate(
    cluster: Cluster, shares: Mapping[int, float], alone_s: Mapping[int, float], load: float
) -> float:
    """Return the requests per second, over all models, that load the hottest GPU so much.

    Args:
        cluster: the GPUs.
        shares: each model's part of the requests; they sum to one.
        alone_s: for each model the mean seconds of a request by itself.
        load: as above.

    Raises:
        ValueError: nobody asks for anything.
    """
    most = 0.0
    for gpu in range(cluster.gpus):
        here = [number for number in cluster.on_gpu(gpu) if shares.get(number)]
        total = sum(shares[number] for number in here)
        swaps = cluster.contended(gpu)
        work = 0.0
        for number in here:
            another = 1.0 - shares[number] / total if swaps else 0.0
            work += shares[number] * (alone_s[number] + another * swap_s(cluster, number))
        most = max(most, work)
    if not most:
        raise ValueError("nobody asks for anything")
    return load / most


def popularity(cluster: Cluster, alpha: float) -> dict[int, float]:
    """Return the share of each model, the first one the most popular."""
    return dict(enumerate(zipf(len(cluster.models), alpha)))


def by_gpu(cluster: Cluster) -> list[list[int]]:
    """Return the models of each GPU that has any."""
    return [models for gpu in range(cluster.gpus) if (models := cluster.on_gpu(gpu))]


def portions(requests: int, count: int) -> list[int]:
    """Divide requests evenly."""
    return [requests // count + (place < requests % count) for place in range(count)]
