"""A front of sizes and losses as a picture: one SVG text that needs nothing beside it."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

_WIDTH, _HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 92, 24, 56, 64
# Characters of a name that fit beside the rest of the title.
_LONGEST = 50
_STYLE = """
  svg { --paper: #ffffff; --ink: #1f2328; --faint: #d0d7de; --line: #0969da; --knee: #bc4c00;
        background: var(--paper); font: 13px system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --ink: #e6edf3; --faint: #30363d; --line: #4493f8; --knee: #f0883e; }
  }
  text { fill: var(--ink); }
  .grid { stroke: var(--faint); }
  .front { stroke: var(--line); stroke-width: 2; fill: none; }
  .point { fill: var(--line); }
  .knee { fill: var(--knee); }
""".strip("\n")
# What XML cannot hold, in any spelling.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def front_svg(front: Mapping[str, Any]) -> str:
    """Draw a front: the loss over the mean bits per weight, the knee marked.

    Losses have a logarithmic axis; those of zero and below, which it cannot show, lie on its lower
    edge. Where no loss is positive the axis is linear. Colours follow the reader's light or dark
    scheme; a point tells its figures where a pointer rests on it.

    Args:
        front: The content of ``front.json``.
    """
    points = front["points"]
    across = _Axis([point["bits"] for point in points], _LEFT, _WIDTH - _RIGHT, log=False)
    losses = [point["loss"] for point in points]
    positive = [loss for loss in losses if loss > 0]
    up = _Axis(positive or losses, _HEIGHT - _BOTTOM, _TOP, log=bool(positive))
    title = f"{front['model']}: predicted loss by size"
    # A whole path would run out of the picture; hovering tells it.
    name = PurePath(front["model"]).name or str(front["model"])
    shown = f"{name[:_LONGEST]}: predicted loss by size"
    by = f"method {front['method']}, solver {front['solver']}"
    places = [(across.place(p["bits"]), up.place(p["loss"])) for p in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{_escaped(title)}</title>",
        f"<style>\n{_STYLE}\n</style>",
        _text(_LEFT, 24, shown, size=15),
        _text(_LEFT, 42, by),
        *_ticks(across, up),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 16, "bits per weight", anchor="middle"),
        _text(16, _TOP - 10, "loss"),
        f'<polyline class="front" points="{path}"/>',
        *_points(points, places, front["knee"]),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


class _Axis:
    """A scale from numbers to places."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool) -> None:
        self.log, self.start, self.end = log, start, end
        found = [math.log10(value) if log else value for value in values]
        low, high = min(found), max(found)
        margin = 0.05 * (high - low) or max(abs(low) * 0.05, 0.05)
        self.low, self.high = low - margin, high + margin

    def place(self, value: float) -> float:
        """Place of a number; one that a logarithm has not is at the start."""
        if self.log and value <= 0:
            return self.start
        found = math.log10(value) if self.log else value
        share = (found - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        """Round numbers within the scale."""
        if self.log:
            low, high = math.ceil(self.low), math.floor(self.high)
            marks = [
                10.0**power * factor for power in range(low - 1, high + 1) for factor in (1, 2, 5)
            ]
            inside = [mark for mark in marks if self.low <= math.log10(mark) <= self.high]
            yield from inside if len(inside) < 10 else (m for m in inside if _is_power(m))
            return
        step = _round_step((self.high - self.low) / 7)
        for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            yield number * step


def _is_power(value: float) -> bool:
    return math.isclose(math.log10(value), round(math.log10(value)), abs_tol=1e-9)


def _round_step(least: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _ticks(across: _Axis, up: _Axis) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for value in across.ticks():
        x = across.place(value)
        yield _grid(x, _TOP, x, bottom)
        yield _text(x, bottom + 20, f"{value:g}", anchor="middle")
    for value in up.ticks():
        y = up.place(value)
        yield _grid(_LEFT, y, right, y)
        yield _text(_LEFT - 8, y + 4, f"{value:.3g}", anchor="end")


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _points(
    points: Sequence[Mapping[str, Any]], places: Sequence[tuple[float, float]], knee: int
) -> Iterator[str]:
    for number, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        kind, radius = ("knee", 6) if number == knee else ("point", 3.5)
        told = (
            f"{point['bits']:.3f} bits, {point['stored_bytes']:,} bytes, loss {point['loss']:.4g}"
        )
        circle = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
        yield f"{circle}<title>{_escaped(told)}</title></circle>"
        if number == knee:
            left = x > 0.7 * _WIDTH
            place, anchor = (x - 10, "end") if left else (x + 10, "start")
            yield _text(place, y - 10, f"knee: {point['bits']:.2f} bits", anchor=anchor)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{_escaped(text)}</text>"


def _escaped(text: str) -> str:
    return html.escape(_UNWRITABLE.sub("\ufffd", text))
