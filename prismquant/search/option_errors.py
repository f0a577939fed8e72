"""Errors that formats on offer make in the layers of one step, by the solver that a recipe uses.

Every option of every unit is solved with statistics of the float model's inputs; options that see
an input alike share them. Codes are kept, a byte a weight; an error is dequantized when its turn
comes. An error of a layer's output is that of its weight and that of its input together:

    dY = Q(x) (W + dW)^T - x W^T = Q(x) dW^T + (Q(x) - x) W^T
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prismquant.algorithms.methods import build_solver
from prismquant.engine.collectives import Task, solve_all
from prismquant.engine.failure import Guarded
from prismquant.engine.group import GroupSettings, LayerGroup, What
from prismquant.engine.kv_observation import KVObservation
from prismquant.engine.layer_inputs import inputs_of_layers
from prismquant.engine.walk import Unit
from prismquant.formats.quantized_layer import QuantizedLayer, scale_and_zero_point
from prismquant.memory import give_back_freed
from prismquant.models.bound import BoundSite
from prismquant.plan.plan import PlanRow, problem_groups
from prismquant.runtime.kv_cache import KVQuantizer
from prismquant.runtime.linear import ActivationQuantizer, QuantLinear
from prismquant.search.analysis import Analysis

# A unit's name and the name of one of its options.
Option = tuple[str, str]
# Bytes of a step's dequantized errors that are kept rather than made again for every sample.
_KEPT_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class LayerError:
    """Error that an option makes in one layer.

    Attributes:
        option: The unit and the option.
        row: What the plan says of the layer.
        layer: Its codes.
    """

    option: Option
    row: PlanRow
    layer: QuantizedLayer

    def weight_error(self, weight: Tensor) -> Tensor:
        """Quantized minus float weight, ``[out, in]`` in float32 or wider.

        Args:
            weight: The float weight, ``[out, in]``.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        stored = self.row.site.dtype if self.row.stored_dense else torch.float32
        return self.layer.values(stored).to(weight.device, wide) - weight.to(wide)

    def input_quantizer(self, device: torch.device) -> ActivationQuantizer | None:
        """The quantizer that its input goes through, if any."""
        spec = self.row.config.activations
        if spec is None:
            return None
        scales = scale_and_zero_point(self.layer.input)
        return ActivationQuantizer(spec, *scales).to(device)


class StepErrors:
    """Errors of all options in the layers of one step, and in its keys and values.

    Args:
        unit: The step, loaded.
        errors: Of its layers.
        caches: Quantizers of its keys and values, by option.
        attention: Module path of the attention whose keys and values these are, if there are any.
    """

    def __init__(
        self,
        unit: Unit,
        errors: Sequence[LayerError],
        caches: Mapping[Option, KVQuantizer],
        attention: str | None,
    ) -> None:
        self._unit, self.caches, self.attention = unit, caches, attention
        self.by_layer: dict[str, list[LayerError]] = {}
        for error in errors:
            self.by_layer.setdefault(error.row.site.name, []).append(error)
        size = sum(e.row.site.out_features * e.row.site.in_features for e in errors)
        self._keep = 4 * size <= _KEPT_BYTES
        self._kept: dict[tuple[Option, str], Tensor] = {}

    def site(self, name: str) -> BoundSite:
        """The layer of this name."""
        return self.by_layer[name][0].row.site

    def outputs(self, name: str, x: Tensor) -> Iterator[tuple[Option, Tensor]]:
        """Errors of a layer's output, option by option.

        Args:
            name: The layer.
            x: Inputs that it is given, any shape that reshapes to ``[rows, in]``.

        Yields:
            The option, and the error ``[rows, out]`` in the dtype of the input.
        """
        errors = self.by_layer[name]
        site, module = errors[0].row.site, self._unit.main.module(name)
        x = module.rotated(x) if isinstance(module, QuantLinear) else x
        x = x.reshape(-1, site.in_features)
        weight = self._unit.weight(site).to(x.dtype)
        seen: dict[object, tuple[Tensor, Tensor]] = {}
        for error in errors:
            quantizer, given, from_input = error.input_quantizer(x.device), x, None
            if quantizer is not None:
                key = (quantizer.spec, _value(quantizer.scale), _value(quantizer.zero_point))
                if key not in seen:
                    # Scales are never wider than float32.
                    narrow = x.float() if x.dtype == torch.float64 else x
                    rounded = quantizer(narrow).to(x.dtype)
                    seen[key] = rounded, (rounded - x) @ weight.T
                given, from_input = seen[key]
            output = given @ self._weight_error(error).to(x.dtype).T
            yield error.option, output if from_input is None else output + from_input

    def _weight_error(self, error: LayerError) -> Tensor:
        key = (error.option, error.row.site.name)
        if key in self._kept:
            return self._kept[key]
        found = error.weight_error(self._unit.weight(error.row.site))
        if self._keep:
            self._kept[key] = found
        return found


