"""Checkpoints whose codes lie in words of 32 bits: the GPTQ and the AWQ layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from prismquant.errors import FormatError
from prismquant.headers import TensorInfo
from prismquant.sources.source_headers import SourceHeaders
from prismquant.sources.source_weight import AWQWeight, GPTQWeight, SourceWeight

_PARTS = ("qweight", "qzeros", "scales")
_GPTQ_VERSIONS = {"gptq": True, "gptq_v2": False}
_ELSEWHERE = "convert it to checkpoint_format gptq with the tool that wrote it"


def gptq_weights(source: SourceHeaders) -> Iterator[tuple[str, SourceWeight]]:
    """Weights in the GPTQ layout, by the name that they have in floating point.

    Raises:
        FormatError: The configuration names another layout, or tensors are not of this one.
    """
    section, infos = source.section, source.infos
    version = section.get("checkpoint_format") or "gptq"
    if version not in _GPTQ_VERSIONS or section.get("is_marlin_format"):
        raise FormatError(
            f"GPTQ weights of checkpoint_format {version!r} cannot be read",
            where="quantization_config",
            remedy=_ELSEWHERE,
        )
    bits = section.get("bits")
    for prefix in _prefixes(infos):
        parts, words = _parts(prefix, source), infos[f"{prefix}.qweight"].shape
        groups = infos[parts["scales"]].shape[0]
        if f"{prefix}.g_idx" in infos:
            parts["g_idx"] = f"{prefix}.g_idx"
            columns = infos[parts["g_idx"]].shape[0]
        else:
            columns = words[0] * 32 // (bits if isinstance(bits, int) and bits > 0 else 4)
        width = words[0] * 32 // max(1, columns)
        form = f"int{width} {_unit(columns, groups)}"
        shape = (words[1], columns)
        zeros = (groups, -(-shape[0] * width // 32))
        _require(parts["scales"], (groups, shape[0]), shape, source)
        _require(parts["qzeros"], zeros, shape, source)
        yield f"{prefix}.weight", GPTQWeight(shape, parts, form, _GPTQ_VERSIONS[version])


def awq_weights(source: SourceHeaders) -> Iterator[tuple[str, SourceWeight]]:
    """Weights in the AWQ layout, by the name that they have in floating point.

    Raises:
        FormatError: The configuration names another layout, or tensors are not of this one.
    """
    section, infos = source.section, source.infos
    version = str(section.get("version") or "gemm").lower()
    bits = section.get("bits", section.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise FormatError(
            f"AWQ weights of {bits} bits in version {version!r} cannot be read",
            where="quantization_config",
            remedy="use a checkpoint of version gemm, or the unquantized one",
        )
    for prefix in _prefixes(infos):
        parts = _parts(prefix, source)
        columns, rows = infos[parts["qweight"]].shape[0], infos[parts["scales"]].shape[1]
        groups, words = infos[parts["scales"]].shape[0], -(-rows // 8)
        if not groups or columns % groups:
            raise FormatError(
                f"{groups} groups of scales do not fit {columns} inputs",
                where=source.place(parts["scales"]),
                remedy=source.copy_again(parts["scales"]),
            )
        _require(parts["qweight"], (columns, words), (rows, columns), source)
        _require(parts["qzeros"], (groups, words), (rows, columns), source)
        form = f"int4 {_unit(columns, groups)}"
        yield f"{prefix}.weight", AWQWeight((rows, columns), parts, form)


def _prefixes(infos: Mapping[str, TensorInfo]) -> list[str]:
    return [name.removesuffix(".qweight") for name in infos if name.endswith(".qweight")]


def _require(
    name: str, wanted: tuple[int, ...], shape: tuple[int, int], source: SourceHeaders
) -> None:
    """Refuse a tensor of another shape than a weight needs."""
    found = source.infos[name].shape
    if found != wanted:
        raise FormatError(
            f"{list(found)} numbers do not fit a weight {list(shape)}, which has {list(wanted)}",
            where=source.place(name),
            remedy=source.copy_again(name),
        )


def _parts(prefix: str, source: SourceHeaders) -> dict[str, str]:
    """The tensors of a weight, by what they are.

    Raises:
        FormatError: One is missing, or no matrix of its kind; or the weight is there in floating
            point, too.
    """
    infos, coded = source.infos, f"{prefix}.qweight"
    if f"{prefix}.weight" in infos:
        raise FormatError(
            f"a weight is there twice: in codes, and as {prefix}.weight; readers disagree which "
            "one counts",
            where=source.place(f"{prefix}.weight"),
            remedy="delete the file that does not belong to this checkpoint; or "
            + source.copy_again(coded),
        )
    parts = {part: f"{prefix}.{part}" for part in _PARTS}
    for part, name in parts.items():
        if name not in infos:
            raise FormatError(
                f"a quantized weight has no {part}: {name} is missing",
                where=source.place(coded),
                remedy=source.copy_again(coded),
            )
        info, floating = infos[name], part == "scales"
        if len(info.shape) != 2 or (info.dtype is not torch.int32) != floating:
            raise FormatError(
                f"{part} is {info.dtype} {list(info.shape)}, which no known layout has",
                where=source.place(name),
                remedy=_ELSEWHERE,
            )
    return parts


def _unit(columns: int, groups: int) -> str:
    return "with a scale a row" if groups == 1 else f"in groups of {-(-columns // groups)}"
