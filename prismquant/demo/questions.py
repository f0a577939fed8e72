"""Questions about scenes, and questions that need no picture, each with its only right answer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prismquant.demo.board import (
    BOARD_CELLS,
    COLOURS,
    DIRECTIONS,
    PLACES,
    SHAPES,
    Cell,
    Scene,
    Thing,
    draw_thing,
    draw_things,
)

_PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
ROWS: tuple[str, ...] = ("top", "middle", "bottom")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
WORDS: tuple[str, ...] = (
    *("apple", "bread", "chair", "drum", "eagle", "fork", "goat", "house", "iron", "jar"),
    *("kite", "lemon", "moon", "nest", "oven", "pear", "queen", "road", "sun", "tree"),
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its only right answer; ``topic`` names the type of question."""

    topic: str
    question: str
    answer: str


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
    thing = rng.choice(scene.things) if rng.random() < 0.8 else draw_thing(rng, (0, 0))
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
    scene = Scene(tuple(draw_things(rng, cells)))
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

IMAGE_TOPICS: tuple[SceneTopic, ...] = (
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
VIDEO_TOPICS: tuple[SceneTopic, ...] = (
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
TEXT_TOPICS: tuple[Callable[[float, random.Random], Turn | None], ...] = (
    _ask_text_lookup,
    _ask_text_lookup,
    _ask_text_count,
    _ask_text_relation,
    _ask_order,
    _ask_sum,
    _ask_sort,
    _ask_walk,
)


def ask(
    topics: Sequence[Callable[[Subject, random.Random], Turn | None]],
    subject: Subject,
    rng: random.Random,
) -> Turn:
    """Draw topics until one of them has a question."""
    while True:
        turn = rng.choice(topics)(subject, rng)
        if turn is not None:
            return turn
