"""Mixes that are rounded to nearest, put together from uniform checkpoints.

Rounding to nearest treats each layer alone, so the layers of a mix are those of the checkpoints of
which all layers have one format: they are written and loaded once, and a mix takes its layers from
them. With a solver that sees what was quantized before, that would be wrong.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from prismquant.api import quantize
from prismquant.export.load_quantized import load_model
from prismquant.search.allocate import Allocation
from prismquant.search.found_recipe import recipe_of
from prismquant.search.knapsack import Solved
from prismquant.search.sensitivity import FLOAT


def uniform_choice(allocation: Allocation, name: str) -> tuple[int, ...]:
    """Place of a format among the options of each unit; a unit without it is left alone.

    Args:
        allocation: Units with the options on offer.
        name: Of the format.
    """
    names = [[option.format for option in unit.options] for unit in allocation.units]
    return tuple(own.index(name if name in own else FLOAT) for own in names)


class RoundedLayers:
    """A model whose layers can be set to any mix of formats that were rounded to nearest.

    Args:
        folder: The float checkpoint.
        allocation: Units with the options on offer.
        formats: Names of the options, but for that to leave a unit alone.
        work: Where checkpoints may lie for a moment.
    """

    def __init__(
        self, folder: Path, allocation: Allocation, formats: Sequence[str], work: Path
    ) -> None:
        self.model = load_model(folder, dtype=torch.float32)
        self.layers = {
            unit.name: tuple(layer.name for layer in unit.layers) for unit in allocation.units
        }
        self.weights = {FLOAT: self._weights(self.model)}
        for name in formats:
            mix = allocation.mix(Solved(uniform_choice(allocation, name), 0.0, 0.0))
            recipe = recipe_of(allocation.found, mix, allocation.constraints, name).recipe
            with tempfile.TemporaryDirectory(dir=work) as place:
                out = Path(place) / "out"
                quantize(folder, recipe, out, dtype=torch.float32)
                self.weights[name] = self._weights(load_model(out, dtype=torch.float32))

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        names = [name for layers in self.layers.values() for name in layers]
        return {name: model.get_parameter(f"{name}.weight").detach().clone() for name in names}

    def mixed(self, formats: Mapping[str, str]) -> nn.Module:
        """The model in a mix; the next call changes it.

        Args:
            formats: Name of the format of each unit.
        """
        with torch.no_grad():
            for unit, layers in self.layers.items():
                for name in layers:
                    value = self.weights[formats[unit]][name]
                    self.model.get_parameter(f"{name}.weight").copy_(value)
        return self.model
