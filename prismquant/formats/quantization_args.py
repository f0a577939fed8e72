"""``QuantizationArgs`` of a compressed-tensors configuration: read strictly, and written.

They say how the weights, inputs or outputs of a group's layers, or keys and values, are quantized:
bits, type, strategy and dynamics. Some number formats have no words there (E5M2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prismquant.errors import FormatError
from prismquant.formats.packed import check_declarable, declared_kind
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.kinds import Granularity, ScaleKind

ARGS_KEYS = frozenset(
    {
        *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
        *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    }
)
STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_GROUPED = ("group", "tensor_group")
_DYNAMIC = ("token", "tensor", "tensor_group", "group")
_INPUTS = ("token", "tensor", "group", "tensor_group", "attn_head")
# Of each input feature there is a group, rather than of neighbours: readers dropped it in 2026.
_REORDERED = ("group", "dynamic")

_DTYPE = re.compile(r"(?:torch\.)?(?:bfloat16|u?int(?:8|16|32|64)|float(?:16|32|64|8_e\w{3,9}))")
_SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
_MOST_BITS = 32
# Far above any real layer's width, and small enough for arithmetic on it to stay quick.
_MOST_COUNT = 1 << 24


@dataclass(frozen=True)
class Args:
    """The arguments by which numbers are quantized.

    Attributes:
        bits: Width of a code.
        type: ``int`` or ``float``.
        symmetric: Whether zero is its own zero point.
        strategy: What shares a scale.
        group_size: Elements that share one, for the grouped strategies.
        block: Rows and columns of a block, for strategy ``block``.
        dynamic: Whether scales are found at run time; ``local`` for those of blocks only.
        scale_dtype: Dtype of the stored scale, as far as it is declared.
        reordered: Whether each input feature has a group of its own choice (``weight_g_idx``).
    """

    bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None = None
    block: tuple[int, int] | None = None
    dynamic: bool | str = False
    scale_dtype: str | None = None
    reordered: bool = False

    @property
    def per_block(self) -> bool:
        """True if groups of input features have scales of their own."""
        return self.strategy in _GROUPED

    def describe(self) -> str:
        """In a few words, e.g. ``int4 group 128``."""
        size = f" {self.group_size}" if self.per_block else ""
        kind = "" if self.symmetric else " asymmetric"
        when = " dynamic" if self.dynamic else ""
        return f"{self.type}{self.bits} {self.strategy}{size}{kind}{when}"


def args_faults(raw: Any, role: str) -> list[str]:
    """Faults of the arguments of ``weights``, ``input_activations`` and so on.

    Args:
        raw: What the configuration says; null is no fault, nor are unknown keys.
        role: Which of a group's entries it is.

    Returns:
        A phrase a fault.
    """
    if raw is None:
        return []
    if not isinstance(raw, Mapping):
        return [f"is {kind_of(raw)}, not an object"]
    bits, kind = raw.get("num_bits", 8), _lower(raw.get("type", "int"))
    faults = []
    if not is_count(bits) or bits > _MOST_BITS:
        faults.append(f"has num_bits {shown(bits)}")
    if kind not in ("int", "float"):
        faults.append(f"has type {shown(kind)}, neither int nor float")
    elif kind == "float" and bits not in (4, 6, 8):
        faults.append(f"has floating-point numbers of {shown(bits)} bits")
    if not isinstance(raw.get("symmetric", True), bool):
        faults.append(f"has symmetric {shown(raw['symmetric'])}, neither true nor false")
    size = raw.get("group_size")
    if size is not None and not (is_count(size) or _is_whole(size, -1)):
        faults.append(f"has group_size {shown(size)}")
    elif (strategy := _strategy(raw)) not in STRATEGIES:
        faults.append(f"has strategy {shown(strategy)}")
    else:
        faults += _strategy_faults(strategy, size, raw, role)
    faults += _order_faults(raw.get("actorder"), _strategy(raw), role)
    for key in ("scale_dtype", "zp_dtype"):
        if raw.get(key) is not None and not is_dtype(raw[key]):
            faults.append(f"has {key} {shown(raw[key])}, which is no dtype")
    if not isinstance(raw.get("observer", ""), (str, type(None))):
        faults.append(f"has observer {shown(raw['observer'])}, not a name")
    if not isinstance(raw.get("observer_kwargs", {}), (Mapping, type(None))):
        faults.append(f"has observer_kwargs {shown(raw['observer_kwargs'])}, not an object")
    return faults


def _strategy_faults(
    strategy: str, size: int | None, raw: Mapping[str, Any], role: str
) -> list[str]:
    faults = []
    block, dynamic = raw.get("block_structure"), _lower(raw.get("dynamic", False))
    if strategy in _GROUPED and not is_count(size):
        faults.append(f"has strategy {strategy} without a positive group_size")
    if strategy not in _GROUPED and is_count(size):
        faults.append(f"has group_size {size} with strategy {strategy}")
    if strategy == "block" and _block(block) is None:
        faults.append(f"has strategy block with block_structure {shown(block)}")
    if strategy != "block" and block is not None:
        faults.append(f"has a block_structure with strategy {strategy}")
    if strategy == "token" and not dynamic:
        faults.append("has strategy token without dynamic: true")
    if not isinstance(dynamic, bool) and dynamic not in (None, "local"):
        faults.append(f"has dynamic {shown(dynamic)}")
    elif dynamic and strategy not in _DYNAMIC:
        faults.append(f"has dynamic {dynamic!r} with strategy {strategy}")
    elif dynamic == "local" and strategy != "tensor_group":
        faults.append(f"has dynamic 'local' with strategy {strategy}, not tensor_group")
    if role == "weights" and dynamic:
        faults.append(f"has dynamic {shown(dynamic)}: weights are static")
    if role == "input_activations" and strategy not in _INPUTS:
        faults.append(f"has strategy {strategy}, which inputs cannot have")
    return faults


def _order_faults(order: Any, strategy: Any, role: str) -> list[str]:
    if order is None or order is False:
        return []
    if order is not True and _lower(order) not in ("weight", "static", *_REORDERED):
        return [f"has actorder {shown(order)}"]
    if _lower(order) in (True, *_REORDERED) and strategy != "group":
        return [f"has actorder {shown(order)} with strategy {shown(strategy)}, not group"]
    return ["has an actorder, which only weights may have"] if role != "weights" else []


def read_args(raw: Any, role: str) -> Args | None:
    """The arguments of one role, or None where there are none or they are ill-formed."""
    if raw is None or args_faults(raw, role):
        return None
    size, order, scale_dtype = raw.get("group_size"), raw.get("actorder"), raw.get("scale_dtype")
    return Args(
        bits=raw.get("num_bits", 8),
        type=_lower(raw.get("type", "int")),
        symmetric=raw.get("symmetric", True),
        strategy=_strategy(raw),
        group_size=size if is_count(size) else None,
        block=_block(raw.get("block_structure")),
        dynamic=_lower(raw.get("dynamic")) or False,
        scale_dtype=scale_dtype.removeprefix("torch.") if scale_dtype else None,
        # Once `true` meant the same.
        reordered=order is True or _lower(order) in _REORDERED,
    )


def args_remedy(fault: str) -> str:
    """The remedy of a fault of :func:`args_faults`."""
    if "group_size" in fault:
        return "strategies group and tensor_group need group_size > 0, others need none"
    if "dynamic" in fault:
        return "inputs per token are dynamic: true, weights dynamic: false"
    if "block" in fault:
        return "strategy block needs block_structure [rows, columns], others need none"
    if "actorder" in fault:
        return "write actorder: null; a static order needs nothing in the checkpoint"
    return "correct the arguments; `prismquant quantize` writes legal ones"


# ---------------------------------------------------------------------------------- number formats


def args_of(spec: NumberSpec | None) -> dict[str, Any] | None:
    """A number format as ``QuantizationArgs``.

    Args:
        spec: The format; None: floating point.

    Raises:
        FormatError: The configuration has no word for it.
    """
    if spec is None:
        return None
    check_declarable(spec)
    two_levels = spec.scale == "e4m3"
    said: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int" if spec.kind == "int" else "float",
        "symmetric": spec.symmetric,
        "strategy": "tensor_group" if two_levels else str(spec.granularity),
        "group_size": spec.group_size,
        "dynamic": "local" if two_levels and spec.dynamic else spec.dynamic,
    }
    if spec.block_structure is not None:
        said |= {"group_size": None, "block_structure": list(spec.block_structure)}
    if spec.scale != "float":
        dtype = _SCALE_DTYPES[spec.scale.partition("-")[0]]
        said |= {"scale_dtype": dtype, "zp_dtype": dtype}
    return said


def spec_of(args: Args, layout: str = "") -> NumberSpec:
    """The number format that ``QuantizationArgs`` declare.

    Args:
        args: As they were read.
        layout: Of the weight, where this is about one: it tells MX formats from others even where
            the dtype of the scales is not declared.

    Raises:
        FormatError: It is none that PrismQuant has.
    """
    granularity, size = _unit(args)
    return NumberSpec(
        bits=args.bits,
        granularity=Granularity(granularity),
        group_size=size,
        symmetric=args.symmetric,
        dynamic=bool(args.dynamic),
        kind=declared_kind(args.type, args.bits),
        scale=_scale(args, layout),
    )


def _unit(args: Args) -> tuple[str, int | None]:
    """Granularity and group size."""
    if args.strategy == "attn_head":
        raise FormatError(
            "numbers with a scale an attention head cannot be read",
            remedy="only caches of keys and values have them",
        )
    if args.block is not None:
        rows, columns = args.block
        if rows != columns:
            raise FormatError(
                f"blocks of {rows} x {columns} cannot be read",
                remedy="only square blocks can, e.g. block_structure [128, 128]",
            )
        return Granularity.BLOCK, columns
    return (Granularity.GROUP, args.group_size) if args.per_block else (args.strategy, None)


def _scale(args: Args, layout: str) -> ScaleKind:
    if args.strategy == "tensor_group":
        return "e4m3"
    return "e8m0" if args.scale_dtype == "uint8" or layout.startswith("mxfp") else "float"


# ----------------------------------------------------------------------------------------- values


def _strategy(raw: Mapping[str, Any]) -> Any:
    strategy = raw.get("strategy")
    if strategy is not None:
        return _lower(strategy)
    size = raw.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _block(value: Any) -> tuple[int, int] | None:
    """Rows and columns; older libraries also wrote ``128x128``."""
    if isinstance(value, str):
        parts = value.split("x")
        value = [int(part) for part in parts] if all(_is_digits(part) for part in parts) else None
    if isinstance(value, list) and len(value) == 2 and all(is_count(item) for item in value):
        return (value[0], value[1])
    return None


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 9


def is_count(value: Any) -> bool:
    """True if a value of JSON is a positive whole number, of a size that layers have."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and 0 < value <= _MOST_COUNT


def _is_whole(value: Any, wanted: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == wanted


def is_number(value: Any) -> bool:
    """True if a value of JSON is a finite number."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and (isinstance(value, int) or math.isfinite(value))


def is_dtype(value: Any) -> bool:
    """True if a value of JSON is the name of a dtype."""
    return isinstance(value, str) and _DTYPE.fullmatch(value) is not None


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def shown(value: Any) -> str:
    """A value of a stranger, short enough for a line."""
    if isinstance(value, (list, Mapping)) and len(value) > 8:
        return f"{kind_of(value)} of {len(value)} entries"
    if isinstance(value, int) and value.bit_length() > 200:
        return "an enormous number"
    text = repr(value)
    return text if len(text) <= 60 else text[:58] + ".."


def kind_of(value: Any) -> str:
    """The kind of a value of JSON, e.g. ``a list``."""
    if isinstance(value, Mapping):
        return "an object"
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
