"""Sensitivities of models that do not exist, for tests of the search."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prismquant.formats.spec import spec
from prismquant.search.choices import make_choices
from prismquant.search.format_grammar import formats_on_offer
from prismquant.search.sensitivity import (
    FLOAT,
    SENSITIVITY_VERSION,
    Choice,
    ChoiceUnit,
    FormatOption,
    LayerShape,
    Score,
    Sensitivity,
)

if TYPE_CHECKING:
    from prismquant.models.bound import BoundModel

FORMATS = ("int2-g64", "int3-g128", "int4-g128", "int8-channel", "fp8-channel")
ROLES = {
    "vision": (("attn.qkv", "row", 3), ("attn.out", "column", 1), ("mlp.up", None, 4)),
    "llm": (("attn.qkv", "column", 1), ("attn.out", "row", 1), ("mlp.up", "column", 2)),
}
BITS = {FLOAT: 16.0, "int2-g64": 2.25, "int3-g128": 3.125, "int4-g128": 4.125}


def choice(name: str) -> Choice:
    """A format of weights, and of inputs behind a plus."""
    weights, _, inputs = name.partition("+")
    activations = spec(inputs).to_dict() if inputs else None
    return Choice(spec(weights).to_dict(), activations, weight_range={"kind": "mse"})


def made(
    seed: int = 0,
    *,
    blocks: int = 3,
    formats: tuple[str, ...] = FORMATS,
    noise: float = 0.0,
    **fields: Any,
) -> Sensitivity:
    """A model of two towers; losses fall by a factor of four a bit, with noise they may be below 0.

    Args:
        seed: Of sizes and losses.
        blocks: Blocks of each tower.
        formats: Names of formats of weights.
        noise: Its standard deviation.
        fields: Others of the sensitivity than are made up.
    """
    dice = random.Random(seed)
    units = [
        _unit(f"{modality}.{block}.{role}", modality, role, parallel, wide, formats, dice, noise)
        for modality, roles in ROLES.items()
        for block in range(blocks)
        for role, parallel, wide in roles
    ]
    known: dict[str, Any] = {
        "version": SENSITIVITY_VERSION,
        "written_by": "test",
        "model": "a-model",
        "architecture": "qwen3_vl",
        "identity": {"model": "0"},
        "method": "fisher",
        "options": {},
        "solver": "gptq",
        "solver_options": {},
        "calibration": {"samples": {"image": 4}},
        "weights": {"answer": 1.0, "text": 0.2},
        "formats": {name: choice(name) for name in formats},
        "units": tuple(units),
        "fixed_bytes": 100_000,
        "fixed_weights": 50_000,
    }
    return Sensitivity(**known | fields)


def of_model(bound: BoundModel, seed: int, formats: str, **more: Any) -> Sensitivity:
    """A real model's units and bytes, with losses that a die has thrown.

    Args:
        bound: The model.
        seed: Of the losses.
        formats: Formats on offer.
        more: Arguments of :func:`make_choices`.
    """
    choices = make_choices(bound, formats_on_offer(formats), **more)
    dice = random.Random(seed)
    return replace(
        made(0),
        model=str(bound.folder),
        formats=choices.formats,
        units=tuple(_thrown(one.unit, dice) for one in choices.units),
        weights={"answer": 1.0},
        fixed_bytes=choices.fixed_bytes,
        fixed_weights=choices.fixed_weights,
    )


def _thrown(unit: ChoiceUnit, dice: random.Random) -> ChoiceUnit:
    options = [
        replace(option, scores={"answer": Score(dice.random())}) for option in unit.options[1:]
    ]
    return replace(unit, options=(unit.options[0], *options))


def _unit(
    name: str,
    modality: str,
    role: str,
    parallel: Any,
    wide: int,
    formats: tuple[str, ...],
    dice: random.Random,
    noise: float,
) -> ChoiceUnit:
    inside = 128 * dice.randint(1, 8)
    layer = LayerShape(name, role, 128 * wide, inside, parallel, fused=False)
    depth = dice.uniform(0.01, 1.0)
    options = [FormatOption(FLOAT, 2 * layer.weights)]
    for each in formats:
        bits = BITS.get(each, 8.0 + 16 / inside)
        losses = {
            kind: depth * share * 4.0**-bits * layer.weights + dice.gauss(0, noise)
            for kind, share in (("answer", dice.uniform(0.5, 1)), ("text", dice.uniform(0.1, 2)))
        }
        scores = {kind: Score(loss) for kind, loss in losses.items()}
        options.append(FormatOption(each, int(layer.weights * bits / 8), scores=scores))  # type: ignore[arg-type]
    return ChoiceUnit(name, modality, name.rpartition(".")[0], "layers", (layer,), tuple(options))