@torch.no_grad()
def solve_step(unit: Unit, analysis: Analysis) -> StepErrors:
    """Solve every option of the layers of one step, and of its keys and values.

    Options that need statistics are left out where no data flow.

    Args:
        unit: The step; its modules are loaded where data flow.
        analysis: The units of choice.

    Raises:
        NumericsError: A weight, an input or a Hessian is not finite or cannot be factorized.
    """
    groups = [
        ((one.unit.name, option), members)
        for one in analysis.wanted
        for option, rows in one.rows.items()
        for members in problem_groups([r for r in rows if r.site.step == unit.step.index])
        if members[0].quantized and (unit.flows or not members[0].needs_data)
    ]
    together: dict[object, list[tuple[Option, list[PlanRow]]]] = {}
    for option, members in groups:
        together.setdefault(_statistics_key(members), []).append((option, members))
    sharing = [(_group(unit, own[0][1]), own) for own in together.values()]
    _observe(unit, [group for group, _ in sharing], analysis)
    errors: list[LayerError] = []
    while sharing:
        group, own = sharing.pop(0)
        analysis.stage(unit.name, f"{group.rows[0].config.solver} {group.rows[0].site.role}")
        errors += _solve(group, own, analysis)
        give_back_freed()
    caches, attention = _caches(unit, analysis)
    return StepErrors(unit, errors, caches, attention)


def _statistics_key(rows: Sequence[PlanRow]) -> object:
    """Equal for layers of which the same statistics are gathered."""
    config = rows[0].config
    ranges = config.activation_range if config.static_input else None
    names = tuple(row.site.name for row in rows)
    return names, config.activations, ranges, config.vision_weight, config.needs_hessian


def _group(unit: Unit, rows: Sequence[PlanRow]) -> LayerGroup:
    precision, weight = unit.walk.placement.precision, rows[0].config.vision_weight
    settings = GroupSettings(
        device=unit.walk.placement.device,
        stored_dtype=rows[0].site.dtype,
        quantized_inputs=True,
        vision_weight=1.0 if weight == "gradient" else weight,
        products=precision.products or precision.dtype,
    )
    modules = [unit.main.module(row.site.name) for row in rows] if unit.flows else []
    return LayerGroup(rows, modules, settings, unit.weight)


def _observe(unit: Unit, groups: Sequence[LayerGroup], analysis: Analysis) -> None:
    """Show every group the input of its layers, as often as it must see it."""
    kinds: tuple[What, ...] = ("ranges", "moments")
    for what in kinds:
        hungry = [group for group in groups if group.wants(what)]
        if not hungry or not unit.flows:
            continue
        analysis.stage(unit.name, "Hessians" if what == "moments" else what)
        names = list(dict.fromkeys(group.name for group in hungry))
        for call, inputs in inputs_of_layers(unit, names):
            for group in hungry:
                if group.name in inputs:
                    group.observe(inputs[group.name], call, what)
        for group in hungry:
            group.share(what, analysis.ranks)


def _solve(
    group: LayerGroup, own: Sequence[tuple[Option, list[PlanRow]]], analysis: Analysis
) -> Iterator[LayerError]:
    """Solve the options that share a group's statistics."""
    problem = group.problem()
    for option, rows in own:
        config = rows[0].config
        if config.weights is None:
            continue
        solver = build_solver(config.solver, config.options)
        guarded = Guarded(solver, config.on_failure) if solver.statistics else solver
        own_problem = replace(problem, spec=config.weights, range_rule=config.weight_range)
        (result,) = solve_all([Task(guarded, own_problem)], analysis.ranks)
        for (layer, record), row in zip(group.solved(result), rows, strict=True):
            analysis.solved(*option, layer.name, record.loss)
            yield LayerError(option, row, layer)


def _caches(unit: Unit, analysis: Analysis) -> tuple[dict[Option, KVQuantizer], str | None]:
    """Quantizers of the step's keys and values, by option; and the attention that they are of."""
    found: dict[Option, KVQuantizer] = {}
    attention: str | None = None
    for one in analysis.wanted:
        for option, plan in one.caches.items():
            layer = plan.layer(unit.step.index)
            if layer is None or not unit.flows:
                continue
            analysis.stage(unit.name, "keys and values")
            observation = KVObservation(plan, layer)
            with unit.as_served():
                observation.observe(unit.main.model, unit.module, unit.calls())
            observation.share(analysis.ranks)
            scales = observation.scales(layer.key.dtype, unit.walk.placement.device)
            found[one.unit.name, option] = KVQuantizer(plan.spec, scales.key, scales.value)
            attention = layer.attention
    return found, attention


def _value(scale: Tensor | None) -> float | None:
    return None if scale is None else float(scale)
