"""The board that the questions are about: objects, their motion, and pictures of them.

A scene is a 3 x 3 board with up to six objects on it. Every object has a size, a colour, a shape
and a cell. Colours lie close together and every object's paint is a little off, so that some
answers are uncertain even for a perfect reader.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float32]
Cell = tuple[int, int]

CELL_PIXELS = 16
"""Height and width of one board cell, in pixels."""
BOARD_CELLS = 3
"""Number of cells along each side of the board."""
FRAME_PIXELS = CELL_PIXELS * BOARD_CELLS
"""Height and width of every picture and frame, in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (200, 50, 48),
    "orange": (226, 122, 44),
    "yellow": (222, 194, 60),
    "olive": (142, 140, 52),
    "green": (62, 150, 74),
    "teal": (48, 146, 146),
    "blue": (56, 98, 192),
    "purple": (122, 68, 164),
    "pink": (222, 118, 164),
    "brown": (136, 84, 52),
}
"""Name of each colour and its paint as 8-bit red, green and blue."""
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES: tuple[str, ...] = ("small", "large")
PLACES: dict[Cell, str] = {
    (0, 0): "top left",
    (0, 1): "top",
    (0, 2): "top right",
    (1, 0): "left",
    (1, 1): "center",
    (1, 2): "right",
    (2, 0): "bottom left",
    (2, 1): "bottom",
    (2, 2): "bottom right",
}
"""Name of each (row, column)."""
DIRECTIONS: dict[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
"""Name of each direction of motion and its (row, column) step."""
_RADII: dict[str, tuple[float, float]] = {"small": (4.0, 4.8), "large": (6.1, 7.2)}
_PAINT_SIGMA = 17.0
_PIXEL_SIGMA = 7.0
_AXIS: Field = np.arange(FRAME_PIXELS, dtype=np.float32) + np.float32(0.5)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object on the board; ``cell`` is its (row, column)."""

    size: str
    colour: str
    shape: str
    cell: Cell

    @property
    def name(self) -> str:
        """Size, colour and shape, as answers write them."""
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """The name of the object's cell."""
        return PLACES[self.cell]


@dataclass(frozen=True, slots=True)
class Motion:
    """The move of one object: its index in the scene, a direction and the cell where it ends."""

    index: int
    direction: str
    end: Cell


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in reading order and, for a clip, the motion of one of them."""

    things: tuple[Thing, ...]
    motion: Motion | None = None


def draw_thing(rng: random.Random, cell: Cell) -> Thing:
    return Thing(rng.choice(SIZES), rng.choice(tuple(COLOURS)), rng.choice(SHAPES), cell)


def draw_things(rng: random.Random, cells: Sequence[Cell]) -> list[Thing]:
    """Put an object on each cell; a later one often repeats a colour or shape of an earlier one."""
    things: list[Thing] = []
    for cell in cells:
        thing = draw_thing(rng, cell)
        if things and rng.random() < 0.5:
            other = rng.choice(things)
            if rng.random() < 0.5:
                thing = Thing(thing.size, other.colour, thing.shape, cell)
            else:
                thing = Thing(thing.size, thing.colour, other.shape, cell)
        things.append(thing)
    return things


def draw_scene(rng: random.Random, hardness: float) -> Scene:
    count = rng.randint(1, 2 + round(4 * hardness))
    cells = sorted(rng.sample(tuple(PLACES), count))
    return Scene(tuple(draw_things(rng, cells)))


def draw_clip(rng: random.Random, hardness: float) -> Scene:
    """Draw a clip's first frame and the motion of one object, whose way is free."""
    direction, (down, across) = rng.choice(tuple(DIRECTIONS.items()))
    length = rng.choice((1, 2))
    starts = [
        cell for cell in PLACES if (cell[0] + down * length, cell[1] + across * length) in PLACES
    ]
    start = rng.choice(starts)
    way = [(start[0] + down * step, start[1] + across * step) for step in range(length + 1)]
    free = [cell for cell in PLACES if cell not in way]
    others = rng.sample(free, rng.randint(0, 1 + round(2 * hardness)))
    cells = sorted([start, *others])
    things = draw_things(rng, cells)
    return Scene(tuple(things), Motion(cells.index(start), direction, way[-1]))


# Rendering


def _distance(shape: str, radius: float, across: Field, down: Field) -> Field:
    """Return the signed distance to the outline, negative inside; all lengths in pixels.

    ``across`` and ``down`` are offsets from the centre and broadcast to (rows, columns).
    """
    x, y = np.abs(across), np.abs(down)
    away = np.sqrt(x * x + y * y)
    outline: npt.NDArray[np.floating[Any]]
    if shape == "circle":
        outline = away - radius
    elif shape == "square":
        outline = np.maximum(x, y) - 0.86 * radius
    elif shape == "diamond":
        outline = (x + y) * 0.7071 - 0.78 * radius
    elif shape == "triangle":
        outline = np.maximum(down - 0.62 * radius, 0.866 * x - 0.5 * down - 0.56 * radius)
    elif shape == "cross":
        arm = 0.36 * radius
        outline = np.minimum(np.maximum(x - radius, y - arm), np.maximum(x - arm, y - radius))
    elif shape == "ring":
        outline = np.abs(away - 0.74 * radius) - 0.27 * radius
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return outline.astype(np.float32, copy=False)


def render(
    scene: Scene, rng: random.Random, hardness: float, times: Sequence[float]
) -> tuple[Frame, ...]:
    """Paint the scene at the given times (0 is the start of the motion, 1 its end)."""
    noise = np.random.default_rng(rng.getrandbits(64))
    sigma = _PAINT_SIGMA * (0.3 + 0.7 * hardness)
    light = rng.uniform(0.92, 1.04)
    paints = []
    for thing in scene.things:
        paint = [rng.gauss(channel, sigma) for channel in COLOURS[thing.colour]]
        low, high = _RADII[thing.size]
        radius = rng.uniform(low, high)
        room = max(0.0, CELL_PIXELS / 2 - radius - 0.5) * 0.9
        shift = (rng.uniform(-room, room), rng.uniform(-room, room))
        paints.append((np.array(paint, dtype=np.float32), radius, shift))
    slope = (_AXIS / FRAME_PIXELS - 0.5) * 24.0
    paper = np.empty((FRAME_PIXELS, FRAME_PIXELS, 3), dtype=np.float32)
    paper[:, :, 0] = 226.0 + slope[None, :]
    paper[:, :, 1] = 226.0
    paper[:, :, 2] = 226.0 + slope[:, None]
    frames = []
    for time in times:
        canvas = paper.copy()
        for index, (thing, (paint_rgb, radius, shift)) in enumerate(
            zip(scene.things, paints, strict=True)
        ):
            row, column = float(thing.cell[0]), float(thing.cell[1])
            if scene.motion is not None and scene.motion.index == index:
                row += time * (scene.motion.end[0] - row)
                column += time * (scene.motion.end[1] - column)
            down = _AXIS - np.float32((row + 0.5) * CELL_PIXELS + shift[0])
            across = _AXIS - np.float32((column + 0.5) * CELL_PIXELS + shift[1])
            outline = _distance(thing.shape, radius, across[None, :], down[:, None])
            cover = np.clip(0.5 - outline, 0.0, 1.0)[:, :, None]
            canvas += cover * (paint_rgb - canvas)
        canvas *= light
        canvas += noise.standard_normal(canvas.shape, dtype=np.float32) * np.float32(_PIXEL_SIGMA)
        frames.append(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    return tuple(frames)
