"""What people read."""

from dataclasses import replace

import pytest

from swapserve.cli.render import event_text, human_bytes, human_seconds, status_text
from swapserve.events import EngineChanged, Notice, RequestEnded, SwapEnded, as_json
from swapserve.states import EngineState, Tier
from swapserve.status import Outlook
from tests.support.admin_server import GIB, LAST_SWAP, engine, two_engines


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (210 << 20, "210 MiB"),
        (3 * GIB, "3.0 GiB"),
        (100 * GIB, "100 GiB"),
        (5 << 40, "5.0 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_bytes_are_shown_in_the_unit_that_suits(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.819, "0.82 s"), (34.51, "34.5 s"), (130, "2 min"), (10_000, "3 h"), (400_000, "5 d")],
)
def test_durations_are_shown_in_the_unit_that_suits(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_the_table_shows_every_model_and_device() -> None:
    lines = status_text(two_engines()).splitlines()
    assert "org/model-a          ready        device   3.0 GiB         2/1/0 in 0.82 s" in lines
    assert "model-b              swapped_out  disk     3.0 GiB         0/0/1 -" in lines
    assert "ram          [###############-----] 3.0 GiB of 4.0 GiB (75%)" in lines


def test_the_longest_table_fits_80_columns() -> None:
    wide = engine(
        "organisation/a-model-with-a-very-long-name-instruct-q4",
        state=EngineState.SWAPPING_OUT,
        tier=Tier.DEVICE,
        footprint_bytes=1000 << 20,
        active=100,
        waiting=256,
        suspended=100,
        pinned=True,
        last_swap=replace(LAST_SWAP, kind="cold_start", seconds=99.94, error="no"),
        devices=tuple(f"gpu{number}" for number in range(16)),
        mechanism="deep_sleep",
        host_bytes=1000 << 20,
        outlook=Outlook(
            queued={"urgent": 256, "interactive": 256, "batch": 256},
            wait_s=99.94,
            arrivals_per_s=99.94,
            out_s=dict.fromkeys(("host", "disk", "none"), 99.94),
            in_s=dict.fromkeys(("host", "disk", "none"), 99.94),
        ),
    )
    status = two_engines()
    device = replace(
        status.devices[0],
        name="a-long-device-name",
        reserved_bytes=1000 << 20,
        capacity_bytes=1000 << 30,
    )
    status = replace(status, engines=(wide,), devices=(device,), uptime_s=9e6, pid=4194304)
    status = replace(status, policy="time-slice-drain", forecasts=10**6, forecasts_met=10**6)
    status = replace(status, keeper_pid=4194303, profile="unprivileged")
    text = status_text(status, outlook=True)
    assert max(map(len, text.splitlines())) <= 80
    assert "* pinned" in text
    assert "organisat" in text
    assert "q4*" in text


def test_phases_add_up_to_the_swap() -> None:
    text = status_text(two_engines(), phases=True)
    assert (
        "org/model-a: swap in (golden) 0.82 s, 2.0 GiB = restore 0.70, probe 0.10, unaccounted 0.02"
    ) in text


def test_an_engine_on_a_gpu_says_how_it_leaves_it_and_what_is_in_host_memory() -> None:
    away = engine("b", devices=("gpu0",), mechanism="auto", tier=Tier.HOST, host_bytes=GIB)
    there = engine("c", devices=("gpu0", "gpu1"), mechanism="sleep")
    text = status_text(replace(two_engines(), engines=(away, there)))
    assert "\nb: auto on gpu0, 1.0 GiB in host memory\nc: sleep on 2 GPUs\n" in text
    assert "host memory" not in status_text(two_engines())


def test_an_engines_error_is_shown_below_the_table() -> None:
    status = two_engines()
    failed = engine("model-b", state=EngineState.FAILED, error="it crashed")
    assert "\nmodel-b: it crashed\n" in status_text(replace(status, engines=(failed,)))


def test_a_daemon_without_models_says_so() -> None:
    assert "No models are configured." in status_text(replace(two_engines(), engines=()))


def test_reserved_bytes_are_drawn_apart() -> None:
    status = two_engines()
    device = replace(status.devices[0], committed_bytes=GIB, reserved_bytes=2 * GIB)
    text = status_text(replace(status, devices=(device,)))
    assert "[#####++++++++++-----] 3.0 GiB of 4.0 GiB (75%), 2.0 GiB reserved" in text


def test_the_outlook_says_waits_demand_and_costs() -> None:
    expected = Outlook(
        queued={"urgent": 2, "interactive": 0, "batch": 30},
        wait_s=12.34,
        arrivals_per_s=0.2,
        out_s={"host": 0.5, "none": 1.0},
        in_s={"host": 0.25, "none": 30.0},
    )
    status = replace(
        two_engines(),
        policy="adaptive",
        forecasts=200,
        forecasts_met=181,
        engines=(engine("a", outlook=expected), engine("b")),
    )
    lines = status_text(status, outlook=True).splitlines()
    assert "policy adaptive, P90 of run times held for 90% of 200 requests" in lines
    at = lines.index("a: wait 12.3 s, 12 requests/min")
    assert lines[at + 1 : at + 5] == [
        "  queued: 2 urgent, 30 batch",
        "  swap out to: host 0.50 s, none 1.00 s",
        "  swap in from: host 0.25 s, none 30.0 s",
        "b: wait 0.00 s, 0.0 requests/h",
    ]
    assert "wait" not in status_text(status).lower().replace("act/wait/susp", "")
    none = status_text(replace(status, forecasts=0), outlook=True)
    assert "policy adaptive, no forecasts so far" in none


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (123.4, "123 requests/s"),
        (9.94, "9.9 requests/s"),
        (0.999, "60 requests/min"),
        (1 / 60, "1.0 requests/min"),
        (0.001, "3.6 requests/h"),
    ],
)
def test_a_rate_is_shown_in_the_unit_that_suits(rate: float, words: str) -> None:
    busy = engine("a", outlook=Outlook(arrivals_per_s=rate))
    assert words in status_text(replace(two_engines(), engines=(busy,)), outlook=True)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            EngineChanged(
                at=0.0,
                engine="a",
                old=EngineState.READY,
                new=EngineState.DRAINING,
                tier=Tier.DEVICE,
                cause="a waits",
            ),
            "a ready -> draining (tier device): a waits",
        ),
        (
            SwapEnded(at=0.0, engine="a", summary=replace(LAST_SWAP, error="disk full")),
            "unaccounted 0.02; failed: disk full",
        ),
        (
            RequestEnded(
                at=0.0,
                engine="a",
                endpoint="/v1/completions",
                status=200,
                outcome="ok",
                stream=True,
                queue_s=0.5,
                ttft_s=0.75,
                seconds=2.0,
                suspensions=1,
                bytes_out=10,
            ),
            "/v1/completions 200 ok in 2.000 s (queued 0.500 s, first byte 0.750 s)",
        ),
        (Notice(at=0.0, engine=None, message="image dropped"), "- image dropped"),
    ],
)
def test_each_kind_of_event_is_one_line(
    event: EngineChanged | SwapEnded | RequestEnded | Notice, words: str
) -> None:
    line = event_text(as_json(event))
    assert words in line
    assert "\n" not in line
