"""The front against brute force, its knee, and its picture."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from sensitivities import made

from prismquant.errors import PlanError
from prismquant.report.fronts import front_table
from prismquant.search.allocate import allocate
from prismquant.search.constraints import parse_constraints
from prismquant.search.front_picture import front_svg
from prismquant.search.pareto import knee_of, pareto_front

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("seed", range(6))
def test_every_point_is_on_the_true_front(seed: int) -> None:
    found = made(seed, blocks=1, formats=("int3-g128", "int8-channel"))
    front = pareto_front(found, parse_constraints({}), points=40)
    every = [
        (
            found.fixed_bytes + sum(option.stored_bytes for option in mix),
            sum(found.weights[k] * s.loss for option in mix for k, s in option.scores.items()),
        )
        for mix in itertools.product(*(unit.options for unit in found.units))
    ]
    for mix in front.mixes:
        best = min(loss for size, loss in every if size <= mix.stored_bytes)
        assert mix.loss == pytest.approx(best, rel=1e-9)
    sizes = [mix.stored_bytes for mix in front.mixes]
    losses = [mix.loss for mix in front.mixes]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    assert (sizes[0], losses[-1]) == (min(size for size, _ in every), 0.0)


def test_constraints_hold_at_every_point_and_the_total_is_one() -> None:
    found = made(1)
    asked = parse_constraints({"bits": 5.03, "cap": "vision=4.2"})
    front = pareto_front(found, asked, points=7)
    vision = [unit for unit in found.units if unit.modality == "vision"]
    weights = sum(layer.weights for unit in vision for layer in unit.layers)
    for mix in front.mixes:
        options = [next(o for o in u.options if o.format == mix.formats[u.name]) for u in vision]
        assert 8 * sum(option.stored_bytes for option in options) <= 4.2 * weights
    best = allocate(found, asked)
    assert best.formats in [mix.formats for mix in front.mixes]
    assert front.mixes[-1].bits > 8


def test_a_front_that_cannot_be_says_why() -> None:
    with pytest.raises(PlanError, match="the least size of llm"):
        pareto_front(made(0), parse_constraints({"cap": "llm=1"}))


@pytest.mark.parametrize(
    ("points", "knee"),
    [
        ([(0, 100), (1, 10), (2, 5), (10, 0)], 1),
        ([(0, 100), (5, 10), (10, 0)], 1),
        ([(0, 4), (1, 3), (2, 2), (4, 0)], 0),
        ([(0, 1), (5, 0)], 0),
        ([(0, 1)], 0),
        ([(0, 5), (1, -4), (10, -5)], 1),
    ],
)
def test_the_knee_is_farthest_below_the_line_between_the_ends(
    points: list[tuple[float, float]], knee: int
) -> None:
    assert knee_of(points) == knee


def content(losses: list[float], **more: Any) -> dict[str, Any]:
    points = [
        {
            "bits": 3.0 + number,
            "stored_bytes": 1000 * (number + 1),
            "loss": loss,
            "losses": {"answer": loss},
            "latency_ms": None,
            "units": {"int4-g128": 3, "float": number},
        }
        for number, loss in enumerate(losses)
    ]
    body = {"model": "m", "method": "fisher", "solver": "gptq", "knee": 0, "points": points}
    return body | more


@pytest.mark.parametrize(
    "losses",
    [[100.0, 1.0, 0.01], [1.0, 0.0], [0.0], [-1.0, -2.0], [5.0], [3.0, -0.1], [1e-9, 1e-12]],
)
def test_the_picture_is_whole_and_shows_every_point_within_its_frame(losses: list[float]) -> None:
    root = ET.fromstring(front_svg(content(losses)))
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == len(losses)
    assert [circle.get("class") for circle in circles].count("knee") == 1
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for circle in circles:
        assert 0 < float(circle.get("cx", "0")) < width
        assert 0 < float(circle.get("cy", "0")) < height
    heights = [float(circle.get("cy", "0")) for circle in circles]
    assert heights == sorted(heights)
    assert len(list(root.iter(f"{SVG}line"))) >= 4


def test_names_are_text_and_nothing_is_fetched() -> None:
    nasty = '</text><script>alert(1)</script>&"\x1b[2J\x00\ud800'
    text = front_svg(content([2.0, 1.0], model=nasty, method=nasty))
    root = ET.fromstring(text)
    assert "<script" not in text
    assert not list(root.iter(f"{SVG}script"))
    assert "\x1b" not in text
    text.encode()
    assert text.count("http") == 1  # the name of SVG itself
    assert "prefers-color-scheme: dark" in text


def test_a_long_path_stays_within_the_picture_and_is_told_whole() -> None:
    model = f"/data/{'deep/' * 40}{'a-model-' * 10}8B"
    root = ET.fromstring(front_svg(content([2.0, 1.0], model=model)))
    whole, *_ = root.iter(f"{SVG}title")
    assert whole.text == f"{model}: predicted loss by size"
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert max(map(len, texts)) <= 75
    assert any(text.startswith("a-model-") for text in texts)


def test_the_table_marks_the_knee() -> None:
    table = front_table(content([2.0, 1.0, 0.5], knee=1))
    (marks,) = [list(column.cells) for column in table.columns[-1:]]
    assert [str(mark) for mark in marks] == ["", "knee", ""]
