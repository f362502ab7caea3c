"""How long each move took, by phase, against a cold start."""

import json
from collections.abc import Iterable

from swapserve.client.control import Received
from swapserve.quickstart.daemon import Place
from swapserve.quickstart.screen import Screen, table
from swapserve.status import SwapSummary

SHOWN_PHASES = 4
LEAST_SHOWN_S = 0.015
_START = ("spawn", "health")
"""The phases of a cold start that every start has: warm-up and image come on top of them."""
_TITLES = {
    ("swap_in", "golden"): "swap in, image of the idle engine",
    ("swap_in", "live"): "swap in, image with requests in it",
    ("swap_out", "live"): "swap out with all that is in it",
    ("swap_out", "discard"): "swap out of an idle engine",
    ("swap_out", "kill"): "swap out, nothing kept",
}


def moves_of(events: Iterable[Received]) -> list[tuple[str, SwapSummary]]:
    """Return every finished move with its engine's name."""
    return [
        (event.data["engine"], SwapSummary.from_json(event.data["summary"]))
        for event in events
        if event.kind == "swap_ended"
    ]


def failed(moves: Iterable[tuple[str, SwapSummary]]) -> list[str]:
    """Return what went wrong with moves."""
    return [f"{name}: {move.kind} failed: {move.error}" for name, move in moves if move.error]


def show(moves: list[tuple[str, SwapSummary]], place: Place, screen: Screen) -> None:
    """Print a table of the last move of each kind; remember cold starts for later runs."""
    cold = _remembered(place)
    fresh = {name: move for name, move in moves if move.kind == "cold_start" and not move.error}
    cold |= {name: _start_s(move) for name, move in fresh.items()}
    place.cold_starts.write_text(json.dumps(cold))
    rows = [["", "model", "seconds", "faster than cold", "of which"]]
    for name, seconds in cold.items():
        move = fresh.get(name)
        title = "cold start, until it is healthy" if move else "cold start (an earlier run's)"
        rows.append([title, name, f"{seconds:.2f}", "", _phases(move) if move else ""])
    last: dict[tuple[str, str, str], SwapSummary] = {
        (move.kind, move.mechanism, name): move for name, move in moves if not move.error
    }
    for (kind, mechanism), title in _TITLES.items():
        for name in cold:
            if found := last.get((kind, mechanism, name)):
                ratio = f"{cold[name] / found.seconds:.1f} x" if kind == "swap_in" else ""
                rows.append([title, name, f"{found.seconds:.2f}", ratio, _phases(found)])
    screen.line(table(rows))
    made = [f"{name} {_phases(move, 'golden')}" for name, move in fresh.items()]
    if any(move.phases.get("golden.dump") for move in fresh.values()):
        screen.line(f"  made once after a cold start: the idle engine's image ({'; '.join(made)})")


def _start_s(move: SwapSummary) -> float:
    return sum(s for name, s in move.phases.items() if name.partition(".")[0] in _START)


def _phases(move: SwapSummary, only: str = "") -> str:
    """Return the longest phases, those of a cold start without what is done besides starting."""
    wanted = _START if move.kind == "cold_start" and not only else ()
    named = {
        name: seconds
        for name, seconds in move.phases.items()
        if name.startswith(only) and (not wanted or name.partition(".")[0] in wanted)
    }
    longest = sorted(named.items(), key=lambda item: -item[1])[:SHOWN_PHASES]
    return ", ".join(
        f"{name} {seconds:.2f}" for name, seconds in longest if seconds >= LEAST_SHOWN_S
    )


def _remembered(place: Place) -> dict[str, float]:
    try:
        return {
            str(name): float(s) for name, s in json.loads(place.cold_starts.read_text()).items()
        }
    except (OSError, ValueError, AttributeError):
        return {}
