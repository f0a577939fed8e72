"""Everything that is done to one layer, as one frozen value.

A :class:`LayerConfig` is what the rules of a recipe come to for a layer, what a row of the plan
holds, and what the fingerprint of a run is taken of. A rule is its partial form: the same fields,
of which it may leave out any, and of a field's parts any as well. :func:`merge` lays rules over one
another, the same way for every field:

- words and numbers replace what was there before;
- mappings (a number format, a range rule, a method's options) are laid over it key by key;
- ``none`` takes a field back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from prismquant.algorithms.methods import build_solver
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.rules import RangeRule

if TYPE_CHECKING:
    from prismquant.algorithms.correction import Correction

OnFailure = Literal["stop", "rtn"]
FewTokens = Literal["all", "rtn"]
Partial = Mapping[str, Any]

NONE = "none"
_USUAL_RANGE = RangeRule()


class Options(Mapping[str, Any]):
    """Options of a method: a mapping that never changes and can be hashed.

    Args:
        given: The options; the order does not matter.
    """

    __slots__ = ("_given",)

    def __init__(self, given: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._given = {name: given[name] for name in sorted(given)}

    def __getitem__(self, name: str) -> Any:
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def __hash__(self) -> int:
        return hash(tuple(self._given.items()))

    def __repr__(self) -> str:
        return f"Options({self._given})"


@dataclass(frozen=True)
class LayerConfig:
    """Everything that is done to one layer; by default nothing is.

    Attributes:
        weights: Number format of the weight; None leaves the layer alone.
        activations: Number format of the input; None keeps floating point.
        outputs: Number format of the output; None keeps floating point.
        solver: Name of the method that chooses the codes.
        options: Its options.
        correction: How far the weight is corrected for what precedes it; None: not.
        tuner: Name of the method that improves the codes on the block's output; None: nobody.
        tuner_options: Its options.
        vision_weight: Weight of a vision token in the language model's statistics, a text token
            counting one.
        weight_range: How the weight's range is chosen.
        activation_range: How a static activation's range is chosen.
        on_failure: Answer to a solver that fails: ``stop``, or ``rtn`` to round to nearest.
        min_tokens: Tokens that an expert must have been sent to be calibrated on them alone.
        few_tokens: What becomes of one that was sent fewer: ``all``, to be calibrated on all tokens
            of its block, or ``rtn`` to round to nearest.
    """

    weights: NumberSpec | None = None
    activations: NumberSpec | None = None
    outputs: NumberSpec | None = None
    solver: str = "gptq"
    options: Options = field(default_factory=Options, metadata={"of": "solver"})
    correction: Correction | None = None
    tuner: str | None = None
    tuner_options: Options = field(default_factory=Options, metadata={"of": "tuner"})
    vision_weight: float | Literal["gradient"] = 1.0
    weight_range: RangeRule = field(default_factory=RangeRule)
    activation_range: RangeRule = field(default_factory=RangeRule)
    on_failure: OnFailure = "stop"
    min_tokens: int = 256
    few_tokens: FewTokens = "all"

    @property
    def static_input(self) -> bool:
        """Whether a static activation scale must be calibrated."""
        return self.activations is not None and self.activations.calibrated

    @property
    def static_output(self) -> bool:
        """Whether a static scale of the output must be calibrated."""
        return self.outputs is not None and self.outputs.calibrated

    @property
    def sides(self) -> tuple[NumberSpec | None, NumberSpec | None]:
        """Number formats of input and output."""
        return (self.activations, self.outputs)

    @property
    def needs_hessian(self) -> bool:
        """Whether its solver asks for second moments."""
        return "hessian" in _statistics(self.solver, self.options)

    @property
    def needs_float_chain(self) -> bool:
        """Whether the float model's states are needed beside those of the quantized one."""
        return self.correction is not None or self.tuner is not None

    @property
    def can_fail(self) -> bool:
        """Whether its codes hang on statistics that may turn out to be of no use."""
        return self.weights is not None and (self.needs_hessian or self.correction is not None)

    @property
    def undeclared_rounding(self) -> bool:
        """Whether readers may round the scales of dynamic inputs by another rule."""
        dynamic = [spec for spec in self.sides if spec is not None and spec.dynamic]
        # For E4M3 the rule that is declared is that of servers: it rounds up but for a hair.
        same = ("e8m0-ceil", "e4m3")
        return any(
            spec.scale.startswith("e8m0-") and (spec.scale, spec.kind) != same for spec in dynamic
        )

    def settled(self) -> LayerConfig:
        """The same work without what has no part in it: equal values then mean equal work."""
        if self.weights is None:
            return LayerConfig()
        used = self
        if not (self.static_input or self.static_output):
            used = used._with("activation_range", _USUAL_RANGE)
        return used if self.can_fail else used._with("on_failure", LayerConfig.on_failure)

    def without_experts(self) -> LayerConfig:
        """The same work on a layer that is part of no expert."""
        used = self._with("min_tokens", LayerConfig.min_tokens)
        return used._with("few_tokens", LayerConfig.few_tokens)

    def _with(self, name: str, value: Any) -> LayerConfig:
        """The same with another value of a field; itself, where it has that."""
        return self if getattr(self, name) == value else replace(self, **{name: value})

    def describe(self) -> str:
        """Number formats in a few words for a message, e.g. ``int4 g128 sym, input int8 token``."""
        if self.weights is None:
            return "float"
        inputs = f", input {self.activations.describe()}" if self.activations else ""
        outputs = f", output {self.outputs.describe()}" if self.outputs else ""
        return self.weights.describe() + inputs + outputs


