"""Reading stored figures back: what is not as it should be counts as not stored. Pure."""

import math
from collections.abc import Iterator

LARGEST = 1e12
"""Seconds, tokens or bytes; what is beyond is not believed."""


def valid(value: float) -> bool:
    """Return whether it can be a figure: a number from 0 to `LARGEST`."""
    return 0.0 <= value <= LARGEST


def number(value: object) -> float | None:
    """Return a stored figure; None if it is no finite number from 0 to `LARGEST`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if valid(value) else None


def signed(value: object) -> float | None:
    """Return a stored figure that may be negative; None if it is no number of sensible size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return math.copysign(float(abs(value)), value) if valid(abs(value)) else None


def numbers(value: object, limit: int) -> list[float]:
    """Return the last `limit` stored figures of a list; empty if one of them is wrong."""
    if not isinstance(value, list):
        return []
    found = [number(item) for item in value[-limit:]]
    return [item for item in found if item is not None] if None not in found else []


def fields(value: object) -> dict[str, object]:
    """Return a stored object's fields; none if it is something else."""
    if not isinstance(value, dict):
        return {}
    return {key: item for key, item in value.items() if isinstance(key, str)}


def objects(value: object, limit: int) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the last `limit` names and objects of a stored table of objects."""
    for name, item in list(fields(value).items())[-limit:]:
        if isinstance(item, dict):
            yield name, fields(item)
