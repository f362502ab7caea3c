"""What a run found, as text for people. Pure."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

GB = 1e9


def render(result: dict[str, Any]) -> str:
    """Return the whole result as text; parts that are missing or empty are left out."""
    parts = result["parts"]
    sections = [_head(result)]
    for name, draw in (
        ("facts", _facts),
        ("bandwidth", _bandwidth),
        ("calls", _calls),
        ("engines", _engines),
    ):
        if name in parts:
            sections.append("\n".join([_title(name, parts[name]), *draw(parts[name])]))
    return "\n\n".join(sections)


def _head(result: dict[str, Any]) -> str:
    return f"commit {result['commit']}, {result['started']}, {result['seconds']:.0f} s"


def _title(name: str, part: dict[str, Any]) -> str:
    why = part["why"].splitlines()[0] if part["why"] else ""
    return f"{name}: {part['state']}{f' ({why})' if why else ''}"


def _facts(part: dict[str, Any]) -> Iterable[str]:
    gpu, checkpoint = part.get("gpu", {}), part.get("checkpoint", {})
    if gpu:
        pcie = f"PCIe {gpu['pcie_generation_most']} x{gpu['pcie_width_most']}"
        yield f"  {gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, {pcie}"
    if checkpoint:
        yield f"  checkpoints: {checkpoint['api'] or 'none: ' + checkpoint['why_not']}"


def _bandwidth(part: dict[str, Any]) -> Iterable[str]:
    for rate in part.get("rates", ()):
        if "gb_per_s" in rate:
            yield f"  {rate['what']:<34} {rate['gb_per_s']:7.1f} GB/s"


def _calls(part: dict[str, Any]) -> Iterable[str]:
    for worker in part.get("workers", ())[:1]:
        first, again = worker["first_call_s"], worker["next_call_s"]
        yield f"  first call of a new worker {first:.3f} s, the next {again:.4f} s"
    laps = [lap for lap in part.get("laps", ()) if "content" in lap]
    kinds = dict.fromkeys((lap["bytes"], lap["huge_pages"]) for lap in laps)
    for size, huge_pages in kinds:
        found = [lap for lap in laps if (lap["bytes"], lap["huge_pages"]) == (size, huge_pages)]
        out, back = _median(found, "checkpoint_s"), _median(found, "restore_s")
        yield (
            f"  {size / GB:5.1f} GB, huge pages {'on ' if huge_pages else 'off'}:"
            f" lock {_median(found, 'lock_s'):.3f}, checkpoint {out:.2f} s ({size / GB / out:.1f}"
            f" GB/s), restore {back:.2f} s ({size / GB / back:.1f} GB/s),"
            f" unlock {_median(found, 'unlock_s'):.3f}; content equal, n={len(found)}"
        )
    for pair in part.get("pairs", ()):
        if "content" in pair:
            how = "at once" if pair["together"] else "one by one"
            sizes = f"2 x {pair['bytes_each'] / GB:.1f} GB {how}"
            yield f"  {sizes}: out {pair['out_s']:.2f} s, back {pair['back_s']:.2f} s"


def _engines(part: dict[str, Any]) -> Iterable[str]:
    for name, found in part.items():
        if isinstance(found, dict) and ("cold" in found or "failures" in found):
            yield from _engine(name, found)


def _engine(name: str, found: dict[str, Any]) -> Iterable[str]:
    cold = [each["first_token_s"] for each in found.get("cold", ())]
    yield f"  {name}: cold start {_seconds(cold)} to the first token"
    for kind in [key for key in found if key.endswith("cycles")]:
        whole = [cycle for cycle in found[kind] if cycle.get("equal")]
        outs = [cycle["out_s"] for cycle in whole]
        backs = [cycle["first_token_s"] for cycle in whole]
        yield (
            f"    {kind}: {len(whole)} of {len(found[kind])} with equal answers;"
            f" out {_seconds(outs)}, back to the first token {_seconds(backs)}"
        )
    for stream in found.get("preempted", ()):
        if "equal" in stream:
            said = "equal" if stream["equal"] else f"NOT EQUAL: {stream['why']}"
            place = f"{stream['before']} + {stream['after']} pieces"
            where = "" if stream["in_mid_stream"] else ", too late: IT WAS OVER"
            yield f"    preempted stream: {place}, silent {stream['gap_s']:.2f} s, {said}{where}"
    if kills := [kill["seconds"] for kill in found.get("kills", ())]:
        yield f"    kill {_seconds(kills)}"
    if load := found.get("load"):
        moves = sum(move["kind"] == "swap_in" for move in found.get("load_moves", ()))
        yield (
            f"    two under load: {load['seconds']:.0f} s, {load['answers']} answers,"
            f" {moves} swaps in, {load['lost']} lost, {load['wrong']} wrong"
        )
    for failure in found.get("failures", ()):
        yield f"    {failure['what']}: {failure['why'].splitlines()[0]}"


def wrong(result: dict[str, Any]) -> list[str]:
    """Return everything that came back as something else than it was."""
    parts = result["parts"]
    engines = [each for each in parts.get("engines", {}).values() if isinstance(each, dict)]
    found = []
    for part in (parts.get("calls", {}), *engines):
        found += [
            f"{failure['what']}: {failure['why'].splitlines()[0]}"
            for failure in part.get("failures", ())
            if any(name in failure["why"] for name in ("WrongContent", "Unequal"))
        ]
        found += [f"a stream: {s['why']}" for s in part.get("preempted", ()) if s.get("why")]
        if count := part.get("load", {}).get("wrong"):
            found.append(f"{count} answers under load")
    return found


def _median(samples: Sequence[dict[str, Any]], key: str) -> float:
    return max(float(median(sample[key] for sample in samples)), 1e-9)


def _seconds(values: Sequence[float]) -> str:
    return f"{median(values):.2f} s" if values else "-"
