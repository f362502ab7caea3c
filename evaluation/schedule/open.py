"""Open workloads for engines that answer one request at a time, in tokens of a slow engine."""

import random

from evaluation.simulate import Cluster, Workload
from evaluation.simulate.load import Size, popularity, swap_s
from evaluation.simulate.workload import Draw, sorted_by_arrival
from swapserve.states import Priority, Tier

PROMPT = (10, 110)
ANSWER = (8, 70)
"""Tokens of a chat; answers are as often short as long, whatever their prompts."""
ANSWER_MOST = 128
"""What a chat allows."""
BATCH_PROMPT = (20, 60)
BATCH_ANSWER = (120, 300)
BATCH_MOST = 400


def chats(cluster: Cluster, size: Size) -> Workload:
    """Chats with all models, arrivals of a Poisson process."""
    rng = random.Random(f"{size.seed} chats")
    shares = popularity(cluster, size.alpha)
    another = 1.0 - sum(share * share for share in shares.values())
    each_s = sum(
        share * (_alone_s(cluster, model, PROMPT, ANSWER) + another * swap_s(cluster, model))
        for model, share in shares.items()
    )
    workload = Workload(name="chats")
    draw = Draw(list(shares), shares.values())
    _chats(workload, rng, draw, count=size.requests, per_s=size.load / each_s)
    return workload


def mixed(cluster: Cluster, size: Size) -> Workload:
    """Long batch answers of the last model, chats with the others, in equal parts of the load.

    At least one of each.
    """
    rng = random.Random(f"{size.seed} mixed")
    last = len(cluster.models) - 1
    shares = popularity(cluster, size.alpha)
    draw = Draw(range(last), [shares[model] for model in range(last)])
    cut = cluster.models[last].kind.cheapest(Tier.DISK, kept=True)
    chat_s = _alone_s(cluster, 0, PROMPT, ANSWER) + swap_s(cluster, 0) + cut.out_s + cut.in_s
    batch_s = _alone_s(cluster, last, BATCH_PROMPT, BATCH_ANSWER)
    chat_per_s, batch_per_s = size.load / 2 / chat_s, size.load / 2 / batch_s
    count = round(size.requests * chat_per_s / (chat_per_s + batch_per_s))
    count = max(1, min(count, size.requests - 1))
    workload = Workload(name="mixed")
    _chats(workload, rng, draw, count=count, per_s=chat_per_s)
    at = 0.0
    for number in range(size.requests - count):
        at += rng.expovariate(batch_per_s) if number else 0.0
        workload.add(
            at,
            last,
            rng.randint(*BATCH_PROMPT),
            rng.randint(*BATCH_ANSWER),
            tokens_max=BATCH_MOST,
            priority=Priority.BATCH,
            key="batch",
        )
    return sorted_by_arrival(workload)


def _chats(workload: Workload, rng: random.Random, draw: Draw, *, count: int, per_s: float) -> None:
    at = 0.0
    for _ in range(count):
        at += rng.expovariate(per_s)
        tokens_in, tokens_out = rng.randint(*PROMPT), rng.randint(*ANSWER)
        workload.add(at, draw(rng), tokens_in, tokens_out, tokens_max=ANSWER_MOST, key="chat")


def _alone_s(
    cluster: Cluster, model: int, prompt: tuple[int, int], answer: tuple[int, int]
) -> float:
    speed = cluster.models[model].kind.speed
    return speed.alone_s(round(sum(prompt) / 2), round(sum(answer) / 2))
