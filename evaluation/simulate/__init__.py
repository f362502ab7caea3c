"""The scheduler's core, driven over a workload without engines: `python -m evaluation simulate`."""

from evaluation.simulate.cluster import Cluster, Model, build
from evaluation.simulate.costs import Costs, EngineKind, read_costs
from evaluation.simulate.outcome import Outcome
from evaluation.simulate.run import simulate
from evaluation.simulate.server import Speed
from evaluation.simulate.workload import Workload

__all__ = [
    "Cluster",
    "Costs",
    "EngineKind",
    "Model",
    "Outcome",
    "Speed",
    "Workload",
    "build",
    "read_costs",
    "simulate",
]
