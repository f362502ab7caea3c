"""The five shapes of llmux's benchmark, for any number of models and GPUs.

llmux v0.9.0 (`fuzz/benchmark.sh`) sends short requests for two models to one GPU: one model only,
pairs, bursts for one and the other, mostly the first, both at once. Here each GPU has a caller of
its own that sends such rounds to the models of that GPU, the next one when the last is answered.
"""

from collections.abc import Callable, Mapping, Sequence

from evaluation.simulate.cluster import Cluster
from evaluation.simulate.load import Size, by_gpu, portions
from evaluation.simulate.workload import OPEN, Workload

PROMPT = 30
SHORT, LONG = 10, 15
"""Tokens of the answers."""

Wanted = tuple[float, int, int]
"""Seconds after the last round was answered, model, tokens of the answer."""
Round = Callable[[Sequence[int], int], list[Wanted]]
"""Makes the round of that number for a GPU's models, the most popular one first."""


def single_model(models: Sequence[int], number: int) -> list[Wanted]:
    """40 requests at once for one model of the GPU."""
    del number
    return [(0.0, models[0], LONG)] * 40


def balanced(models: Sequence[int], number: int) -> list[Wanted]:
    """One for a model and 0.1 s later one for the next; the next round is for the two after."""
    first, second = (models[(2 * number + place) % len(models)] for place in (0, 1))
    return [(0.0, first, SHORT), (0.1, second, SHORT)]


def bursty(models: Sequence[int], number: int) -> list[Wanted]:
    """10 at once for one model; the next round is for the next one."""
    return [(0.0, models[number % len(models)], LONG)] * 10


def dominant(models: Sequence[int], number: int) -> list[Wanted]:
    """50, each 50 ms after the last; every fifth for one of the others, the rest for the first."""
    others = models[1:] or models
    found = []
    for place in range(50):
        turn = number * 10 + place // 5
        model = others[turn % len(others)] if place % 5 == 4 else models[0]  # noqa: PLR2004
        found.append((place * 0.05, model, SHORT))
    return found


def interleave(models: Sequence[int], number: int) -> list[Wanted]:
    """60 at once, for each model in turn."""
    return [(0.0, models[(number * 60 + place) % len(models)], SHORT) for place in range(60)]


SHAPES: Mapping[str, Round] = {
    shape.__name__: shape for shape in (single_model, balanced, bursty, dominant, interleave)
}


def shaped(name: str, cluster: Cluster, size: Size) -> Workload:
    """Return rounds of that shape on every GPU, until there are as many requests as wanted."""
    workload = Workload(name=name)
    stage = 0
    gpus = by_gpu(cluster)
    for models, left in zip(gpus, portions(size.requests, len(gpus)), strict=True):
        before, number, missing = OPEN, 0, left
        while missing:
            wanted = SHAPES[name](models, number)[:missing]
            for gap, model, tokens in wanted:
                workload.add(
                    gap, model, PROMPT, tokens, tokens_max=tokens, stage=stage, after=before
                )
            missing -= len(wanted)
            before, stage, number = stage, stage + 1, number + 1
    return workload
