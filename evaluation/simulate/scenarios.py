"""Agents that alternate between models, and long batches beside people who wait."""

import random
from statistics import fmean

from evaluation.simulate.cluster import Cluster
from evaluation.simulate.costs import EngineKind
from evaluation.simulate.load import Size, by_gpu, popularity, portions, rate, swap_s
from evaluation.simulate.workload import OPEN, Draw, Workload, sorted_by_arrival
from swapserve.states import Priority, Tier

AGENTS_PER_GPU = 4
TURNS = 12
"""Of a conversation, over both models."""
GROWTH = (100, 900)
"""Tokens that a turn adds to the prompt before its answer: what a tool said, or a person."""
ANSWER = (40, 400)

JOB = 8
"""Requests of a batch."""
JOB_S = (60.0, 300.0)
"""How long one of them is, by itself."""
JOB_TOKENS = 100_000
"""The longest, and what they allow."""
JOB_PROMPT = (200, 2000)
CHAT_PROMPT = (50, 1500)
CHAT_ANSWER = (20, 300)


def agents(cluster: Cluster, size: Size) -> Workload:
    """Agents whose turns alternate between two models, each prompt all that was said before.

    An agent thinks between turns (it runs tools), as long as the load allows it, and begins a new
    conversation with other models after some turns.
    """
    rng = random.Random(f"{size.seed} agents")
    shares = popularity(cluster, size.alpha)
    draw = Draw(list(shares), shares.values())
    prompt = round(TURNS * (fmean(GROWTH) + fmean(ANSWER)) / 2)
    alone_s = {
        model: cluster.models[model].kind.speed.alone_s(prompt, round(fmean(ANSWER)))
        for model in shares
    }
    count = AGENTS_PER_GPU * len(by_gpu(cluster))
    pause_s = count / rate(cluster, shares, alone_s, size.load)
    workload = Workload(name="agents")
    conversation = 0
    for agent, turns in enumerate(portions(size.requests, count)):
        before, context = OPEN, 0
        models = [0, 0]
        for turn in range(turns):
            if turn % TURNS == 0:
                conversation += 1
                context = 0
                models = [draw(rng), draw(rng)]
                while len(shares) > 1 and models[0] == models[1]:
                    models[1] = draw(rng)
            context += rng.randint(*GROWTH)
            answer = rng.randint(*ANSWER)
            number = len(workload)
            workload.add(
                rng.expovariate(1.0 / pause_s),
                models[turn % 2],
                context,
                answer,
                key=f"agent-{agent}",
                conversation=conversation,
                stage=number,
                after=before,
            )
            context += answer
            before = number
    return workload


def mixed(cluster: Cluster, size: Size) -> Workload:
    """Batches of minutes on every fifth model of a GPU (one at least), chats with the others.

    Half of the load is the batches' own time, half is what chats cost that each cut into a batch.
    """
    rng = random.Random(f"{size.seed} mixed")
    workload = Workload(name="mixed")
    gpus = by_gpu(cluster)
    shares = popularity(cluster, size.alpha)
    for models, count in zip(gpus, portions(size.requests, len(gpus)), strict=True):
        batches = models[4::5] or models[-1:]
        chats = [model for model in models if model not in batches] or models
        kinds = [cluster.models[model].kind for model in batches]
        cut_s = fmean(_cut_s(kind) for kind in kinds)
        weights = [shares[model] for model in chats]
        own_s = fmean(_chat_s(cluster, model) for model in chats)
        chat_per_s = size.load / 2 / (own_s + (cut_s if cluster.contended(chats[0]) else 0.0))
        job_per_s = size.load / 2 / fmean(JOB_S)
        chat_part = chat_per_s / (chat_per_s + job_per_s * JOB)
        _chats(workload, rng, Draw(chats, weights), round(count * chat_part), chat_per_s)
        jobs = max(1, round(count * (1.0 - chat_part) / JOB))
        _jobs(workload, rng, cluster, batches=batches, count=jobs, per_s=job_per_s)
    return sorted_by_arrival(workload)


def _cut_s(kind: EngineKind) -> float:
    """Return what it costs that a busy engine leaves and comes back."""
    tier = Tier.HOST if kind.has(Tier.HOST) else Tier.DISK
    if not kind.has(tier):
        return kind.kill_s + kind.cold_s
    way = kind.cheapest(tier, kept=True)
    return way.out_s + way.in_s


def _chat_s(cluster: Cluster, model: int) -> float:
    speed = cluster.models[model].kind.speed
    alone_s = speed.alone_s(round(fmean(CHAT_PROMPT)), round(fmean(CHAT_ANSWER)))
    return alone_s + swap_s(cluster, model)


def _chats(workload: Workload, rng: random.Random, draw: Draw, count: int, per_s: float) -> None:
    at = 0.0
    for _ in range(count):
        at += rng.expovariate(per_s)
        workload.add(
            at, draw(rng), rng.randint(*CHAT_PROMPT), rng.randint(*CHAT_ANSWER), key="chat"
        )


def _jobs(
    workload: Workload,
    rng: random.Random,
    cluster: Cluster,
    *,
    batches: list[int],
    count: int,
    per_s: float,
) -> None:
    at = 0.0
    for number in range(count):
        at += rng.expovariate(per_s) if number else 0.0
        model = batches[number % len(batches)]
        itl_s = cluster.models[model].kind.speed.itl_s
        for _ in range(JOB):
            tokens = min(JOB_TOKENS, round(rng.uniform(*JOB_S) / itl_s))
            workload.add(
                at,
                model,
                rng.randint(*JOB_PROMPT),
                tokens,
                tokens_max=JOB_TOKENS,
                priority=Priority.BATCH,
                key="batch",
            )
