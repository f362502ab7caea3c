"""Charts as SVG text: panels with axes, lines, dots and one legend. Pure, and no library needed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 300, 200
"""Of a panel, in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 40
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
"""Told apart by people who see colours differently (Okabe and Ito)."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart. `series` are by name; the same name has the same colour in all panels."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[Point]]
    names: Sequence[str] = ()
    """Labels of x = 0, 1, ...: then points are dots, not lines."""
    log_x: bool = False
    log_y: bool = False
    y_from_zero: bool = False


def figure(title: str, panels: Sequence[Panel], *, columns: int) -> str:
    """Return panels in rows, with a legend below the title."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    rows = math.ceil(len(panels) / columns)
    head = 52
    width = columns * (WIDTH + LEFT + RIGHT)
    height = head + rows * (HEIGHT + TOP + BOTTOM)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 18, title, size=14),
    ]
    at = LEFT
    for name in names:
        lines.append(f'<rect x="{at}" y="30" width="10" height="10" fill="{colours[name]}"/>')
        lines.append(_text(at + 14, 39, name))
        at += 30 + 7 * len(name)
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        left = column * (WIDTH + LEFT + RIGHT) + LEFT
        top = head + row * (HEIGHT + TOP + BOTTOM) + TOP
        lines.append(f'<g transform="translate({left} {top})">')
        lines += _drawn(panel, colours)
        lines.append("</g>")
    return "\n".join([*lines, "</svg>"]) + "\n"


def _drawn(panel: Panel, colours: dict[str, str]) -> Iterable[str]:
    points = [point for line in panel.series.values() for point in line]
    yield _text(0, -8, panel.title, size=12)
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>'
    if not points:
        yield _text(WIDTH / 2, HEIGHT / 2, "nothing", anchor="middle")
        return
    across = _Axis([x for x, _ in points], WIDTH, log=panel.log_x, names=panel.names)
    floor = [0.0] if panel.y_from_zero else []
    up = _Axis([y for _, y in points] + floor, HEIGHT, log=panel.log_y)
    for value, text in across.ticks():
        x = across.at(value)
        yield f'<path d="M{x:.1f} 0V{HEIGHT}" stroke="#eee"/>'
        yield _text(x, HEIGHT + 14, text, anchor="middle")
    for value, text in up.ticks():
        y = HEIGHT - up.at(value)
        yield f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#eee"/>'
        yield _text(-4, y + 4, text, anchor="end")
    yield _text(WIDTH / 2, HEIGHT + 30, panel.x_label, anchor="middle")
    yield (
        f'<text transform="translate(-40 {HEIGHT / 2}) rotate(-90)"'
        f' text-anchor="middle">{escape(panel.y_label)}</text>'
    )
    for name, line in panel.series.items():
        places = [(across.at(x), HEIGHT - up.at(y)) for x, y in line]
        if panel.names:
            for x, y in places:
                yield (
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colours[name]}"'
                    f' fill-opacity="0.8"><title>{escape(name)}</title></circle>'
                )
        elif places:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            yield f'<path d="M{path}" fill="none" stroke="{colours[name]}" stroke-width="1.5"/>'


class _Axis:
    """Maps values to pixels. On a logarithmic one, what is not positive lies at its lower end."""

    def __init__(
        self, values: Sequence[float], pixels: int, *, log: bool, names: Sequence[str] = ()
    ) -> None:
        self._pixels = pixels
        self._log = log
        self._names = names
        positive = [value for value in values if value > 0] or [1.0]
        if names:
            self._low, self._high = -0.5, len(names) - 0.5
        elif log:
            self._low = math.floor(math.log10(min(positive)) + 1e-9)
            self._high = max(self._low + 1, math.ceil(math.log10(max(positive)) - 1e-9))
        else:
            self._low, self._high = min(values), max(values)
            if self._high <= self._low:
                self._high = self._low + 1.0

    def at(self, value: float) -> float:
        if self._log:
            value = math.log10(value) if value > 0 else self._low
        share = (value - self._low) / (self._high - self._low)
        return min(1.0, max(0.0, share)) * self._pixels

    def ticks(self) -> list[tuple[float, str]]:
        if self._names:
            return [(float(place), name) for place, name in enumerate(self._names)]
        if self._log:
            exponents = range(int(self._low), int(self._high) + 1)
            return [(10.0**each, f"{10.0**each:g}") for each in exponents]
        step = (self._high - self._low) / 4
        return [(self._low + k * step, f"{self._low + k * step:.3g}") for k in range(5)]


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )
