"""Which charts are drawn of a grid."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluation.simulate.grid import CURVE
from evaluation.simulate.svg import Panel, figure

Row = dict[str, Any]

SHORTEST_S = 0.01
"""Shorter times are drawn as this one."""


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write all charts into the directory, which is made if need be; return the files.

    Raises:
        OSError: they cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    charts = {
        "ttft-p99": _by_cluster(rows, "p99 TTFT (s)", _p99, log_y=True),
        "attainment": _by_cluster(rows, "served well (share)", lambda row: row["attainment"]),
        "overhead": _by_cluster(rows, "time in swaps (share)", lambda row: row["overhead_share"]),
    }
    titles = {
        "ttft-p99": "99th percentile of the time to the first token",
        "attainment": "Requests served within their targets",
        "overhead": "GPU time spent in swaps",
    }
    files = []
    for name, panels in charts.items():
        files.append(directory / f"{name}.svg")
        files[-1].write_text(figure(titles[name], panels, columns=2))
    for profile in dict.fromkeys(row["profile"] for row in rows):
        panels = _curves([row for row in rows if row["profile"] == profile])
        columns = len({row["models"] for row in rows if row["profile"] == profile})
        files.append(directory / f"ttft-{profile}.svg")
        title = f"{profile}: requests by their time to the first token"
        files[-1].write_text(figure(title, panels, columns=columns))
    return files


def _p99(row: Row) -> float | None:
    found = row["ttft_s"]["all"].get("p99")
    return None if found is None else max(SHORTEST_S, found)


def _by_cluster(
    rows: Sequence[Row],
    label: str,
    value: Callable[[Row], float | None],
    *,
    log_y: bool = False,
) -> list[Panel]:
    """Return a panel for each profile, with all clusters side by side."""
    panels = []
    for profile in dict.fromkeys(row["profile"] for row in rows):
        mine = [row for row in rows if row["profile"] == profile]
        clusters = list(dict.fromkeys((row["gpus"], row["models"]) for row in mine))
        series: dict[str, list[tuple[float, float]]] = {}
        for row in mine:
            found = value(row)
            if found is not None:
                place = clusters.index((row["gpus"], row["models"]))
                series.setdefault(row["policy"], []).append((place, found))
        panels.append(
            Panel(
                title=profile,
                x_label="GPUs x models",
                y_label=label,
                series=series,
                names=[f"{gpus}x{models}" for gpus, models in clusters],
                log_y=log_y,
                y_from_zero=not log_y,
            )
        )
    return panels


def _curves(rows: Sequence[Row]) -> list[Panel]:
    """Return the cumulative distribution for each cluster."""
    panels = []
    for gpus, models in dict.fromkeys((row["gpus"], row["models"]) for row in rows):
        series = {
            row["policy"]: [
                (max(SHORTEST_S, time), share)
                for time, share in zip(row["ttft_curve_s"], CURVE, strict=True)
            ]
            for row in rows
            if (row["gpus"], row["models"]) == (gpus, models) and row["ttft_curve_s"]
        }
        panels.append(
            Panel(
                title=f"{gpus} GPUs, {models} models",
                x_label="TTFT (s)",
                y_label="share of requests",
                series=series,
                log_x=True,
                y_from_zero=True,
            )
        )
    return panels
