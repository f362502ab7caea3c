"""All workloads by name."""

from collections.abc import Callable, Mapping
from functools import partial

from evaluation.simulate.azure import synthetic
from evaluation.simulate.cluster import Cluster
from evaluation.simulate.load import Size
from evaluation.simulate.scenarios import agents, mixed
from evaluation.simulate.shapes import SHAPES, shaped
from evaluation.simulate.workload import Workload

PROFILES: Mapping[str, Callable[[Cluster, Size], Workload]] = {
    **{name: partial(shaped, name) for name in SHAPES},
    "azure": synthetic,
    "agents": agents,
    "mixed": mixed,
}
"""What makes each of them, for a cluster."""
