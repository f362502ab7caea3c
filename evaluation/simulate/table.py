"""Rows of a grid as text for people. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

HEAD = (
    "policy",
    "TTFT p50",
    "p90",
    "p99",
    "interactive p99",
    "E2E p99",
    "TPOT p99",
    "goodput/s",
    "attained",
    "serving",
    "overhead",
    "swaps",
    "preempted",
    "longest wait",
    "fair",
)


def render(result: dict[str, Any]) -> str:
    """Return a whole result as text."""
    parts = [_header(result)]
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["profile"], row["gpus"], row["models"]), []).append(row)
    for (profile, gpus, models), rows in groups.items():
        first = rows[0]
        title = (
            f"{profile}: {gpus} {'GPU' if gpus == 1 else 'GPUs'}, {models} models,"
            f" {first['requests']} requests; a round of swaps takes {first['round_s']:.0f} s"
        )
        parts.append("\n".join([title, *_aligned([HEAD, *(_cells(row) for row in rows)])]))
    parts.append(_verdicts(result["verdicts"]))
    return "\n\n".join(parts)


def _header(result: dict[str, Any]) -> str:
    options, costs = result["options"], result["costs"]
    return "\n".join(
        [
            f"Simulated with the costs of {costs['name']}; commit {result['commit']};"
            f" {result['seconds']:.0f} s",
            f"Seconds. load {options['load']:g}, {options['seeds']} seeds, a GPU holds"
            f" {options['held']:g} of its largest engine, max_wait {options['max_wait']:g} s; good"
            f" is TTFT within {options['slo_ttft']:g} s and TPOT within {options['slo_itl']:g} s",
        ]
    )


def _cells(row: dict[str, Any]) -> Sequence[str]:
    ttft, shown = row["ttft_s"], ("p50", "p90", "p99")
    return (
        row["policy"],
        *(_seconds(ttft["all"].get(name)) for name in shown),
        _seconds(ttft.get("interactive", {}).get("p99")),
        _seconds(row["e2e_s"]["all"].get("p99")),
        _seconds(row["tpot_s"]["all"].get("p99"), digits=3),
        f"{row['goodput_per_s']:.3g}",
        f"{100 * row['attainment']:.1f} %",
        f"{100 * row['serving_share']:.1f} %",
        f"{100 * row['overhead_share']:.1f} %",
        str(row["swaps_in"] + row["cold_starts"]),
        str(row["preemptions"]),
        _seconds(row["longest_wait_s"]),
        f"{row['fairness']:.2f}",
    )


def _seconds(value: float | None, *, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _verdicts(found: dict[str, Any]) -> str:
    said = {True: "met", False: "NOT MET", None: "not judged"}
    lines = [
        f"default no worse than the best other policy by 5 %: {said[found['against_best']]}",
        f"mixed, interactive p99: at least 3 x better than fifo-drain:"
        f" {said[found['against_drain']]}",
        f"nobody waits beyond max_wait where that can be: {said[found['waits']]}",
    ]
    for group in found["groups"]:
        where = f"  {group['profile']}, {group['gpus']} GPUs, {group['models']} models:"
        best, drain, waits = (group[name] for name in ("against_best", "against_drain", "waits"))
        if best is not None and not best["met"]:
            lines.append(f"{where} {best['ratio']:.2f} of {best['best']}")
        if drain is not None and not drain["met"]:
            lines.append(f"{where} only {drain['ratio']:.2f} x better than fifo-drain")
        if waits is not None and not waits["met"]:
            lines.append(f"{where} somebody waited {waits['longest_s']:.1f} s")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        yield "  " + "  ".join([first, *rest]).rstrip()
