"""Metrics in text format."""

import re
from dataclasses import replace

from swapserve.events import Bus, EngineChanged, Notice, RequestEnded, SwapEnded
from swapserve.metrics import Family, Metrics
from swapserve.states import EngineState, Tier
from swapserve.status import DeviceStatus, Outlook, Status, SwapSummary
from tests.support.admin_server import engine

LINE = re.compile(r'^[a-z_]+(\{([a-z]+="([^"\\\n]|\\.)*",?)+\})? -?([0-9.e+-]+|\+Inf)$')


def a_status(**changes: object) -> Status:
    ram = DeviceStatus(
        name="ram", kind="host", capacity_bytes=100, reserved_bytes=10, committed_bytes=60
    )
    return Status(
        version="1.2",
        pid=1,
        uptime_s=5.5,
        profile="root",
        keeper_pid=2,
        devices=(ram,),
        engines=(engine("a", **changes),),
    )


def a_request(**changes: float | str | None) -> RequestEnded:
    base: dict[str, object] = {
        "at": 1.0,
        "engine": "a",
        "endpoint": "/v1/completions",
        "status": 200,
        "outcome": "ok",
        "stream": True,
        "queue_s": 0.2,
        "ttft_s": 0.3,
        "seconds": 2.0,
        "suspensions": 1,
        "bytes_out": 50,
        **changes,
    }
    return RequestEnded(**base)  # type: ignore[arg-type]


def a_swap(error: str | None = None) -> SwapEnded:
    summary = SwapSummary(
        kind="swap_in",
        mechanism="golden",
        from_tier=Tier.DISK,
        to_tier=Tier.DEVICE,
        cause="request",
        seconds=0.8,
        phases={"restore": 0.6, "probe": 0.1},
        unaccounted_s=0.1,
        bytes=300,
        finished_at=1.0,
        error=error,
    )
    return SwapEnded(at=1.0, engine="a", summary=summary)


def value(text: str, series: str) -> float:
    found = [line for line in text.splitlines() if line.startswith(f"{series} ")]
    assert len(found) == 1, (series, found)
    return float(found[0].rsplit(" ", 1)[1])


def test_requests_are_counted_by_engine_endpoint_and_outcome() -> None:
    metrics, bus = Metrics(), Bus()
    bus.listen(metrics.count)
    bus.publish(a_request())
    bus.publish(a_request(ttft_s=None, outcome="client_left"))
    text = metrics.render(a_status())
    by = 'engine="a",endpoint="/v1/completions"'
    assert value(text, f'swapserve_requests_total{{{by},outcome="ok"}}') == 1
    assert value(text, f'swapserve_requests_total{{{by},outcome="client_left"}}') == 1
    assert value(text, 'swapserve_request_seconds_sum{engine="a"}') == 4
    assert value(text, 'swapserve_ttft_seconds_count{engine="a",priority="interactive"}') == 1
    assert (
        value(text, 'swapserve_queue_seconds_bucket{engine="a",priority="interactive",le="0.1"}')
        == 0
    )
    assert (
        value(text, 'swapserve_queue_seconds_bucket{engine="a",priority="interactive",le="0.25"}')
        == 2
    )
    assert (
        value(text, 'swapserve_queue_seconds_bucket{engine="a",priority="interactive",le="+Inf"}')
        == 2
    )
    assert value(text, 'swapserve_suspensions_total{engine="a"}') == 2
    assert value(text, 'swapserve_response_bytes_total{engine="a"}') == 100


def test_a_failed_swap_counts_but_its_duration_does_not() -> None:
    metrics = Metrics()
    metrics.count(a_swap())
    metrics.count(a_swap("no space"))
    text = metrics.render(a_status())
    by = 'engine="a",kind="swap_in",mechanism="golden"'
    assert value(text, f'swapserve_swaps_total{{{by},outcome="ok"}}') == 1
    assert value(text, f'swapserve_swaps_total{{{by},outcome="failed"}}') == 1
    assert value(text, 'swapserve_swap_seconds_count{kind="swap_in",mechanism="golden"}') == 1
    phases = 'swapserve_swap_phase_seconds_total{engine="a",kind="swap_in",phase='
    assert value(text, f'{phases}"restore"}}') == 1.2
    assert value(text, f'{phases}"unaccounted"}}') == 0.2
    assert value(text, f"swapserve_swap_bytes_total{{{by}}}") == 600


