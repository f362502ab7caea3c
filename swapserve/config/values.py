"""Sizes and durations as people write them."""

import re

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_DURATION_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

SIZE_PATTERN = r"[0-9]+(\.[0-9]+)? ?([kKmMgGtT][iI]?)?[bB]?"
DURATION_PATTERN = r"[0-9]+(\.[0-9]+)? ?(ms|s|m|h|d)?"
SIZE_WORDS = "a size such as 8GiB, 500MB or a number of bytes"
DURATION_WORDS = "a duration such as 30s, 5m, 1h or a number of seconds"

_NUMBER_UNIT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Return bytes; `8GiB` is 8 * 2**30, `500MB` 500 * 10**6, a bare number bytes.

    Raises:
        ValueError: it is not a size, or not a whole number of bytes and no unit.
    """
    number, unit = _split(text)
    factor = _SIZE_UNITS.get(unit.lower())
    if factor is None or (factor == 1 and "." in number):
        raise ValueError(text)
    whole, _, part = number.partition(".")
    return int(whole) * factor + (int(part) * factor // 10 ** len(part) if part else 0)


def parse_duration(text: str) -> float:
    """Return seconds; units are ms, s, m, h and d.

    Raises:
        ValueError: it is not a duration.
    """
    number, unit = _split(text)
    factor = _DURATION_UNITS.get(unit)
    if factor is None:
        raise ValueError(text)
    return float(number) * factor


def format_size(size: int) -> str:
    """Return the shortest exact spelling with a binary unit; `parse_size` undoes it."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def format_duration(seconds: float) -> str:
    """Return an exact spelling in the largest unit that divides it; `parse_duration` undoes it."""
    for unit, factor in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % factor == 0:
            return f"{int(seconds // factor)}{unit}"
    return f"{int(seconds)}s" if seconds == int(seconds) else f"{seconds!r}s"


def _split(text: str) -> tuple[str, str]:
    match = _NUMBER_UNIT.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    return match[1], match[2]
