"""Number formats in the words of a compressed-tensors configuration, and what they cannot say.

A ``QuantizationArgs`` mapping says bits, type, strategy and dynamics of a weight or an input. Some
formats of inputs have no words there (E5M2, inputs of layers that are stored dequantized), and some
lose a detail (how an E8M0 scale is rounded). Those are told in a section of our own at the top of
``config.json``, which other readers pass over:

    "prismquant": {"activations": {"model.layers.0.mlp.up_proj": {"input": {...}}}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prismquant.formats.packed import check_declarable, declared_kind
from prismquant.formats.spec import NumberSpec
from prismquant.numerics.kinds import Granularity
from prismquant.pipeline.layout import is_declarable
from prismquant.pipeline.plan import PlanRow

PRIVATE_KEY = "prismquant"
_INPUT, _OUTPUT = "input", "output"

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


def specification(said: Mapping[str, Any], layout: str = "") -> NumberSpec:
    """The number format that ``QuantizationArgs`` declare.

    Args:
        said: The mapping; keys that are left out have the library's defaults.
        layout: Of the weight, where this is about one: it tells MX formats from others even where
            the dtype of the scales is not declared.

    Raises:
        FormatError: It is none that PrismQuant has.
    """
    bits, number = said.get("num_bits"), said.get("type", "int")
    granularity, size = _unit(said)
    scale = _scale(said, layout)
    return NumberSpec.from_dict(
        {
            "bits": bits,
            "granularity": granularity,
            "group_size": size,
            "symmetric": said.get("symmetric", True),
            "dynamic": bool(said.get("dynamic", False)),
            "kind": declared_kind(number, bits),
            "scale": scale,
        }
    )


def _unit(said: Mapping[str, Any]) -> tuple[str, int | None]:
    """Granularity and group size, also where only one of them is declared."""
    size = said.get("group_size")
    inferred = "group" if size and size > 0 else "channel" if size == -1 else "tensor"
    strategy = said.get("strategy") or inferred
    if strategy == "block":
        structure = said.get("block_structure") or [128, 128]
        return Granularity.BLOCK, int(structure[-1])
    if strategy in ("group", "tensor_group"):
        return Granularity.GROUP, size
    return strategy, None


def _scale(said: Mapping[str, Any], layout: str) -> str:
    if said.get("strategy") == "tensor_group":
        return "e4m3"
    if "uint8" in str(said.get("scale_dtype")) or layout.startswith("mxfp"):
        return "e8m0"
    return "float"


def private_section(rows: Iterable[tuple[str, PlanRow]]) -> dict[str, Any]:
    """The section of our own for what the configuration cannot say; empty where there is nothing.

    Args:
        rows: Rows of a plan, each with what the configuration calls its layer.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows:
        for side, spec in ((_INPUT, row.activations), (_OUTPUT, row.outputs)):
            if spec is not None and (row.stored_dense or not _says_all(spec)):
                found.setdefault(name, {})[side] = spec.to_dict()
    return {PRIVATE_KEY: {"activations": found}} if found else {}


def read_private(
    config: Mapping[str, Any],
) -> dict[str, tuple[NumberSpec | None, NumberSpec | None]]:
    """Formats of inputs and outputs that only our section declares, by the layer's name.

    Args:
        config: The content of ``config.json``.

    Raises:
        FormatError: An entry is no number format.
    """
    section = (config.get(PRIVATE_KEY) or {}).get("activations") or {}

    def side(entry: Mapping[str, Any], key: str) -> NumberSpec | None:
        return NumberSpec.from_dict(entry[key]) if key in entry else None

    return {name: (side(entry, _INPUT), side(entry, _OUTPUT)) for name, entry in section.items()}


def _says_all(spec: NumberSpec) -> bool:
    """Whether a reader of the configuration quantizes exactly as we do."""
    return is_declarable(spec) and not (spec.dynamic and spec.scale.startswith("e8m0-"))
