"""A question set about small pictures and clips, drawn from a seed.

A scene is a 3 x 3 board with up to six objects on it. Every object has a size, a colour, a shape
and a cell. Colours lie close together and every object's paint is a little off, so that some
answers are uncertain even for a perfect reader. There are three kinds of sample:

- ``image``: one picture and questions about it;
- ``video``: a clip of four or six frames in which one object moves from cell to cell;
- ``text``: questions that need no picture (facts to be read from a description, orders, sums,
  sorting).

All samples come from a ``random.Random`` that :func:`sample_rng` derives from the name of a split,
a seed and an index, so that training, calibration and evaluation data cannot coincide.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["text", "image", "video"]
Split = Literal["train", "calibration", "evaluation"]
Frame = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float32]
Cell = tuple[int, int]

KINDS: tuple[Kind, ...] = ("text", "image", "video")
SPLITS: tuple[Split, ...] = ("train", "calibration", "evaluation")

DEFAULT_HARDNESS = 1.0
"""The hardness at which the shipped model is measured, calibrated and evaluated."""
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
_PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
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
ROWS: tuple[str, ...] = ("top", "middle", "bottom")
DIRECTIONS: dict[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
"""Name of each direction of motion and its (row, column) step."""
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
WORDS: tuple[str, ...] = (
    *("apple", "bread", "chair", "drum", "eagle", "fork", "goat", "house", "iron", "jar"),
    *("kite", "lemon", "moon", "nest", "oven", "pear", "queen", "road", "sun", "tree"),
)

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


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its only right answer; ``topic`` names the type of question."""

    topic: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: no frame for text, one for an image, four or six for a clip.

    Each frame is a ``uint8`` array of shape (FRAME_PIXELS, FRAME_PIXELS, 3). The turns are
    independent questions about the same frames, and ``scene`` is what they show.
    """

    kind: Kind
    frames: tuple[Frame, ...]
    turns: tuple[Turn, ...]
    scene: Scene | None = None


def sample_rng(split: Split, seed: int, index: int) -> random.Random:
    """Return the random source of one sample; two splits never share one, whatever their seeds."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    digest = hashlib.sha256(f"{split}/{seed}/{index}".encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def make_sample(
    kind: Kind, rng: random.Random, hardness: float = DEFAULT_HARDNESS, turns: int = 1
) -> Sample:
    """Draw one sample.

    Args:
        kind: what the sample shows.
        rng: the only source of chance.
        hardness: from 0 (one or two objects, clean paint) to 1 (up to six objects, uncertain
            paint).
        turns: number of questions.
    """
    if not 0.0 <= hardness <= 1.0:
        raise ValueError(f"hardness {hardness} lies outside 0 .. 1")
    if kind == "text":
        return Sample(kind, (), tuple(_ask(_TEXT_TOPICS, hardness, rng) for _ in range(turns)))
    if kind == "image":
        scene = _draw_scene(rng, hardness)
        frames = _render(scene, rng, hardness, (0.0,))
        return Sample(
            kind, frames, tuple(_ask(_IMAGE_TOPICS, scene, rng) for _ in range(turns)), scene
        )
    if kind == "video":
        scene = _draw_clip(rng, hardness)
        count = rng.choice((4, 6))
        frames = _render(scene, rng, hardness, [i / (count - 1) for i in range(count)])
        return Sample(
            kind, frames, tuple(_ask(_VIDEO_TOPICS, scene, rng) for _ in range(turns)), scene
        )
    raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")


