"""The traces by name: the simulator's own workloads, brought down to engines of a CPU, and `open`.

The simulator's generators think of GPUs, whose swaps take seconds to minutes and whose tokens come
in milliseconds. So some of them are shown engines whose moves take `time` times as long as ours and
whose tokens come as much faster as they have to, and what they make is divided again: times by
`time`, tokens by `tokens`. The load on the device is the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from evaluation.schedule.open import chats, mixed
from evaluation.simulate import Cluster, EngineKind, Workload
from evaluation.simulate.costs import Way
from evaluation.simulate.load import Size
from evaluation.simulate.scenarios import agents
from evaluation.simulate.shapes import shaped

_Make = Callable[[Cluster, Size], Workload]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One kind of trace.

    Attributes:
        make: the simulator's generator.
        about: in a few words.
        requests: how many make a run of a minute or two.
        load: see `evaluation.simulate.load`; without meaning for closed rounds.
        time, tokens: by how much the generator's world is larger than ours.
    """

    make: _Make
    about: str
    requests: int
    load: float = 0.7
    time: float = 1.0
    tokens: float = 1.0

    def trace(self, cluster: Cluster, *, part: float, seed: int) -> Workload:
        """Return the trace for a cluster; the same arguments, the same trace.

        `part`: of the requests that make a whole run.
        """
        size = Size(requests=max(1, round(part * self.requests)), load=self.load, seed=seed)
        made = self.make(self._enlarged(cluster), size)
        return self._reduced(made)

    def _enlarged(self, cluster: Cluster) -> Cluster:
        models = tuple(replace(model, kind=self._kind(model.kind)) for model in cluster.models)
        return replace(cluster, models=models)

    def _kind(self, kind: EngineKind) -> EngineKind:
        slower = self.time / self.tokens
        speed = replace(
            kind.speed,
            first_s=kind.speed.first_s * self.time,
            prefill_tokens_per_s=kind.speed.prefill_tokens_per_s / slower,
            itl_s=kind.speed.itl_s * slower,
        )
        ways = {
            where: Way(out_s=way.out_s * self.time, in_s=way.in_s * self.time)
            for where, way in kind.ways.items()
        }
        return replace(
            kind,
            speed=speed,
            ways=ways,
            cold_s=kind.cold_s * self.time,
            kill_s=kind.kill_s * self.time,
        )

    def _reduced(self, made: Workload) -> Workload:
        made.arrival = [at / self.time for at in made.arrival]
        for column in (made.tokens_in, made.tokens_out):
            column[:] = [max(1, round(tokens / self.tokens)) for tokens in column]
        made.tokens_max = [
            max(out, round(most / self.tokens)) if most else 0
            for out, most in zip(made.tokens_out, made.tokens_max, strict=True)
        ]
        # What the front door will see: no API keys, and prompts that have nothing in common.
        made.key = [""] * len(made)
        made.conversation = [number + 1 for number in range(len(made))]
        return made


PROFILES: Mapping[str, Profile] = {
    "balanced": Profile(
        make=partial(shaped, "balanced"),
        about="pairs for two models, the next pair when both are answered",
        requests=80,
    ),
    "bursty": Profile(
        make=partial(shaped, "bursty"),
        about="ten at once for one model, then for the next",
        requests=150,
    ),
    "dominant": Profile(
        make=partial(shaped, "dominant"),
        about="rounds of 50 in 2.5 s, four of five for the first model",
        requests=150,
    ),
    "chats": Profile(
        make=chats,
        about="chats that come at random, by popularity of their models",
        requests=80,
        load=0.55,
    ),
    "mixed": Profile(
        make=mixed,
        about="chats beside long answers of batch priority",
        requests=40,
        load=0.75,
    ),
    "agents": Profile(
        make=agents,
        about="four agents whose turns alternate between two models",
        requests=60,
        load=0.6,
        time=20.0,
        tokens=25.0,
    ),
}
