"""Codes of recipes as we import them, beside those of the tools whose recipes they are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prismquant as pq
from bench.dialects import mi_optimize_definition, tiny_llama
from bench.dialects.told_codes import checksum, differing_rows, told
from prismquant.export.compressed_tensors.stored import StoredCheckpoint, open_checkpoint
from prismquant.models.config import import_transformers
from prismquant.runtime.linear import ActivationQuantizer

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
FILES = {
    "llm-compressor": GOLDEN / "llm-compressor-codes.json",
    "modelopt": GOLDEN / "modelopt-codes.json",
}


@dataclass(frozen=True)
class Comparison:
    """One recipe, carried out here and there.

    Attributes:
        dialect: Of the recipe.
        name: Of the recipe in its file.
        rows: Rows of all layers.
        differing: Rows by layer in which codes differ; all of a layer that was kept as a whole.
        scales: Layers whose scales differ.
        inputs: Layers that round inputs differently.
        loss: Error of the first layer's output here, relative to it; None where nothing is solved.
        their_loss: The same there.
        first: The first layer's codes here, ``[rows, columns]``.
    """

    dialect: str
    name: str
    rows: int
    differing: dict[str, int]
    scales: tuple[str, ...]
    inputs: tuple[str, ...]
    loss: float | None
    their_loss: float | None
    first: Tensor

    @property
    def equal(self) -> bool:
        """Whether nothing differs at all."""
        return not (any(self.differing.values()) or self.scales or self.inputs)


def prepare(folder: Path) -> None:
    """Write the model and its calibration text."""
    import_transformers()
    for dtype in (torch.float32, torch.bfloat16):
        tiny_llama.write(_model(folder, dtype), dtype)
    (folder / "calibration.txt").write_text(tiny_llama.text())


def _model(folder: Path, dtype: torch.dtype) -> Path:
    return folder / f"model-{str(dtype).removeprefix('torch.')}"


def recipes() -> Iterator[tuple[str, str]]:
    """Dialect and name of every recipe there is a golden result of."""
    for dialect, path in FILES.items():
        for name in json.loads(path.read_text())["recipes"]:
            yield dialect, name
    for name in mi_optimize_definition.RECIPES:
        yield "mi-optimize", name


def compare(folder: Path, dialect: str, name: str) -> Comparison:
    """Carry a recipe out, and compare it with what its tool made of it.

    Args:
        folder: As :func:`prepare` left it.
        dialect: One of :func:`recipes`, as is ``name``.
    """
    if dialect == "mi-optimize":
        arguments = mi_optimize_definition.RECIPES[name]
        recipe, theirs = mi_optimize_definition.recipe(arguments), _defined(arguments)
    else:
        golden = json.loads(FILES[dialect].read_text())["recipes"][name]
        recipe, theirs = golden["recipe"], golden["layers"]
    dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    out = folder / f"{dialect} {name}".replace(" ", "-")
    pq.quantize(
        _model(folder, dtype),
        recipe,
        out,
        folder / "calibration.txt",
        seq_length=tiny_llama.LENGTH,
    )
    ours = dict(_layers(open_checkpoint(out), theirs, dtype))
    first = tiny_llama.LAYERS[0]
    if ours.keys() != theirs.keys():
        raise ValueError(f"layers here and not there: {sorted(ours.keys() ^ theirs.keys())}")
    return Comparison(
        dialect,
        name,
        sum(len(tiny_llama.tensors()[f"{layer}.weight"]) for layer in theirs),
        {
            one: differing_rows(ours[one]["codes"], theirs[one]["codes"], len(ours[one]["points"]))
            for one in theirs
        },
        tuple(one for one in theirs if ours[one]["scales"] != theirs[one]["scales"]),
        tuple(one for one in theirs if not _same_inputs(ours[one], theirs[one])),
        ours[first].get("loss"),
        theirs[first].get("loss"),
        ours[first]["points"],
    )


def _same_inputs(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether inputs are rounded alike."""
    found, wanted = (layer.get("input scale") for layer in (ours, theirs))
    if found != wanted and found is not None and wanted is not None:
        # Calibrated on another processor, whose sums are in another order.
        return math.isclose(found, wanted, rel_tol=1e-6)
    return found == wanted and ours.get("inputs") == theirs.get("inputs")


def _layers(
    checkpoint: StoredCheckpoint, theirs: dict[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What we made of each layer, as the golden files tell of it."""
    for layer in checkpoint.quantized:
        stored, wanted = checkpoint.codes(layer), theirs[layer.name]
        if layer.scheme is None:
            raise ValueError(f"{layer.name} has no format")
        points = layer.scheme.weights.grid.read(stored.codes).to(torch.float32)
        found = told(points, stored.scale, stored.zero_point, by_row=len(wanted["codes"]) > 8)
        if "loss" in wanted:
            found["loss"] = tiny_llama.first_loss(stored.dequantize(torch.float32), dtype)
        if "inputs" in wanted and layer.inputs is not None:
            rounded = ActivationQuantizer(layer.inputs)(tiny_llama.inputs())
            found["inputs"] = checksum(rounded + 0.0)
        static = checkpoint.static_scale(layer, "input")
        if static is not None:
            found["input scale"] = float(static.scale)
        yield layer.name, found | {"points": points}


def _defined(arguments: dict[str, Any]) -> dict[str, Any]:
    """Layers by the definition of MI-optimize's quantizers."""
    tensors, found = tiny_llama.tensors(), {}
    bits, zero = int(arguments["w_dtype"].removeprefix("int")), bool(arguments.get("w_has_zero"))
    for name in tiny_llama.LAYERS:
        weight = tensors[f"{name}.weight"]
        group = arguments.get("w_groupsize", weight.shape[1])
        codes, scale, point = mi_optimize_definition.rounded(weight, bits, group, zero=zero)
        found[name] = told(codes, scale, point, by_row=True)
        if "a_dtype" in arguments and weight.shape[1] == tiny_llama.HIDDEN:
            given = tiny_llama.inputs()
            codes, scale, point = mi_optimize_definition.rounded(
                given, 8, len(given[0]), zero=False
            )
            found[name]["inputs"] = checksum((codes - point) * scale + 0.0)
    return found
