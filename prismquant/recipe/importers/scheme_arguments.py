"""Number formats, and how ranges are observed, in the words of compressed-tensors.

They are the same in recipes of llm-compressor and in ``quantization_config``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from prismquant.errors import PrismQuantError
from prismquant.formats.spec import NumberSpec
from prismquant.recipe.importers.ledger import quoted
from prismquant.recipe.importers.source_section import Setting, SourceSection, Table, idle

Fields = dict[str, Any]
Side = Literal["weights", "activations", "outputs"]

_LAYOUT = "the bytes on disk follow from the formats"

ARGUMENTS: Table = (
    Setting("num_bits", "8", "bits"),
    Setting("type", "int", "kind", "float is E4M3, E2M3 or E2M1, by its bits"),
    Setting(
        "symmetric", "true", "symmetric", "of the full grid: int4 from -8 to 7, scale absmax / 7.5"
    ),
    Setting("group_size", "", "group_size"),
    Setting("strategy", "by the group size", "granularity", "tensor_group is NVFP4"),
    Setting("block_structure", "", "granularity: block, group_size", "squares only"),
    Setting(
        "dynamic", "false", "dynamic", "tensor scales are static here: dynamic ones become token"
    ),
    Setting(
        "actorder",
        "null",
        "options.order",
        "static and weight are activation, null is original; group and dynamic become activation",
    ),
    Setting("observer", "memoryless_minmax; minmax", "weight_range, activation_range"),
    Setting("observer_kwargs", "{}", "fields of the range rule"),
    Setting("scale_dtype", "null", "scale", "uint8 is a power of two (MX)"),
    idle("zp_dtype", _LAYOUT),
)
"""Keys of a number format."""

# Fields of the MSE observers, and where they are ours.
OBSERVER_ARGUMENTS: Table = (
    Setting("maxshrink", "0.2; imatrix 0.95", "max_shrink"),
    Setting("grid", "100; imatrix 20", "steps", "tries per unit of shrinking"),
    Setting("norm", "2.4; imatrix 3", "norm"),
    Setting("averaging_constant", "0.01", "momentum"),
    idle("patience", "the search never ends early", default="5"),
)
_STATIC = ("static_minmax", "memoryless_minmax")
_SEARCHES = ("mse", "memoryless_mse", "imatrix_mse", "nvfp4_expanded_mse")
OBSERVERS = ("minmax", *_STATIC, *_SEARCHES)
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_FLOATS = {8: "e4m3", 6: "e2m3", 4: "e2m1"}
_POWER_OF_TWO = ("uint8", "torch.uint8")


@dataclass(frozen=True)
class Numbers:
    """A number format, and how its ranges are chosen.

    Attributes:
        spec: The format; None where it cannot be had, which is noted.
        range_rule: Fields of the range rule; empty where scales are dynamic.
        weighting: Importance of columns in the search of a weight's range.
        order: Of the columns in GPTQ; None where nothing is said.
    """

    spec: NumberSpec | None
    range_rule: Fields = field(default_factory=dict)
    weighting: str = "none"
    order: str | None = None


def numbers(section: SourceSection, side: Side, observer: str | None = None) -> Numbers:
    """The format that a mapping of arguments means, with notes on all of its keys.

    Args:
        section: The mapping, read against :data:`ARGUMENTS`.
        side: Of the layer.
        observer: One that the modifier names, in place of the mapping's own.
    """
    fields = _fields(section, side)
    spec = _spec(section, fields, side)
    told = side if spec is None else f"{side}: {spec.name}"
    for key in ("num_bits", "type", "symmetric", "group_size", "block_structure", "scale_dtype"):
        section.honoured(key, told)
    if fields.get("was_tensor"):
        section.changed("dynamic", told, "a scale for each token, which is finer: tensor is static")
    else:
        section.honoured("dynamic", told)
    section.honoured("strategy", told)
    if spec is None or (side != "weights" and not spec.calibrated):
        _unused_observer(section, "its scales are dynamic")
        return Numbers(spec, order=_order(section, side))
    key = "weight_range" if side == "weights" else "activation_range"
    rule, weighting = observed(section, side, key, observer)
    return Numbers(spec, rule, weighting, _order(section, side))


def _fields(section: SourceSection, side: Side) -> Fields:
    """Fields of the format, as far as the arguments say them or what they imply."""
    kind = section.word("type", "int", ("int", "float"))
    bits = section.integer("num_bits", 8, 2, 8)
    size = section.integer("group_size", 0, -1, 1 << 20)
    implied = "channel" if size < 0 else "group" if size else "tensor"
    strategy = section.word("strategy", implied, _STRATEGIES)
    dynamic = section.content.get("dynamic", False)
    if not isinstance(dynamic, bool | None) and dynamic != "local":
        section.wrong("dynamic", f"true, false or local, not {quoted(dynamic)}")
    if dynamic == "local" and strategy != "tensor_group":
        section.wrong("dynamic", "local is for the strategy tensor_group")
    fields: Fields = {"bits": bits, "symmetric": section.flag("symmetric", True)}
    if kind == "float":
        if bits not in _FLOATS:
            section.wrong("num_bits", f"float numbers have {', '.join(map(str, _FLOATS))} bits")
        fields["kind"] = _FLOATS.get(bits, "e4m3")
    fields |= _granularity(section, strategy, size, fields)
    fields["dynamic"] = bool(dynamic) and side != "weights"
    if side == "weights" and dynamic:
        section.wrong("dynamic", "a weight's scales are never dynamic")
    if side != "weights" and dynamic is True and strategy == "tensor":
        fields |= {"granularity": "token", "was_tensor": True}
    if str(section.content.get("scale_dtype")) in _POWER_OF_TWO:
        # Servers round the scales of E4M3 inputs up, whatever a simulation does.
        ceil = side != "weights" and fields.get("kind") == "e4m3"
        fields["scale"] = "e8m0-ceil" if ceil else "e8m0"
    return fields


def _granularity(section: SourceSection, strategy: str, size: int, fields: Fields) -> Fields:
    if strategy == "attn_head":
        section.wrong("strategy", "only a key-value cache has scales by head")
        return {"granularity": "tensor"}
    if strategy == "tensor_group":
        return {"granularity": "group", "group_size": size, "scale": "e4m3"}
    if strategy == "block":
        return {"granularity": "block", "group_size": _block(section)}
    if strategy == "group":
        return {"granularity": "group", "group_size": size}
    if size > 0:
        section.wrong("group_size", f"it needs strategy group, not {strategy}")
    return {"granularity": strategy}


def _block(section: SourceSection) -> int:
    value = section.content.get("block_structure")
    parts = value.split("x") if isinstance(value, str) else value
    sides = {str(part) for part in parts} if isinstance(parts, list | tuple) else set()
    side = sides.pop() if len(sides) == 1 and len(parts or ()) == 2 else ""
    if not side.isdecimal() or not int(side):
        section.wrong("block_structure", f"squares such as [128, 128] only, not {quoted(value)}")
        return 128
    return int(side)


def _spec(section: SourceSection, fields: Fields, side: Side) -> NumberSpec | None:
    try:
        spec = NumberSpec.from_dict({k: v for k, v in fields.items() if k != "was_tensor"})
    except PrismQuantError as error:
        section.ledger.wrong(section.place, "; ".join(filter(None, (error.what, error.remedy))))
        return None
    if side == "weights":
        return spec
    if spec.granularity in ("channel", "block"):
        section.wrong("strategy", f"{side} have no scales by {spec.granularity}")
    elif spec.dynamic == (spec.granularity == "tensor"):
        section.wrong("dynamic", f"{side} by {spec.granularity} need dynamic: true")
    return spec


def _order(section: SourceSection, side: Side) -> str | None:
    """Order of the columns in GPTQ, where the arguments say one."""
    if "actorder" not in section.content:
        return None
    value = section.content["actorder"]
    if side != "weights":
        if value not in (None, False):
            section.wrong("actorder", "only weights have columns to order")
        return None
    return column_order(section, "actorder")


def column_order(section: SourceSection, key: str) -> str:
    """Order of the columns in GPTQ, of a key that is given."""
    value = section.content[key]
    name = value.lower() if isinstance(value, str) else value
    if name is None or name is False or name == "none":
        section.honoured(key, "options.order: original")
        return "original"
    if name in ("static", "weight"):
        section.honoured(
            key, "options.order: activation", "groups stay those of the original order"
        )
        return "activation"
    if name is True or name in ("group", "dynamic"):
        section.changed(
            key,
            "options.order: activation",
            "groups stay those of the original order: servers no longer read others",
        )
        return "activation"
    section.wrong(key, f"static, weight, group, dynamic or null, not {quoted(value)}")
    return "activation"


def observed(
    section: SourceSection, side: Side, where: str, override: str | None = None
) -> tuple[Fields, str]:
    """Range rule of an observer, and the importance of columns in its search.

    Args:
        section: The arguments that name it.
        side: Of the layer.
        where: Our key of the rule.
        override: An observer that counts in place of theirs.
    """
    default = "memoryless_minmax" if side == "weights" else "minmax"
    name = override or section.word("observer", default, OBSERVERS)
    given = SourceSection(
        section.ledger,
        section.at("observer_kwargs"),
        section.content.get("observer_kwargs") or {},
        OBSERVER_ARGUMENTS,
    )
    rule, weighting, why = observer_rule(name, side, given)
    if override is not None:
        section.dropped("observer", "the modifier names another")
    elif why:
        section.changed("observer", f"{where}: {rule['kind']}", why)
    else:
        section.honoured("observer", f"{where}: {rule['kind']}")
    return rule, weighting


def observer_rule(name: str, side: Side, given: SourceSection) -> tuple[Fields, str, str]:
    """Range rule of an observer, the importance of columns in its search, and how ours differs.

    Args:
        name: One of :data:`OBSERVERS`.
        side: Of the layer.
        given: Its own arguments, which are noted.
    """
    if name in _STATIC or (name == "minmax" and side == "weights"):
        _unused(given, f"{name} has no such argument")
        return {"kind": "minmax"}, "none", ""
    if name == "minmax":
        momentum = given.number("averaging_constant", 0.01, 1e-6, 1)
        given.honoured("averaging_constant", f"momentum: {momentum:.15g}")
        return {"kind": "ema", "momentum": momentum}, "none", ""
    if side != "weights" and name in ("imatrix_mse", "nvfp4_expanded_mse"):
        given.ledger.wrong(given.place, f"the observer {name} is for weights")
    if name == "nvfp4_expanded_mse":
        _unused(given, "every scale is tried")
        rule: Fields = {"kind": "sweep", "signed_scale": False}
        return rule, "none", "every scale up to twice that of absmax is tried"
    return _search_rule(name, side, given)


def _search_rule(name: str, side: Side, given: SourceSection) -> tuple[Fields, str, str]:
    weighed = name == "imatrix_mse"
    shrink = given.number("maxshrink", 0.95 if weighed else 0.2, 0, 0.99)
    grid = given.number("grid", 20 if weighed else 100, 1, 10_000)
    norm = given.number("norm", 3 if weighed else 2.4, 0.1, 10)
    steps = max(2, int(shrink * grid))
    rule = {"kind": "mse", "max_shrink": shrink, "steps": steps, "norm": norm}
    given.honoured("maxshrink", f"max_shrink: {shrink:.15g}")
    given.honoured("grid", f"steps: {steps}")
    given.honoured("norm", f"norm: {norm:.15g}")
    given.dropped("averaging_constant", "nothing is averaged in a search")
    if side != "weights":
        return rule, "none", "one search over all batches, not an average of searches"
    why = "the search never ends early, and begins a little above absmax"
    return rule | {"signed_scale": False}, "diagonal" if weighed else "none", why


def _unused(given: SourceSection, why: str) -> None:
    for key in ("maxshrink", "grid", "norm", "averaging_constant"):
        given.dropped(key, why)


def _unused_observer(section: SourceSection, why: str) -> None:
    for key in ("observer", "observer_kwargs"):
        if section.content.get(key):
            section.dropped(key, why)
