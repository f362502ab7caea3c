"""The summary as a table for people. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

COLUMNS = ("cold", "swap_in", "bare", "hot", "discard", "kill")
MIB = 1 << 20


def render(report: dict[str, Any]) -> str:
    """Return the whole report as text."""
    parts = [_header(report)]
    for engine, found in report["summary"].items():
        parts.append(_engine(engine, found))
    return "\n\n".join(parts)


def _header(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    memory = machine["memory_bytes"] / (1 << 30)
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {memory:.0f} GiB; {machine['os']},"
        f" Linux {machine['kernel']}",
        f"{versions}; commit {report['commit']}; {report['minutes']:.1f} minutes",
        "Seconds: medians. Ratios: median (95 % interval, n).",
    ]
    return "\n".join(lines)


def _engine(name: str, found: dict[str, Any]) -> str:
    head = ("idle", "huge pages", *COLUMNS, "cold/swap in", "swap in/bare")
    rows = [
        (
            f"{arm['idle_s']:g} s",
            arm["huge_pages"],
            *(_seconds(arm[column]) for column in COLUMNS),
            _ratio(arm["cold_over_swapin"]),
            _ratio(arm["swapin_over_bare"]),
        )
        for arm in found["arms"]
    ]
    lines = [name, *_aligned([head, *rows])]
    over_bare, over_kill = found["swapin_over_bare"], found["discard_minus_kill_s"]
    lines.append(f"  swap in / bare, all pairs without idle time: {_ratio(over_bare)}")
    lines.append(f"  discard - bare kill, seconds: {_ratio(over_kill)}")
    lines.append(f"  golden image: {_mib(found['image_bytes'])}")
    for title, key in (("preempted streams", "preempt"), ("batched", "batched")):
        if found[key] and found[key]["streams"]:
            lines.append(f"  {title}: {_streams(found[key])}")
    return "\n".join(lines)


def _streams(found: dict[str, Any]) -> str:
    equal = {True: "tokens equal", False: "TOKENS NOT EQUAL", None: "tokens not compared"}
    whole = "count, order and ending right" if found["whole"] else "NOT WHOLE"
    return (
        f"{found['counted']} of {found['streams']} counted, {equal[found['tokens_equal']]},"
        f" {whole};"
        f" live out {found['swap_out_s']:.2f} s, back {found['swap_in_s']:.2f} s,"
        f" {_mib(found['image_bytes'])}"
    )


def _seconds(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{found['median']:.3f}"


def _ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    text = f"{found['median']:.3g} ({found['low']:.3g}-{found['high']:.3g}, n={found['n']})"
    return f"{text} {found['verdict']}" if "verdict" in found else text


def _mib(found: float | None) -> str:
    return "-" if found is None else f"{found / MIB:.0f} MiB"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield ("  " + "  ".join(cells)).rstrip()
