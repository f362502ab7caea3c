import pytest

from evaluation.schedule.calibrate import Calibration
from swapserve.states import Tier


def _calibration(**changed: object) -> Calibration:
    samples = {
        "cold": [1.0, 3.0],
        "first": {8: [0.036], 32: [0.084, 0.084, 9.0], 128: [0.276]},
        "itl": [0.013, 0.012, 0.5],
        "out_idle": [0.01],
        "out_busy": [0.4, 0.5, 0.6],
        "in_idle": [0.2, 0.25, 0.3],
        "in_busy": [0.3],
    }
    return Calibration(**{**samples, **changed})  # type: ignore[arg-type]


def test_the_time_to_the_first_token_is_a_line_through_the_medians() -> None:
    speed = _calibration().kind().speed
    assert speed.first_s == pytest.approx(0.02)
    assert speed.prefill_tokens_per_s == pytest.approx(500.0)
    assert speed.itl_s == pytest.approx(0.013)


def test_a_slower_pace_slows_prompts_and_answers_alike() -> None:
    found = _calibration(in_idle_daemon=[0.2], in_busy_daemon=[0.3])
    pace = found.pace(0.026, [0.3] * 5, [0.9] * 4)
    assert pace.tokens == pytest.approx(2.0)
    assert pace.idle == pytest.approx(1.5)
    assert pace.busy == 1.0, "four moves tell nothing"
    usual, slow = found.kind(), found.kind(pace)
    assert slow.speed.alone_s(100, 50) == pytest.approx(2 * usual.speed.alone_s(100, 50))
    drop, keep = (Tier.DISK, False), (Tier.DISK, True)
    assert slow.ways[drop].in_s == pytest.approx(1.5 * usual.ways[drop].in_s)
    assert slow.ways[keep] == usual.ways[keep]


def test_the_simulator_gets_a_way_with_requests_and_one_without() -> None:
    kind = _calibration().kind()
    assert kind.dumps
    assert kind.ways[Tier.DISK, True].out_s == pytest.approx(0.5)
    assert kind.ways[Tier.DISK, False].in_s == pytest.approx(0.25)
    assert kind.cold_s == pytest.approx(2.0)


def test_moves_that_always_take_the_same_have_no_noise() -> None:
    steady = _calibration(out_busy=[0.5] * 3, in_busy=[0.3] * 3, in_idle=[0.2] * 3)
    assert steady.noise() == pytest.approx(0.0)
    assert 0.0 < _calibration().noise() < 0.5


def test_calibrations_are_pooled_sample_by_sample() -> None:
    pooled = Calibration.pooled([_calibration(), _calibration(itl=[0.1] * 4)])
    assert pooled.itl == [0.013, 0.012, 0.5, 0.1, 0.1, 0.1, 0.1]
    assert pooled.first[32] == [0.084, 0.084, 9.0] * 2
    assert pooled.as_json()["itl_s"] == pytest.approx(0.1)
