"""Handing a solved step to a tuner: how to run it with other weights, and what it should give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from prismquant.algorithms.block_problem import BlockLayer, BlockProblem
from prismquant.algorithms.methods import build_tuner
from prismquant.algorithms.protocols import Tuner
from prismquant.diagnostics.tuning_diagnostics import TuningDiagnostics
from prismquant.engine.calls import StepCall
from prismquant.formats.quantized_layer import QuantizedLayer, QuantizedTensor
from prismquant.plan.plan import PlanRow


@dataclass(frozen=True, eq=False)
class TunedBlock:
    """A step to tune.

    Attributes:
        name: Module path of the step.
        module: With quantized weights and inputs.
        teacher: The same step in floating point, or None.
        calls: How the quantized model calls the step.
        wanted: The float model's outputs, call by call.
        rows: Its layers' rows of the plan, by name.
        vision_weight: What an error at a vision token costs, where one at a text token costs 1.
    """

    name: str
    module: nn.Module
    teacher: nn.Module | None
    calls: Sequence[StepCall]
    wanted: Sequence[Any]
    rows: Mapping[str, PlanRow]
    vision_weight: float = 1.0

    def token_weights(self, call: int) -> Tensor | None:
        """Weight of each token of a call."""
        return self.calls[call].token_weights(self.vision_weight)


def tune(
    block: TunedBlock,
    layers: Sequence[QuantizedLayer],
    floats: Mapping[str, Tensor],
) -> Iterator[tuple[list[QuantizedLayer], TuningDiagnostics]]:
    """Tune the layers that ask for it.

    Args:
        block: The step.
        layers: Its solved layers.
        floats: Float weights ``[out, in]`` of those that are to be tuned, by name.

    Yields:
        For each tuner that layers ask for, the layers with their new codes, and its diagnostics.
    """
    groups: dict[object, list[QuantizedLayer]] = {}
    for layer in layers:
        config = block.rows[layer.name].config
        if config.tuner is not None:
            groups.setdefault((config.tuner, config.tuner_options), []).append(layer)
    for members in groups.values():
        row = block.rows[members[0].name]
        tuner = build_tuner(str(row.config.tuner), row.config.tuner_options)
        result = tuner.tune(_problem(block, members, floats, tuner))
        tuned = [
            replace(layer, weight=weight)
            for layer, weight in zip(members, result.weights, strict=True)
        ]
        yield tuned, result.diagnostics


def _problem(
    block: TunedBlock,
    layers: Sequence[QuantizedLayer],
    floats: Mapping[str, Tensor],
    tuner: Tuner,
) -> BlockProblem:
    targets = _targets(block, tuner)

    def output(call: int, weights: Mapping[str, Tensor]) -> Tensor:
        parameters = {
            _inside(block, layer): _overlaid(block, layer, weights[layer.name]) for layer in layers
        }
        args, kwargs = block.calls[call].args, block.calls[call].kwargs
        return _rows(functional_call(block.module, parameters, args, kwargs))

    return BlockProblem(
        name=block.name,
        layers=tuple(_block_layer(block, layer, floats) for layer in layers),
        calls=len(block.calls),
        output=output,
        target=targets.__getitem__,
        token_weights=block.token_weights,
    )


def _targets(block: TunedBlock, tuner: Tuner) -> list[Tensor]:
    """Targets of the unit's output, call by call."""
    if tuner.same_inputs and block.teacher is not None:
        return [_rows(block.teacher(*call.args, **call.kwargs)) for call in block.calls]
    return [_rows(output) for output in block.wanted]


def _block_layer(
    block: TunedBlock, layer: QuantizedLayer, floats: Mapping[str, Tensor]
) -> BlockLayer:
    if not isinstance(layer.weight, QuantizedTensor):  # what a solver returned always is
        raise TypeError(f"{layer.name} has no codes to tune")
    weight = floats[layer.name]
    if layer.outlier_columns is not None:
        weight = layer.outlier_columns.cut_from(weight)
    row = block.rows[layer.name]
    return BlockLayer(layer.name, weight, row.config.weight_range, row.site.dtype, layer.weight)


def _inside(block: TunedBlock, layer: QuantizedLayer) -> str:
    """The weight's name within the step."""
    return f"{layer.name.removeprefix(block.name).removeprefix('.')}.weight"


def _overlaid(block: TunedBlock, layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """The weight as the module has it: its shape, and split columns in floating point."""
    if layer.outlier_columns is not None:
        weight = layer.outlier_columns.put_into(weight)
    return weight.reshape(block.rows[layer.name].site.weight_shape)


def _rows(output: Any) -> Tensor:
    values = output if isinstance(output, Tensor) else output[0]
    return values.reshape(-1, values.shape[-1])
