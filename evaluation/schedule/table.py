"""What was found, as a table for people. Pure."""

from typing import Any

from evaluation.schedule.figures import JUDGED

_HEAD = (
    "profile, policy",
    "figure",
    "real",
    "simulated",
    "(10 - 90 %)",
    "ratio",
    "",
    "calibrated only",
)


def render(result: dict[str, Any]) -> str:
    """Return the whole result as text."""
    found = result["calibration"]
    idle, busy = found["idle"], found["busy"]
    lines = [
        f"Prompts {found['prefill_tokens_per_s']:.0f} tokens/s, {found['itl_s'] * 1e3:.1f} ms"
        f" between tokens; idle out {idle['out_s']:.2f} s, in {idle['in_s']:.2f} s; busy out"
        f" {busy['out_s']:.2f} s, in {busy['in_s']:.2f} s; cold {found['cold_s']:.2f} s",
        "",
    ]
    rows = [_HEAD]
    for name, profile in result["profiles"].items():
        for place, (figure, one) in enumerate(profile["figures"].items()):
            real = " ".join(f"{each:.3g}" for each in one["real"])
            span = f"{one['low']:.3g} - {one['high']:.3g}"
            label = name if not place else ""
            simulated = " ".join(f"{each:.3g}" for each in one["simulated"])
            blind = _ratios(profile["calibrated_only"][figure])
            verdict = one["verdict"] or ""
            rows.append((label, figure, real, simulated, span, _ratios(one), verdict, blind))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines += ["", "Pace, over the calibrated one: tokens, idle moves, busy moves"]
    for name, profile in result["profiles"].items():
        paces = (
            " ".join(f"{each:.2f}" for each in run["pace"].values()) for run in profile["runs"]
        )
        lines.append(f"  {name}: {' | '.join(paces)}")
    lines += ["", "Requests that took no longer than their P90 forecast:"]
    for name, profile in result["profiles"].items():
        lines.append(
            f"  {name}: real {_share(profile['forecasts'])},"
            f" simulated {_share(profile['forecasts_simulated'])}"
        )
    lines.append(f"  all real ones: {_share(result['forecasts'])}")
    return "\n".join(lines)


def missed(result: dict[str, Any]) -> list[str]:
    """Return what was judged and is not met."""
    return [
        f"{name}: {figure}, {profile['figures'][figure]['verdict']}"
        for name, profile in result["profiles"].items()
        for figure in JUDGED
        if profile["figures"][figure]["verdict"] != "met"
    ]


def _ratios(one: dict[str, Any]) -> str:
    return " ".join("-" if each is None else f"{each:.2f}" for each in one["ratios"])


def _share(found: dict[str, Any]) -> str:
    if found["share"] is None:
        return "none"
    return f"{found['share']:.0%} of {found['count']}"
