"""Traces in the format of the Azure LLM inference trace of 2023, and a generator like it.

The trace itself (Patel et al., "Splitwise", ISCA 2024; AzurePublicDataset) is not part of this
project: it is given by path. The generator knows statistics of its two services: quantiles of
prompts and answers, and how the arrivals vary from minute to minute.
"""

import csv
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from evaluation.simulate.cluster import Cluster
from evaluation.simulate.load import Size, popularity, rate
from evaluation.simulate.workload import Draw, Workload, sorted_by_arrival

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MINUTE_S = 60.0


class BadTrace(Exception):
    """A trace cannot be read; says where and why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace."""

    at: float
    """Seconds since the trace's first request."""
    tokens_in: int
    tokens_out: int


def read(path: Path) -> list[Row]:
    """Read a trace.

    Raises:
        BadTrace: the file cannot be read, or which line of it is wrong, and why.
    """
    found: list[tuple[float, int, int]] = []
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise BadTrace(f"{path}: no column {missing[0]}")
            for row in rows:
                try:
                    found.append(_row(row))
                except ValueError as error:
                    raise BadTrace(f"{path}:{rows.line_num}: {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadTrace(f"{path}: {error}") from error
    if not found:
        raise BadTrace(f"{path}: no requests")
    found.sort()
    return [Row(at - found[0][0], tokens_in, tokens_out) for at, tokens_in, tokens_out in found]


def _row(row: dict[str, str]) -> tuple[float, int, int]:
    values = [row[name] for name in COLUMNS]
    if None in values:
        raise ValueError("too few columns")
    at, tokens_in, tokens_out = _seconds(values[0]), int(values[1]), int(values[2])
    if tokens_in < 0 or tokens_out < 0:
        raise ValueError("a negative number of tokens")
    return at, tokens_in, max(1, tokens_out)


def _seconds(text: str) -> float:
    whole, _, fraction = text.partition(".")
    moment = datetime.strptime(whole, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    return moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)


# --------------------------------------------------------------- generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Statistics of one service of the trace."""

    tokens_in: tuple[float, ...]
    """At the shares `_SHARES` of its requests."""
    tokens_out: tuple[float, ...]
    per_minute_cv: float
    """Standard deviation over mean of its rate, from minute to minute."""
    silent: float
    """Part of the minutes in which nothing comes."""


_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
CONVERSATION = Service(
    tokens_in=(2, 207, 396, 1020, 1189, 2735, 4142, 14050),
    tokens_out=(7, 54, 85, 129, 395, 424, 601, 1000),
    per_minute_cv=0.24,
    silent=0.0,
)
CODE = Service(
    tokens_in=(3, 147, 578, 1469, 2745, 5194, 7436, 7437),
    tokens_out=(6, 7, 9, 13, 24, 55, 252, 1899),
    per_minute_cv=1.0,
    silent=0.2,
)
SERVICES = (CONVERSATION, CODE)


def _drawn(quantiles: Sequence[float], rng: random.Random) -> int:
    """Draw from a distribution with these quantiles, straight lines between them."""
    share = rng.random()
    upper = max(1, bisect_left(_SHARES, share))
    low, high = _SHARES[upper - 1], _SHARES[upper]
    part = (share - low) / (high - low)
    return max(1, round(quantiles[upper - 1] + part * (quantiles[upper] - quantiles[upper - 1])))


def generate(service: Service, per_s: float, count: int, rng: random.Random) -> list[Row]:
    """Return so many requests at about that rate: Poisson within a minute, the rate drawn for each.

    A gamma distribution whose mean over all minutes, the silent ones included, is the rate.
    """
    speaking = 1.0 - service.silent
    second_moment = (1.0 + service.per_minute_cv**2) * speaking
    shape = 1.0 / max(second_moment - 1.0, 1e-3)
    rows: list[Row] = []
    minute = 0
    while len(rows) < count:
        if rng.random() >= service.silent:
            now_per_s = rng.gammavariate(shape, per_s / speaking / shape)
            at = rng.expovariate(now_per_s) if now_per_s else MINUTE_S
            while at < MINUTE_S:
                tokens_in = _drawn(service.tokens_in, rng)
                tokens_out = _drawn(service.tokens_out, rng)
                rows.append(Row(minute * MINUTE_S + at, tokens_in, tokens_out))
                at += rng.expovariate(now_per_s)
        minute += 1
    return rows[:count]


def synthetic(cluster: Cluster, size: Size) -> Workload:
    """Every model is a service of its own, like the trace's two in turn, with Zipf popularity."""
    shares = popularity(cluster, size.alpha)
    kinds = {model: SERVICES[model % len(SERVICES)] for model in shares}
    rng = random.Random(f"{size.seed} azure")
    means = {service: _means(service, rng) for service in SERVICES}
    alone_s = {
        model: cluster.models[model].kind.speed.alone_s(*means[service])
        for model, service in kinds.items()
    }
    per_s = rate(cluster, shares, alone_s, size.load)
    workload = Workload(name="azure")
    until = size.requests / per_s
    for model, share in shares.items():
        mine = random.Random(f"{size.seed} azure {model}")
        expected = share * size.requests
        for row in generate(kinds[model], share * per_s, round(2 * expected) + 10, mine):
            if row.at > until:
                break
            workload.add(row.at, model, row.tokens_in, row.tokens_out)
    return sorted_by_arrival(workload)


def _means(service: Service, rng: random.Random, count: int = 2000) -> tuple[int, int]:
    tokens_in = sum(_drawn(service.tokens_in, rng) for _ in range(count))
    tokens_out = sum(_drawn(service.tokens_out, rng) for _ in range(count))
    return tokens_in // count, tokens_out // count


def replay(traces: Sequence[Sequence[Row]], cluster: Cluster, size: Size) -> Workload:
    """Split traces over the models by Zipf popularity, and stretch time for the load.

    With several traces the models belong to them in turn. Order and relative gaps stay, one factor
    changes the pace of all; at most as many requests as wanted, from the beginning.
    """
    rng = random.Random(f"{size.seed} trace")
    shares = popularity(cluster, size.alpha)
    rows = sorted(
        (row.at, number, row.tokens_in, row.tokens_out)
        for number, trace in enumerate(traces)
        for row in trace
    )[: size.requests]
    draws = {}
    for number in range(len(traces)):
        models = [model for model in shares if model % len(traces) == number]
        draws[number] = Draw(models or list(shares), [shares[model] for model in models or shares])
    chosen = [draws[number](rng) for _, number, _, _ in rows]
    seen: dict[int, list[float]] = {}
    for model, (_, _, tokens_in, tokens_out) in zip(chosen, rows, strict=True):
        speed = cluster.models[model].kind.speed
        seen.setdefault(model, []).append(speed.alone_s(tokens_in, tokens_out))
    real = {model: len(times) / len(rows) for model, times in seen.items()}
    per_s = rate(
        cluster, real, {model: sum(times) / len(times) for model, times in seen.items()}, size.load
    )
    span = rows[-1][0] - rows[0][0]
    stretch = len(rows) / per_s / span if span else 1.0
    workload = Workload(name="trace")
    for model, (at, _, tokens_in, tokens_out) in zip(chosen, rows, strict=True):
        workload.add((at - rows[0][0]) * stretch, model, tokens_in, tokens_out)
    return workload
