import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swapserve.config.values import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("500MB", 500_000_000),
        ("1.5GiB", 3 << 29),
        ("0.1GB", 100_000_000),
        ("12 kib", 12 << 10),
        ("1024", 1024),
        ("7B", 7),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes_are_bytes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "8 GiB extra", "8Gib8", "1.5", "1e3", "8XB", "٣GiB"]
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text is all there is to say
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30.0), ("5m", 300.0), ("1.5h", 5400.0), ("250ms", 0.25), ("2d", 172800.0), ("7", 7.0)],
)
def test_durations_are_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "5M", "5 min", "1h30m", "inf", "nan"])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text is all there is to say
        parse_duration(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_formatted_size_reads_back_the_same(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(min_value=0, max_value=10**9).map(lambda thousandths: thousandths / 1000))
def test_a_formatted_duration_reads_back_the_same(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-9)


@given(st.integers(0, 10**6), st.sampled_from(["KiB", "MiB", "GiB", "kB", "MB", "GB"]))
def test_a_size_grows_with_its_number(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") < parse_size(f"{number + 1}{unit}")


@given(st.text(max_size=12))
def test_no_text_makes_the_parsers_fail_otherwise(text: str) -> None:
    for parse in (parse_size, parse_duration):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0
