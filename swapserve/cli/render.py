"""Text for people: tables that fit 80 columns, sizes, bars. Pure."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from swapserve.status import DeviceStatus, EngineStatus, Status, SwapSummary

WIDTH = 80
BAR = 20
_STEP = 1024
_FULL_DIGITS = 100
_TWO_DIGITS = 10
_KIND = {
    "cold_start": "cold",
    "swap_in": "in",
    "promote": "ahead",
    "swap_out": "out",
    "stop": "stop",
}


def human_bytes(count: int) -> str:
    """Return a size in the unit that suits it, in at most eight characters."""
    if count < _STEP:
        return f"{count} B"
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < _STEP:
            break
        size, unit = size / _STEP, larger
    return f"{size:.0f} {unit}" if size >= _FULL_DIGITS else f"{size:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """Return a duration: `0.82 s`, `34.5 s`, `12 min`, `3 h`, `2 d`."""
    for limit, text in (
        (10.0, f"{seconds:.2f} s"),
        (100.0, f"{seconds:.1f} s"),
        (6000.0, f"{seconds / 60:.0f} min"),
        (360_000.0, f"{seconds / 3600:.0f} h"),
    ):
        if seconds < limit:
            return text
    return f"{seconds / 86400:.0f} d"


def status_text(status: Status, *, phases: bool = False, outlook: bool = False) -> str:
    """Return the table of `swapserve status`."""
    head = [
        f"SwapServe {status.version}, up {human_seconds(status.uptime_s)}, profile"
        f" {status.profile}, pid {status.pid}, keeper {status.keeper_pid}"
    ]
    if outlook:
        head.append(_scheduling(status))
    parts = [head, _engines(status.engines)]
    details = [line for engine in status.engines for line in _details(engine, phases=phases)]
    if any(engine.pinned for engine in status.engines):
        details.append("* pinned")
    if outlook:
        parts.append([line for engine in status.engines for line in _outlook(engine)])
    parts += [details, [_device(device) for device in status.devices]]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _engines(engines: Sequence[EngineStatus]) -> list[str]:
    if not engines:
        return ["No models are configured."]
    rows = [_row(engine) for engine in engines]
    lines = [
        f"{'MODEL':<20} {'STATE':<12} {'TIER':<6} {'MEMORY':>9} {'ACT/WAIT/SUSP':>13} LAST SWAP"
    ]
    for name, state, tier, memory, requests, last in rows:
        lines.append(
            f"{_cut(name, 20):<20} {state:<12} {tier:<6} {memory:>9} {requests:>13} {last}"
        )
    return lines


def _row(engine: EngineStatus) -> tuple[str, str, str, str, str, str]:
    return (
        engine.name + ("*" if engine.pinned else ""),
        engine.state,
        engine.tier,
        "?" if engine.footprint_bytes is None else human_bytes(engine.footprint_bytes),
        f"{engine.active}/{engine.waiting}/{engine.suspended}",
        "-" if engine.last_swap is None else _last(engine.last_swap),
    )


def _last(swap: SwapSummary) -> str:
    failed = "!" if swap.error else ""
    return f"{_KIND[swap.kind]} {human_seconds(swap.seconds)}{failed}"


def _details(engine: EngineStatus, *, phases: bool) -> list[str]:
    lines = []
    if engine.mechanism is not None:
        lines.append(_on_gpu(engine, engine.mechanism))
    if engine.error:
        lines.append(f"{engine.name}: {engine.error}")
    if phases and engine.last_swap is not None:
        lines.append(f"{engine.name}: {swap_text(engine.last_swap)}")
    return lines


def _scheduling(status: Status) -> str:
    if not status.forecasts:
        return f"policy {status.policy}, no forecasts so far"
    share = status.forecasts_met / status.forecasts
    return (
        f"policy {status.policy}, P90 of run times held for {share:.0%} of"
        f" {status.forecasts} requests"
    )


def _outlook(engine: EngineStatus) -> list[str]:
    """Say what the scheduler expects of an engine: waits, demand, costs of swaps."""
    seen, name = engine.outlook, _cut(engine.name, 20)
    queued = [f"{count} {priority}" for priority, count in seen.queued.items() if count]
    return [
        f"{name}: wait {human_seconds(seen.wait_s)}, {_rate(seen.arrivals_per_s)}",
        *([f"  queued: {', '.join(queued)}"] if queued else []),
        *(
            f"  swap {direction}: "
            + ", ".join(f"{tier} {human_seconds(cost)}" for tier, cost in costs.items())
            for direction, costs in (("out to", seen.out_s), ("in from", seen.in_s))
            if costs
        ),
    ]


def _rate(per_s: float) -> str:
    seconds, unit = next(
        (found for found in ((1, "s"), (60, "min")) if per_s * found[0] >= 1), (3600, "h")
    )
    count = per_s * seconds
    return f"{count:.{0 if count >= _TWO_DIGITS else 1}f} requests/{unit}"


def _on_gpu(engine: EngineStatus, mechanism: str) -> str:
    """Say how an engine gives GPU memory back, and what of it is in host memory now."""
    count = len(engine.devices)
    where = f"{count} GPUs" if count > 1 else _cut(engine.devices[0], 12)
    held = f", {human_bytes(engine.host_bytes)} in host memory" if engine.host_bytes else ""
    return f"{_cut(engine.name, 20)}: {mechanism} on {where}{held}"


def swap_text(swap: SwapSummary) -> str:
    """Return one transition with its phases, which add up to its seconds."""
    steps = {**swap.phases, "unaccounted": swap.unaccounted_s}
    times = ", ".join(f"{name} {seconds:.2f}" for name, seconds in steps.items())
    moved = f", {human_bytes(swap.bytes)}" if swap.bytes else ""
    ended = f"; failed: {swap.error}" if swap.error else ""
    kind = swap.kind.replace("_", " ")
    return f"{kind} ({swap.mechanism}) {human_seconds(swap.seconds)}{moved} = {times}{ended}"


def _device(device: DeviceStatus) -> str:
    used = device.committed_bytes + device.reserved_bytes
    share = used / device.capacity_bytes if device.capacity_bytes else 0.0
    committed = round(BAR * device.committed_bytes / max(1, device.capacity_bytes))
    reserved = round(BAR * share) - committed
    bar = "#" * committed + "+" * reserved
    held = f", {human_bytes(device.reserved_bytes)} reserved" if device.reserved_bytes else ""
    return (
        f"{_cut(device.name, 12):<12} [{bar:-<{BAR}}] {human_bytes(used)} of"
        f" {human_bytes(device.capacity_bytes)} ({share:.0%}){held}"
    )


def event_text(event: Mapping[str, Any]) -> str:
    """Return one event of the bus as a line."""
    at = datetime.fromtimestamp(event["at"], UTC).astimezone()
    return f"{at:%Y-%m-%d %H:%M:%S} {event.get('engine') or '-'} {_what(event)}"


def _what(event: Mapping[str, Any]) -> str:
    match event["event"]:
        case "engine_changed":
            return f"{event['old']} -> {event['new']} (tier {event['tier']}): {event['cause']}"
        case "swap_ended":
            return swap_text(SwapSummary.from_json(event["summary"]))
        case "request_ended":
            first = "" if event["ttft_s"] is None else f", first byte {event['ttft_s']:.3f} s"
            return (
                f"{event['endpoint']} {event['status']} {event['outcome']} in"
                f" {event['seconds']:.3f} s (queued {event['queue_s']:.3f} s{first})"
            )
        case "notice":
            return str(event["message"])
        case other:
            return str(other)


def _cut(text: str, width: int) -> str:
    """Shorten in the middle, since names of models differ at both ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}~{text[-tail:]}"
