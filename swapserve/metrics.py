"""Metrics in Prometheus' text format: counted from events, measured from a status at each scrape.

Source for the format: prometheus.io, "Exposition formats", text-based format 0.0.4.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from swapserve.events import BusEvent, EngineChanged, RequestEnded, SwapEnded
from swapserve.states import EngineState
from swapserve.status import Outlook, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]


@dataclass(slots=True)
class _Distribution:
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0


class Family:
    """All series of one metric. Label values are given in the order of `labels`."""

    def __init__(self, name: str, kind: Kind, text: str, labels: Labels) -> None:
        self.name = name
        self.kind = kind
        self.text = text
        self.labels = labels
        self._values: dict[Labels, float] = {}
        self._distributions: dict[Labels, _Distribution] = {}

    def add(self, amount: float, *labels: str) -> None:
        """Raise a counter."""
        self._values[labels] = self._values.get(labels, 0.0) + amount

    def set(self, value: float, *labels: str) -> None:
        """Give a gauge its value."""
        self._values[labels] = value

    def observe(self, seconds: float, *labels: str) -> None:
        """Count one duration in a histogram."""
        found = self._distributions.setdefault(labels, _Distribution())
        found.counts[bisect_left(SECONDS, seconds)] += 1
        found.total += seconds

    def clear(self) -> None:
        """Forget every series."""
        self._values.clear()

    def lines(self) -> Iterator[str]:
        """Yield the metric in text format."""
        yield f"# HELP {self.name} {_escaped(self.text)}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in self._values.items():
            yield f"{self.name}{self._named(labels)} {_number(value)}"
        for labels, found in self._distributions.items():
            yield from self._buckets(labels, found)

    def _buckets(self, labels: Labels, found: _Distribution) -> Iterator[str]:
        below = 0
        for bound, count in zip((*map(_number, SECONDS), "+Inf"), found.counts, strict=True):
            below += count
            yield f"{self.name}_bucket{self._named(labels, le=bound)} {below}"
        yield f"{self.name}_sum{self._named(labels)} {_number(found.total)}"
        yield f"{self.name}_count{self._named(labels)} {below}"

    def _named(self, labels: Labels, **more: str) -> str:
        pairs = {**dict(zip(self.labels, labels, strict=True)), **more}
        if not pairs:
            return ""
        inside = ",".join(f'{name}="{_escaped_value(value)}"' for name, value in pairs.items())
        return f"{{{inside}}}"


class Metrics:
    """Every metric of the daemon. `bus.listen(metrics.count)` feeds it."""

    def __init__(self) -> None:
        self.families: list[Family] = []
        new = self._new
        engine: Labels = ("engine",)
        seconds: Kind = "histogram"
        self._requests = new(
            "requests_total", "counter", "Requests that ended.", "engine", "endpoint", "outcome"
        )
        self._request_s = new(
            "request_seconds", seconds, "From accepting a request to its last byte.", *engine
        )
        self._ttft_s = new(
            "ttft_seconds",
            seconds,
            "From accepting a request to the first byte of its answer, swaps included.",
            "engine",
            "priority",
        )
        self._queue_s = new(
            "queue_seconds",
            seconds,
            "From asking for the engine to being let in.",
            "engine",
            "priority",
        )
        self._prompt_tokens = new(
            "prompt_tokens_total", "counter", "Tokens of prompts, estimated.", "engine", "priority"
        )
        self._generation_tokens = new(
            "generation_tokens_total", "counter", "Tokens of whole answers.", "engine", "priority"
        )
        self._bytes_out = new(
            "response_bytes_total", "counter", "Body bytes sent to clients.", *engine
        )
        self._suspensions = new(
            "suspensions_total", "counter", "Times a running request was suspended.", *engine
        )
        self._swaps = new(
            "swaps_total", "counter", "Transitions.", "engine", "kind", "mechanism", "outcome"
        )
        self._swap_s = new(
            "swap_seconds", seconds, "Duration of successful transitions.", "kind", "mechanism"
        )
        self._phases = new(
            "swap_phase_seconds_total", "counter", "Time by phase.", "engine", "kind", "phase"
        )
        self._swap_bytes = new(
            "swap_bytes_total", "counter", "Bytes moved.", "engine", "kind", "mechanism"
        )
        self._changes = new(
            "engine_changes_total", "counter", "Entries into each state.", "engine", "state"
        )
        self._state = new(
            "engine_state",
            "gauge",
            "1 for the engine's state, 0 for the others.",
            "engine",
            "state",
        )
        self._footprint = new(
            "engine_footprint_bytes", "gauge", "Bytes the engine takes on its devices.", *engine
        )
        self._host = new(
            "engine_host_bytes", "gauge", "Bytes of GPU state that rest in host memory.", *engine
        )
        self._image = new(
            "engine_image_bytes", "gauge", "Bytes of the engine's images on disk.", *engine
        )
        self._leases = new("leases", "gauge", "Open requests.", "engine", "state")
        self._waiting = new(
            "requests_waiting", "gauge", "Requests that wait.", "engine", "priority"
        )
        self._wait_s = new(
            "predicted_wait_seconds", "gauge", "Wait of a request that came now.", *engine
        )
        self._arrivals = new(
            "arrivals_per_second", "gauge", "Rate at which requests come lately.", *engine
        )
        self._cost_s = new(
            "swap_cost_seconds",
            "gauge",
            "Expected duration of a swap while idle.",
            "engine",
            "direction",
            "tier",
        )
        self._forecasts = new(
            "forecasts",
            "gauge",
            "Requests whose run time was forecast, by whether it held.",
            "result",
        )
        self._policy = new("scheduling_policy_info", "gauge", "Always 1.", "policy")
        self._device = new("device_bytes", "gauge", "Memory of a device.", "device", "kind")
        self._uptime = new("uptime_seconds", "gauge", "Age of the daemon.")
        self._info = new("build_info", "gauge", "Always 1; the version is a label.", "version")

    def count(self, event: BusEvent) -> None:
        """Take an event into account."""
        match event:
            case RequestEnded():
                self._request(event)
            case SwapEnded():
                self._swap(event)
            case EngineChanged():
                self._changes.add(1, event.engine, event.new)
            case _:
                pass

    def render(self, status: Status) -> str:
        """Return everything as text, the gauges as `status` has them."""
        self._measure(status)
        return "".join(f"{line}\n" for family in self.families for line in family.lines())

    def _new(self, name: str, kind: Kind, text: str, *labels: str) -> Family:
        family = Family(f"swapserve_{name}", kind, text, labels)
        self.families.append(family)
        return family

    def _request(self, event: RequestEnded) -> None:
        self._requests.add(1, event.engine, event.endpoint, event.outcome)
        self._request_s.observe(event.seconds, event.engine)
        self._queue_s.observe(event.queue_s, event.engine, event.priority)
        if event.ttft_s is not None:
            self._ttft_s.observe(event.ttft_s, event.engine, event.priority)
        if event.tokens_out is not None:
            self._prompt_tokens.add(event.tokens_in, event.engine, event.priority)
            self._generation_tokens.add(event.tokens_out, event.engine, event.priority)
        self._bytes_out.add(event.bytes_out, event.engine)
        self._suspensions.add(event.suspensions, event.engine)

    def _swap(self, event: SwapEnded) -> None:
        swap = event.summary
        outcome = "ok" if swap.error is None else "failed"
        self._swaps.add(1, event.engine, swap.kind, swap.mechanism, outcome)
        if swap.error is None:
            self._swap_s.observe(swap.seconds, swap.kind, swap.mechanism)
        phases: Mapping[str, float] = {**swap.phases, "unaccounted": swap.unaccounted_s}
        for phase, seconds in phases.items():
            self._phases.add(seconds, event.engine, swap.kind, phase)
        self._swap_bytes.add(swap.bytes, event.engine, swap.kind, swap.mechanism)

    def _measure(self, status: Status) -> None:
        for family in self.families:
            if family.kind == "gauge":
                family.clear()
        self._uptime.set(status.uptime_s)
        self._info.set(1, status.version)
        self._policy.set(1, status.policy)
        self._forecasts.set(status.forecasts_met, "met")
        self._forecasts.set(status.forecasts - status.forecasts_met, "missed")
        for engine in status.engines:
            self._look_out(engine.name, engine.outlook)
            for state in EngineState:
                self._state.set(float(engine.state is state), engine.name, state)
            if engine.footprint_bytes is not None:
                self._footprint.set(engine.footprint_bytes, engine.name)
            self._host.set(engine.host_bytes, engine.name)
            self._image.set(engine.image_bytes, engine.name)
            self._leases.set(engine.active, engine.name, "active")
            self._leases.set(engine.waiting, engine.name, "waiting")
            self._leases.set(engine.suspended, engine.name, "suspended")
        for device in status.devices:
            self._device.set(device.capacity_bytes, device.name, "capacity")
            self._device.set(device.reserved_bytes, device.name, "reserved")
            self._device.set(device.committed_bytes, device.name, "committed")

    def _look_out(self, engine: str, outlook: Outlook) -> None:
        for priority, count in outlook.queued.items():
            self._waiting.set(count, engine, priority)
        self._wait_s.set(outlook.wait_s, engine)
        self._arrivals.set(outlook.arrivals_per_s, engine)
        for direction, costs in (("out", outlook.out_s), ("in", outlook.in_s)):
            for tier, seconds in costs.items():
                self._cost_s.set(seconds, engine, direction, tier)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _escaped_value(text: str) -> str:
    return _escaped(text).replace('"', r"\"")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
