"""Number formats in the words of a compressed-tensors configuration, and what they cannot say.

A ``QuantizationArgs`` mapping says bits, type, strategy and dynamics of a weight or an input. Some
formats of inputs have no words there (E5M2, inputs of layers that are stored dequantized), and some
lose a detail (how an E8M0 scale is rounded). Those are told in a section of our own at the top of
``config.json``, which other readers pass over:

    "prismquant": {"activations": {"model.layers.0.mlp.up_proj": {"input": {...}}}}
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from prismquant.errors import FormatError
from prismquant.export.quantization_args import Args
from prismquant.formats.packed import check_declarable, declared_kind
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.kinds import Granularity, ScaleKind
from prismquant.patterns import shortened
from prismquant.plan.bit_layout import is_declarable
from prismquant.plan.plan import PlanRow

PRIVATE_KEY = "prismquant"
_INPUT, _OUTPUT = "input", "output"
_MOST_TOLD = 5

_SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}


def arguments(spec: NumberSpec | None) -> dict[str, Any] | None:
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


def specification(args: Args, layout: str = "") -> NumberSpec:
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


def private_section(rows: Iterable[tuple[str, PlanRow]]) -> dict[str, Any]:
    """The section of our own for what the configuration cannot say; empty where there is nothing.

    Args:
        rows: Rows of a plan, each with what the configuration calls its layer.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows:
        for side, spec in ((_INPUT, row.config.activations), (_OUTPUT, row.config.outputs)):
            if spec is not None and (row.stored_dense or not _says_all(spec)):
                found.setdefault(name, {})[side] = spec.to_dict()
    return {PRIVATE_KEY: {"activations": found}} if found else {}


def read_private(
    config: Mapping[str, Any], layers: Collection[str]
) -> dict[str, tuple[NumberSpec | None, NumberSpec | None]]:
    """Formats of inputs and outputs that only our section declares, by the layer's name.

    Args:
        config: The content of ``config.json``.
        layers: What the configuration calls the model's layers.

    Raises:
        FormatError: Lists the entries that are no number format or are about no layer.
    """
    faults: list[str] = []
    found: dict[str, tuple[NumberSpec | None, NumberSpec | None]] = {}
    section = _object(config.get(PRIVATE_KEY), PRIVATE_KEY, ("activations",), faults)
    entries = _object(section.get("activations"), "activations", None, faults)
    for name, raw in entries.items():
        entry = _object(raw, name, (_INPUT, _OUTPUT), faults)
        if name not in layers:
            faults.append(f"there is no layer {shortened(name)}")
        try:
            found[name] = (_format(entry.get(_INPUT)), _format(entry.get(_OUTPUT)))
        except FormatError as error:
            faults.append(f"{name}: {error.what}")
    if faults:
        told = faults[:_MOST_TOLD] + [f"and {len(faults) - _MOST_TOLD} more"] * (
            len(faults) > _MOST_TOLD
        )
        raise FormatError(
            f"our own section of config.json cannot be read: {'; '.join(told)}",
            where=PRIVATE_KEY,
            remedy="restore the file from the finished run, or delete the section: inputs and "
            "outputs that it is about are then in floating point",
        )
    return found


def _object(
    raw: Any, name: str, known: tuple[str, ...] | None, faults: list[str]
) -> Mapping[str, Any]:
    """An object with these keys; an empty one where it is none, or null."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        faults.append(f"{name} is no object")
        return {}
    if known is not None and (unknown := sorted(set(raw) - set(known))):
        faults.append(f"{name} has the unknown key {shortened(unknown[0])}")
    return raw


def _format(raw: Any) -> NumberSpec | None:
    if raw is not None and not isinstance(raw, Mapping):
        raise FormatError(f"{shortened(str(raw))} is no number format")
    return None if raw is None else NumberSpec.from_dict(raw)


def _says_all(spec: NumberSpec) -> bool:
    """Whether a reader of the configuration quantizes exactly as we do."""
    return is_declarable(spec) and not (spec.dynamic and spec.scale.startswith("e8m0-"))