def test_gauges_follow_the_status_and_nothing_is_left_of_the_one_before() -> None:
    metrics = Metrics()
    text = metrics.render(a_status(state=EngineState.READY, active=3))
    assert value(text, 'swapserve_engine_state{engine="a",state="ready"}') == 1
    assert value(text, 'swapserve_engine_state{engine="a",state="failed"}') == 0
    assert value(text, 'swapserve_leases{engine="a",state="active"}') == 3
    assert value(text, 'swapserve_device_bytes{device="ram",kind="committed"}') == 60
    assert value(text, 'swapserve_build_info{version="1.2"}') == 1
    assert value(text, "swapserve_uptime_seconds") == 5.5
    assert "swapserve_engine_footprint_bytes{" in text
    text = metrics.render(a_status(footprint_bytes=None))
    assert "swapserve_engine_footprint_bytes{" not in text
    assert value(text, 'swapserve_engine_state{engine="a",state="ready"}') == 0


def test_state_changes_are_counted_and_notices_are_not_our_business() -> None:
    metrics = Metrics()
    states = {"old": EngineState.READY, "new": EngineState.SWAPPING_OUT}
    metrics.count(EngineChanged(at=1.0, engine="a", tier=Tier.DEVICE, cause="x", **states))
    metrics.count(Notice(at=1.0, engine=None, message="m"))
    text = metrics.render(a_status())
    assert value(text, 'swapserve_engine_changes_total{engine="a",state="swapping_out"}') == 1


def test_every_line_is_in_the_format_and_odd_names_are_escaped() -> None:
    metrics = Metrics()
    metrics.count(a_request(engine='we"ird\\\nname'))
    metrics.count(a_swap())
    text = metrics.render(a_status())
    assert 'engine="we\\"ird\\\\\\nname"' in text
    for line in text.splitlines():
        assert line.startswith("# ") or LINE.match(line), line
    assert text.endswith("\n")


def test_help_is_escaped_and_buckets_end_with_everything() -> None:
    family = Family("x_seconds", "histogram", "a\nb\\", ())
    family.observe(0.005)
    family.observe(10_000)
    lines = list(family.lines())
    assert lines[:2] == ["# HELP x_seconds a\\nb\\\\", "# TYPE x_seconds histogram"]
    assert 'x_seconds_bucket{le="0.005"} 1' in lines
    assert lines[-3:] == [
        'x_seconds_bucket{le="+Inf"} 2',
        "x_seconds_sum 10000.005",
        "x_seconds_count 2",
    ]


def test_what_the_scheduler_expects_is_measured_at_each_scrape() -> None:
    outlook = Outlook(
        queued={"urgent": 1, "batch": 4},
        wait_s=12.5,
        arrivals_per_s=0.25,
        out_s={"host": 0.5, "none": 0.75},
        in_s={"host": 1.5},
    )
    status = replace(a_status(outlook=outlook), policy="lru", forecasts=10, forecasts_met=9)
    metrics = Metrics()
    text = metrics.render(status)
    for series, expected in (
        ('requests_waiting{engine="a",priority="urgent"}', 1),
        ('requests_waiting{engine="a",priority="batch"}', 4),
        ('predicted_wait_seconds{engine="a"}', 12.5),
        ('arrivals_per_second{engine="a"}', 0.25),
        ('swap_cost_seconds{engine="a",direction="out",tier="host"}', 0.5),
        ('swap_cost_seconds{engine="a",direction="out",tier="none"}', 0.75),
        ('swap_cost_seconds{engine="a",direction="in",tier="host"}', 1.5),
        ('forecasts{result="met"}', 9),
        ('forecasts{result="missed"}', 1),
        ('scheduling_policy_info{policy="lru"}', 1),
    ):
        assert value(text, f"swapserve_{series}") == expected
    assert "swapserve_swap_cost_seconds{" not in metrics.render(a_status())


def test_tokens_and_waits_are_told_apart_by_priority() -> None:
    metrics = Metrics()
    metrics.count(a_request(priority="batch", tokens_in=100.0, tokens_out=20.0))
    metrics.count(a_request(priority="batch", tokens_in=50.0, tokens_out=5.0))
    metrics.count(a_request(priority="urgent", tokens_in=7.0, tokens_out=None))
    text = metrics.render(a_status())
    batch = '{engine="a",priority="batch"}'
    assert value(text, f"swapserve_prompt_tokens_total{batch}") == 150
    assert value(text, f"swapserve_generation_tokens_total{batch}") == 25
    assert value(text, f"swapserve_queue_seconds_count{batch}") == 2
    assert value(text, 'swapserve_queue_seconds_count{engine="a",priority="urgent"}') == 1
    assert 'tokens_total{engine="a",priority="urgent"}' not in text