@functools.lru_cache(maxsize=256)
def _statistics(solver: str, options: Options) -> frozenset[str]:
    """Statistics that a solver asks for; plans of large models ask many times a layer."""
    return frozenset(build_solver(solver, options).statistics)


_NUMBERS = ("weights", "activations", "outputs")
_RANGES = ("weight_range", "activation_range")


def merge(partials: Iterable[Partial]) -> dict[str, Any]:
    """Partial configurations laid over one another, later ones winning key by key.

    Args:
        partials: Fields of a :class:`LayerConfig`; a missing one, or None, says nothing.

    Returns:
        What they come to, itself partial; a field that was taken back is None.
    """
    merged: dict[str, Any] = {}
    for partial in partials:
        for name, default, method in _FIELDS:
            said = partial.get(name)
            if isinstance(said, Mapping):
                implied = _implied(said) if name in _NUMBERS else {}
                merged[name] = {**(merged.get(name) or {}), **said, **implied}
            elif said is not None:
                value = None if said == NONE else said
                if method and value != merged.get(name, default):
                    merged[method] = {}
                merged[name] = value
    return merged


def build(merged: Partial) -> LayerConfig:
    """Make a configuration from what :func:`merge` gave; without weights, it has no formats at all.

    Raises:
        FormatError, RecipeError, TypeError: The fields make no number format or range rule.
    """
    without = () if merged.get("weights") else _NUMBERS
    return LayerConfig(
        **{name: _value(name, said) for name, said in merged.items() if name not in without}
    )


def _value(name: str, said: Any) -> Any:
    if name in _NUMBERS:
        return NumberSpec.from_dict(said) if said else None
    if not isinstance(said, Mapping):
        return said
    if name in _RANGES:
        return RangeRule(**said)
    if name == "correction":
        from prismquant.algorithms.correction import Correction

        return Correction(**said)
    return Options(said)


def _implied(said: Partial) -> dict[str, Any]:
    """``granularity: channel`` drops an earlier group size; a group size alone says granularity."""
    granularity = said.get("granularity")
    if granularity not in (None, "group", "block"):
        return {"group_size": None}
    if granularity is None and said.get("group_size") is not None:
        return {"granularity": "group"}
    return {}


def _fields() -> tuple[tuple[str, Any, str | None], ...]:
    """Name of each field, its default, and the field of the options that it decides."""
    owned = {one.metadata["of"]: one.name for one in fields(LayerConfig) if "of" in one.metadata}
    return tuple((one.name, one.default, owned.get(one.name)) for one in fields(LayerConfig))


_FIELDS = _fields()
