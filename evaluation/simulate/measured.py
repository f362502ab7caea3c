"""Costs from results of this package's own runs: `evaluation swap` and `evaluation gpu`.

They say what moves take, not how fast an engine serves many requests at once: for that, the
figures of `SERVING` stand in.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from evaluation.simulate.costs import BadCosts, Costs, EngineKind, Way
from evaluation.simulate.server import Speed
from swapserve.states import Tier

SERVING = Speed(
    prefill_tokens_per_s=1000.0, itl_s=0.05, itl_growth=0.2, max_seqs=16, cache_tokens=16_384
)
"""About a small model on two CPU cores."""
KILL_S = 0.01
RESTS = ("lean_cycles", "sleep_cycles", "deep_sleep_cycles")
"""Ways to host memory that leave the cache behind."""


def read_results(path: Path) -> Costs:
    """Read a result file.

    Raises:
        BadCosts: it cannot be read, or is none, or has no whole engine.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise BadCosts(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BadCosts(f"{path}: {error}") from error
    kind = data.get("experiment") if isinstance(data, dict) else None
    try:
        if kind == "swap":
            return _costs(path, "swap", _from_swap(data), ram=False)
        if kind == "gpu":
            return _costs(path, "gpu", _from_gpu(data), ram=True)
    except (KeyError, TypeError, ValueError) as error:
        raise BadCosts(f"{path}: not a whole result ({type(error).__name__}: {error})") from error
    raise BadCosts(f"{path}: a result of `evaluation swap` or `gpu` is needed, this is {kind!r}")


def _costs(path: Path, name: str, kinds: Sequence[EngineKind], *, ram: bool) -> Costs:
    if not kinds:
        raise ValueError("no engine in it was measured whole")
    most = max(kind.bytes for kind in kinds)
    return Costs(
        name=name,
        about=f"Measured: {path.name}",
        gpu_bytes=4 * most,
        ram_bytes=8 * most if ram else 0,
        kinds=tuple(kinds),
        sources={"measured": {"title": f"python -m evaluation {name}", "url": str(path)}},
    )


# --------------------------------------------------------------------- swap


def _from_swap(data: dict[str, Any]) -> list[EngineKind]:
    kinds = []
    for name, found in data["summary"].items():
        arm = found["arms"][0]
        live = found["preempt"]
        if not live or live["swap_out_s"] is None:
            continue
        hot_s = arm["hot"]["median"]
        # To the first token of a request: what the engine itself takes for it is no move.
        back_s = max(0.0, arm["swap_in"]["median"] - hot_s)
        kinds.append(
            EngineKind(
                name=name,
                bytes=int(live["image_bytes"]),
                lean_bytes=int(found["image_bytes"]),
                speed=SERVING,
                cold_s=max(arm["cold"]["median"] - hot_s, back_s),
                kill_s=arm["kill"]["median"],
                ways={
                    (Tier.DISK, True): Way(out_s=live["swap_out_s"], in_s=live["swap_in_s"]),
                    (Tier.DISK, False): Way(out_s=arm["discard"]["median"], in_s=back_s),
                },
            )
        )
    return kinds


# ---------------------------------------------------------------------- gpu


def _from_gpu(data: dict[str, Any]) -> list[EngineKind]:
    kinds = []
    for name, found in data["parts"]["engines"].items():
        cycles = _whole(found, "cycles")
        if not cycles or not found.get("cold"):
            continue
        host, size = _way(cycles), int(median(one["resident_bytes"] for one in cycles))
        ways = {(Tier.HOST, True): host}
        rests = [_way(whole) for each in RESTS if (whole := _whole(found, each))]
        if rests:
            ways[(Tier.HOST, False)] = min(rests, key=lambda way: way.out_s + way.in_s)
        disk = _whole(found, "disk_cycles")
        if disk:
            ways[(Tier.DISK, True)] = _way(disk)
        cold_s = median(one["first_token_s"] - one["hot_first_token_s"] for one in found["cold"])
        kinds.append(
            EngineKind(
                name=name,
                bytes=size,
                lean_bytes=size,
                speed=SERVING,
                cold_s=max(0.0, cold_s),
                kill_s=median([one["seconds"] for one in found.get("kills", ())] or [KILL_S]),
                ways=ways,
                down_s=max(0.0, _way(disk).out_s - host.out_s) if disk else None,
            )
        )
    return kinds


def _whole(found: Any, kind: str) -> list[dict[str, Any]]:  # noqa: ANN401
    cycles = found.get(kind, ()) if isinstance(found, dict) else ()
    return [cycle for cycle in cycles if cycle.get("equal")]


def _way(cycles: Sequence[dict[str, Any]]) -> Way:
    back_s = median(one["first_token_s"] - one["hot_first_token_s"] for one in cycles)
    return Way(out_s=median(one["out_s"] for one in cycles), in_s=max(0.0, back_s))
