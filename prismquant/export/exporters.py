"""Formats to export to, by name, and the export itself.

A format is one module and one line in :data:`EXPORTERS`; see
:class:`prismquant.export.exporter.Exporter` for what it must provide.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prismquant.errors import FormatError, StorageError, suggest
from prismquant.export.companions import links_remark
from prismquant.export.compressed_tensors.kv_section import require_cache_scale
from prismquant.export.compressed_tensors.stored import StoredCheckpoint, open_checkpoint
from prismquant.export.exporter import Exporter, Progress, Refusal, check
from prismquant.export.staging import staged
from prismquant.storage import write_json
from prismquant.version import __version__

# Name -> module and class; a module is imported only when its format is asked for.
EXPORTERS: Mapping[str, str] = MappingProxyType(
    {
        "dense": "prismquant.export.dense:Dense",
        "compressed-tensors": "prismquant.export.unchanged:CompressedTensors",
        "gptq": "prismquant.export.gptq_layout:GPTQExporter",
        "awq": "prismquant.export.awq_layout:AWQExporter",
        "modelopt": "prismquant.export.modelopt_layout:ModelOpt",
        "gguf": "prismquant.export.gguf.gguf_checkpoint:GGUF",
    }
)
RECORD = Path("prismquant") / "export.json"


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        folder: Where it is.
        format: Its format.
        layers: How many quantized layers it holds, or held before they were dequantized.
        bytes: Of all its files.
        remarks: What a user should know of it.
    """

    folder: Path
    format: str
    layers: int
    bytes: int
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "out": str(self.folder),
            "format": self.format,
            "layers": self.layers,
            "bytes": self.bytes,
            "remarks": list(self.remarks),
        }


def build_exporter(name: str, options: Mapping[str, Any] | None = None) -> Exporter:
    """The exporter of that name.

    Args:
        name: A key of :data:`EXPORTERS`.
        options: Its options.

    Raises:
        FormatError: There is no such format, or it has no such option.
    """
    if name not in EXPORTERS:
        raise FormatError(
            f"there is no export format {name!r}", remedy=suggest(name, list(EXPORTERS))
        )
    module, _, attribute = EXPORTERS[name].partition(":")
    cls: Any = getattr(importlib.import_module(module), attribute)
    known = {field.name for field in fields(cls)}
    for key in options or {}:
        if key not in known:
            raise FormatError(
                f"the export format {name!r} has no option {key!r}",
                remedy=suggest(key, known) if known else "leave it out",
            )
    exporter: Exporter = cls(**(options or {}))
    return exporter


def export_checkpoint(
    folder: Path,
    exporter: Exporter,
    out: Path,
    *,
    weights_only: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a checkpoint in another format, without choosing any code again.

    Args:
        folder: A finished run, or another checkpoint in the compressed-tensors format.
        exporter: From :func:`build_exporter`.
        out: The result's folder; must not exist or be empty.
        weights_only: Agree that quantized inputs, outputs and caches are dropped where the format
            cannot say them.
        progress: Called as the work goes on.

    Raises:
        PrismQuantError: The checkpoint cannot be read, the folder is in use, or the format cannot
            hold a layer; the message lists all such layers. Nothing was written then.
    """
    source = open_checkpoint(folder)
    _refuse_inside(source, out)
    something = any(not layer.is_plain for layer in source.layers) or source.has_cache_scales
    if exporter.needs_quantized and not something:
        raise FormatError(
            "the checkpoint is not quantized",
            where=str(folder),
            remedy="export a folder that `prismquant quantize` wrote; gguf takes float models too",
        )
    check(exporter.name, source, _refusals(source, exporter, weights_only=weights_only))
    _require_static_scales(source)
    links = links_remark(source.folder)
    remarks = (*_dropped(source, exporter), *exporter.remarks(source), *links)
    with staged(out) as place:
        write_json(
            place / RECORD,
            {
                "format": exporter.name,
                "prismquant": __version__,
                "source": str(folder),
                "source_quantization": source.config.get("quantization_config"),
                "quantized_layers": len(source.quantized),
                "remarks": list(remarks),
            },
        )
        exporter.write(source, place, progress or (lambda done, total, name: None))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Exported(out, exporter.name, len(source.quantized), size, remarks)


def _refusals(source: StoredCheckpoint, exporter: Exporter, *, weights_only: bool) -> list[Refusal]:
    refusals = exporter.refusals(source)
    if exporter.drops_inputs == "asked" and not weights_only:
        why = (
            "its input or output is quantized, which the format cannot say (--weights-only drops "
            "that and keeps the weights)"
        )
        refusals += [Refusal(layer.name, why) for layer in source.simulated]
        if source.has_cache_scales:
            why = "the key-value cache is quantized, which the format cannot say (--weights-only)"
            refusals.append(Refusal("kv_cache_scheme", why))
    return refusals


def _dropped(source: StoredCheckpoint, exporter: Exporter) -> list[str]:
    if exporter.drops_inputs == "never":
        return []
    count = len(source.simulated)
    lines = [f"the inputs or outputs of {count} layers are quantized no more"] if count else []
    return lines + ["the key-value cache is quantized no more"] * source.has_cache_scales


def _require_static_scales(source: StoredCheckpoint) -> None:
    """Make sure that what calibration found is numbers, also where a format has no use for it.

    Raises:
        FormatError, NumericsError: A scale or a zero point is none.
    """
    for layer in source.simulated:
        for side in ("input", "output"):
            source.static_scale(layer, side)
    for name in sorted(source.shards.names) if source.has_cache_scales else ():
        if name.endswith((".k_scale", ".v_scale")):
            require_cache_scale(name, source.shards.read(name))


def _refuse_inside(source: StoredCheckpoint, out: Path) -> None:
    if out.resolve().is_relative_to(source.folder.resolve()):
        raise StorageError(
            "the output folder is the source's, or lies in it",
            where=str(out),
            remedy="choose another --out",
        )