def write_dataset(
    folder: Path,
    *,
    split: Split,
    seed: int = 0,
    count: int = 128,
    mix: Mapping[Kind, float] | None = None,
    hardness: float = DEFAULT_HARDNESS,
) -> Path:
    """Write one-question samples as ``{split}.jsonl`` and their frames as PNG; return the JSONL.

    Each line holds ``id``, ``kind``, ``topic`` and ``messages``: a user message whose content lists
    the picture (or the clip as a list of frames) and the question, and an assistant message with
    the answer. Paths are relative to ``folder``.

    Args:
        folder: where the files go; made if missing.
        split: which split the seed belongs to.
        seed: chooses among the possible datasets of the split.
        count: number of samples.
        mix: share of each kind; thirds if not given.
        hardness: as in :func:`make_sample`.
    """
    kinds = _spread(mix or dict.fromkeys(KINDS, 1.0), count)
    sample_rng(split, seed, count).shuffle(kinds)
    frames_folder = folder / "frames"
    frames_folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, kind in enumerate(kinds):
        sample = make_sample(kind, sample_rng(split, seed, index), hardness)
        identity = f"{split}-{seed}-{index:05d}"
        paths = [f"frames/{identity}-{number}.png" for number in range(len(sample.frames))]
        for path, frame in zip(paths, sample.frames, strict=True):
            Image.fromarray(frame).save(folder / path)
        turn = sample.turns[0]
        content: list[dict[str, object]] = [{"type": "text", "text": turn.question}]
        if kind == "image":
            content.insert(0, {"type": "image", "image": paths[0]})
        elif kind == "video":
            content.insert(0, {"type": "video", "video": paths})
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": turn.answer},
        ]
        lines.append(
            json.dumps({"id": identity, "kind": kind, "topic": turn.topic, "messages": messages})
        )
    target = folder / f"{split}.jsonl"
    partial = target.with_suffix(".jsonl.partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    partial.replace(target)
    return target


def _spread(mix: Mapping[Kind, float], count: int) -> list[Kind]:
    """Return ``count`` kinds in the proportions of ``mix``, by largest remainder."""
    total = sum(mix.values())
    if total <= 0 or any(share < 0 for share in mix.values()):
        raise ValueError(f"the shares of a mix must be positive, got {dict(mix)}")
    exact = {kind: count * share / total for kind, share in mix.items()}
    whole = {kind: math.floor(amount) for kind, amount in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: whole[kind] - exact[kind])
    for kind in by_remainder[: count - sum(whole.values())]:
        whole[kind] += 1
    return [kind for kind, amount in whole.items() for _ in range(amount)]


# Scenes


def _draw_thing(rng: random.Random, cell: Cell) -> Thing:
    return Thing(rng.choice(SIZES), rng.choice(tuple(COLOURS)), rng.choice(SHAPES), cell)


def _draw_things(rng: random.Random, cells: Sequence[Cell]) -> list[Thing]:
    """Put an object on each cell; a later one often repeats a colour or shape of an earlier one."""
    things: list[Thing] = []
    for cell in cells:
        thing = _draw_thing(rng, cell)
        if things and rng.random() < 0.5:
            other = rng.choice(things)
            if rng.random() < 0.5:
                thing = Thing(thing.size, other.colour, thing.shape, cell)
            else:
                thing = Thing(thing.size, thing.colour, other.shape, cell)
        things.append(thing)
    return things


def _draw_scene(rng: random.Random, hardness: float) -> Scene:
    count = rng.randint(1, 2 + round(4 * hardness))
    cells = sorted(rng.sample(tuple(PLACES), count))
    return Scene(tuple(_draw_things(rng, cells)))


def _draw_clip(rng: random.Random, hardness: float) -> Scene:
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
    things = _draw_things(rng, cells)
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


def _render(
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


# Questions about scenes


def _matches(
    things: Sequence[Thing], size: str | None, colour: str | None, shape: str | None
) -> list[Thing]:
    return [
        thing
        for thing in things
        if (size is None or thing.size == size)
        and (colour is None or thing.colour == colour)
        and (shape is None or thing.shape == shape)
    ]


def _refer(
    things: Sequence[Thing], thing: Thing, rng: random.Random, without: str = ""
) -> str | None:
    """Return words that fit ``thing`` and no other, or None; they do not tell ``without``."""
    options = []
    for use_size in (False, True):
        for use_colour in (False, True):
            for use_shape in (False, True):
                used = {"size": use_size, "colour": use_colour, "shape": use_shape}
                if used.get(without) or not (use_colour or use_shape):
                    continue
                size = thing.size if use_size else None
                colour = thing.colour if use_colour else None
                shape = thing.shape if use_shape else None
                if len(_matches(things, size, colour, shape)) == 1:
                    options.append(
                        " ".join(word for word in (size, colour, shape or "object") if word)
                    )
    return rng.choice(options) if options else None


def _ask_attribute(scene: Scene, rng: random.Random, attribute: str) -> Turn | None:
    thing = rng.choice(scene.things)
    answer = {"colour": thing.colour, "shape": thing.shape, "size": thing.size}[attribute]
    reference = None if rng.random() < 0.4 else _refer(scene.things, thing, rng, attribute)
    subject = f"object at the {thing.place}" if reference is None else reference
    if attribute == "colour":
        return Turn(attribute, f"What colour is the {subject}?", answer)
    if attribute == "shape":
        return Turn(attribute, f"What shape is the {subject}?", answer)
    return Turn(attribute, f"How big is the {subject}?", answer)


def _ask_colour(scene: Scene, rng: random.Random) -> Turn | None:
    return _ask_attribute(scene, rng, "colour")


def _ask_shape(scene: Scene, rng: random.Random) -> Turn | None:
    return _ask_attribute(scene, rng, "shape")


def _ask_size(scene: Scene, rng: random.Random) -> Turn | None:
    return _ask_attribute(scene, rng, "size")


def _ask_count(scene: Scene, rng: random.Random) -> Turn | None:
    choice = rng.random()
    thing = rng.choice(scene.things) if rng.random() < 0.8 else _draw_thing(rng, (0, 0))
    if choice < 0.2:
        return Turn("count", "How many objects are there?", str(len(scene.things)))
    if choice < 0.6:
        found = _matches(scene.things, None, None, thing.shape)
        return Turn("count", f"How many {_PLURALS[thing.shape]} are there?", str(len(found)))
    if choice < 0.85:
        found = _matches(scene.things, None, thing.colour, None)
        return Turn("count", f"How many of the objects are {thing.colour}?", str(len(found)))
    found = _matches(scene.things, thing.size, None, None)
    return Turn("count", f"How many of the objects are {thing.size}?", str(len(found)))


def _ask_position(scene: Scene, rng: random.Random) -> Turn | None:
    thing = rng.choice(scene.things)
    reference = _refer(scene.things, thing, rng)
    return (
        None if reference is None else Turn("position", f"Where is the {reference}?", thing.place)
    )


def _holds(first: Cell, relation: str, second: Cell) -> bool:
    return {
        "left of": first[1] < second[1],
        "right of": first[1] > second[1],
        "above": first[0] < second[0],
        "below": first[0] > second[0],
    }[relation]


def _ask_relation(scene: Scene, rng: random.Random) -> Turn | None:
    if len(scene.things) < 2:
        return None
    first, second = rng.sample(scene.things, 2)
    names = _refer(scene.things, first, rng), _refer(scene.things, second, rng)
    if None in names:
        return None
    holding = [relation for relation in RELATIONS if _holds(first.cell, relation, second.cell)]
    failing = [relation for relation in RELATIONS if relation not in holding]
    answer = rng.choice(("yes", "no"))
    relation = rng.choice(holding if answer == "yes" else failing)
    return Turn("relation", f"Is the {names[0]} {relation} the {names[1]}?", answer)


def _ask_exists(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask for an object that is there, or for one that differs from it in colour or in shape."""
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        return Turn("exists", f"Is there {_article(thing.colour)} {thing.shape}?", "yes")
    if rng.random() < 0.5:
        colour, shape = rng.choice(tuple(COLOURS)), thing.shape
    else:
        colour, shape = thing.colour, rng.choice(SHAPES)
    answer = "yes" if _matches(scene.things, None, colour, shape) else "no"
    return Turn("exists", f"Is there {_article(colour)} {shape}?", answer)


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _ask_row(scene: Scene, rng: random.Random) -> Turn | None:
    row = rng.randrange(BOARD_CELLS)
    names = [thing.name for thing in scene.things if thing.cell[0] == row]
    return Turn("row", f"What is in the {ROWS[row]} row?", ", ".join(names) or "nothing")


def _ask_description(scene: Scene, rng: random.Random) -> Turn | None:
    return Turn("describe", "Describe the image.", _describe(scene.things))


def _describe(things: Sequence[Thing]) -> str:
    return ", ".join(f"{thing.name} at the {thing.place}" for thing in things)


# Questions about clips


def _ask_direction(scene: Scene, rng: random.Random) -> Turn | None:
    if scene.motion is None:
        return None
    thing = scene.things[scene.motion.index]
    reference = _refer(scene.things, thing, rng)
    if reference is None or rng.random() < 0.3:
        reference = "moving object"
    return Turn("direction", f"Which way does the {reference} move?", scene.motion.direction)


def _ask_mover(scene: Scene, rng: random.Random) -> Turn | None:
    if scene.motion is None:
        return None
    return Turn("mover", "Which object moves?", scene.things[scene.motion.index].name)


def _ask_route(scene: Scene, rng: random.Random) -> Turn | None:
    if scene.motion is None:
        return None
    if rng.random() < 0.5:
        place = scene.things[scene.motion.index].place
        return Turn("route", "Where does the moving object start?", place)
    return Turn("route", "Where does the moving object end?", PLACES[scene.motion.end])


def _ask_moves(scene: Scene, rng: random.Random) -> Turn | None:
    if scene.motion is None:
        return None
    index = scene.motion.index if rng.random() < 0.5 else rng.randrange(len(scene.things))
    reference = _refer(scene.things, scene.things[index], rng)
    if reference is None:
        return None
    return Turn(
        "moves", f"Does the {reference} move?", "yes" if index == scene.motion.index else "no"
    )


def _ask_still(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask where a still object is, or what colour or shape an object of the clip has."""
    if scene.motion is None:
        return None
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    attribute = rng.choice(("colour", "shape", "position"))
    if attribute == "position":
        reference = _refer(scene.things, thing, rng)
        if reference is None or index == scene.motion.index:
            return None
        return Turn("still", f"Where is the {reference}?", thing.place)
    reference = _refer(scene.things, thing, rng, attribute)
    if index == scene.motion.index and rng.random() < 0.5:
        reference = "moving object"
    if reference is None:
        return None
    answer = thing.colour if attribute == "colour" else thing.shape
    return Turn("still", f"What {attribute} is the {reference}?", answer)


def _ask_clip_description(scene: Scene, rng: random.Random) -> Turn | None:
    if scene.motion is None:
        return None
    parts = []
    for index, thing in enumerate(scene.things):
        if index == scene.motion.index:
            parts.append(f"{thing.name} moves {scene.motion.direction} from the {thing.place}")
        else:
            parts.append(f"{thing.name} stays at the {thing.place}")
    return Turn("narrate", "Describe the clip.", ", ".join(parts))


# Questions without pictures


def _from_text(
    hardness: float, rng: random.Random, builders: Sequence[SceneTopic], topic: str
) -> Turn | None:
    """Ask about a scene that is described in words."""
    count = rng.randint(1, 2 + round(2 * hardness))
    cells = sorted(rng.sample(tuple(PLACES), count))
    scene = Scene(tuple(_draw_things(rng, cells)))
    turn = rng.choice(builders)(scene, rng)
    if turn is None:
        return None
    shuffled = rng.sample(scene.things, count)
    return Turn(topic, f"There are: {_describe(shuffled)}. {turn.question}", turn.answer)


def _ask_text_lookup(hardness: float, rng: random.Random) -> Turn | None:
    return _from_text(hardness, rng, (_ask_colour, _ask_shape, _ask_size, _ask_position), "lookup")


def _ask_text_count(hardness: float, rng: random.Random) -> Turn | None:
    return _from_text(hardness, rng, (_ask_count,), "tally")


def _ask_text_relation(hardness: float, rng: random.Random) -> Turn | None:
    return _from_text(hardness, rng, (_ask_relation, _ask_exists), "judge")


def _ask_order(hardness: float, rng: random.Random) -> Turn | None:
    """State the order of two or three objects by neighbours; ask for a neighbour or an end."""
    count = rng.randint(2, 2 + round(hardness))
    before, after, first, last = rng.choice(
        (("left of", "right of", "leftmost", "rightmost"), ("above", "below", "highest", "lowest"))
    )
    names = [f"{colour} {shape}" for colour, shape in _distinct_pairs(rng, count)]
    pairs = list(itertools.pairwise(names))
    rng.shuffle(pairs)
    facts = [
        f"The {left} is {before} the {right}."
        if rng.random() < 0.5
        else f"The {right} is {after} the {left}."
        for left, right in pairs
    ]
    index = rng.randrange(count - 1)
    question, answer = rng.choice(
        (
            (f"What is just {before} the {names[index + 1]}?", names[index]),
            (f"What is just {after} the {names[index]}?", names[index + 1]),
            (f"What is {first}?", names[0]),
            (f"What is {last}?", names[-1]),
        )
    )
    return Turn("order", f"{' '.join(facts)} {question}", answer)


def _distinct_pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Return ``count`` different (colour, shape) pairs."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return rng.sample(pairs, count)


def _ask_sum(hardness: float, rng: random.Random) -> Turn | None:
    first, second = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.5:
        return Turn("sum", f"What is {first} plus {second}?", str(first + second))
    return Turn(
        "sum", f"What is {max(first, second)} minus {min(first, second)}?", str(abs(first - second))
    )


def _ask_sort(hardness: float, rng: random.Random) -> Turn | None:
    words = rng.sample(WORDS, rng.randint(2, 3 + round(2 * hardness)))
    return Turn("sort", f"Sort these words: {', '.join(words)}.", ", ".join(sorted(words)))


def _ask_walk(hardness: float, rng: random.Random) -> Turn | None:
    """Tell a walk over the board, one cell at a time, and ask where it ends."""
    cell = start = rng.choice(tuple(PLACES))
    steps = []
    for _ in range(rng.randint(1, 1 + round(2 * hardness))):
        options = {
            name: (cell[0] + down, cell[1] + across)
            for name, (down, across) in DIRECTIONS.items()
            if (cell[0] + down, cell[1] + across) in PLACES
        }
        step = rng.choice(tuple(options))
        steps.append(step)
        cell = options[step]
    shape = rng.choice(SHAPES)
    story = f"A {shape} starts at the {PLACES[start]} and moves {', '.join(steps)}."
    return Turn("walk", f"{story} Where is the {shape}?", PLACES[cell])


SceneTopic = Callable[[Scene, random.Random], Turn | None]
Subject = TypeVar("Subject")

_IMAGE_TOPICS: tuple[SceneTopic, ...] = (
    _ask_colour,
    _ask_colour,
    _ask_shape,
    _ask_shape,
    _ask_size,
    _ask_count,
    _ask_count,
    _ask_position,
    _ask_position,
    _ask_relation,
    _ask_relation,
    _ask_exists,
    _ask_exists,
    _ask_row,
    _ask_description,
    _ask_description,
)
_VIDEO_TOPICS: tuple[SceneTopic, ...] = (
    _ask_direction,
    _ask_direction,
    _ask_mover,
    _ask_mover,
    _ask_route,
    _ask_route,
    _ask_moves,
    _ask_still,
    _ask_still,
    _ask_count,
    _ask_clip_description,
)
_TEXT_TOPICS: tuple[Callable[[float, random.Random], Turn | None], ...] = (
    _ask_text_lookup,
    _ask_text_lookup,
    _ask_text_count,
    _ask_text_relation,
    _ask_order,
    _ask_sum,
    _ask_sort,
    _ask_walk,
)


def _ask(
    topics: Sequence[Callable[[Subject, random.Random], Turn | None]],
    subject: Subject,
    rng: random.Random,
) -> Turn:
    """Draw topics until one of them has a question."""
    while True:
        turn = rng.choice(topics)(subject, rng)
        if turn is not None:
            return turn
