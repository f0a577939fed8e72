"""A checkpoint as GGUF files: the language model in GGML's block types, and the vision tower.

Codes stay as they are (:mod:`.ggml_blocks` says how that is possible). Of what is not quantized,
the language model keeps the source's dtype; the tower's matrices are float16, as llama.cpp wants
them; norms and biases are float32 in both. A model of text alone is one file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor

from prismquant.errors import FormatError, ModelError, NumericsError
from prismquant.export.compressed_tensors.reader import StoredLayer
from prismquant.export.compressed_tensors.stored import StoredCheckpoint
from prismquant.export.exporter import Progress, Refusal
from prismquant.export.gguf import metadata
from prismquant.export.gguf.ggml_blocks import BLOCK, BYTES, block_type, pack, why_not
from prismquant.export.gguf.language_models import (
    impossible,
    remarks_of,
    rope_factors,
    text_config,
    write_language,
)
from prismquant.export.gguf.llama_cpp_names import Part, parts
from prismquant.export.gguf.vocabulary import read_vocabulary
from prismquant.export.packed_integers import scale_refusal
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.models.arch_files import known_archs
from prismquant.models.config import native_config
from prismquant.models.reader_names import GgufNames
from prismquant.storage import atomic_path

# The projector whose tower looks at windows.
_WINDOWED = "QWEN25VL"
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}


@dataclass(frozen=True)
class _GgufTensor:
    """One tensor of a file: what it is called there, its type, and where it comes from.

    ``turned`` is the number of heads whose rows stand in pairs there, ``offset`` what is added to
    its values; ``values`` are those of a tensor that the source does not have.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    layer: StoredLayer | None
    source: str
    part: Part
    turned: int = 0
    offset: float = 0.0
    values: Tensor | None = None


@dataclass(frozen=True)
class GGUF:
    """Write GGUF files."""

    name: ClassVar[str] = "gguf"
    drops_inputs: ClassVar[str] = "asked"
    needs_quantized: ClassVar[bool] = False

    def refusals(self, source: StoredCheckpoint) -> list[Refusal]:
        """Layers that no block type holds, and tensors that llama.cpp has no place for.

        Raises:
            FormatError: No names of llama.cpp for the family are known, or the tower has a shape
                that it cannot be told.
            ModelError: The gguf package is missing.
        """
        _gguf()
        config, names = _config(source), _names(source)
        if names.projector == _WINDOWED:
            metadata.window_pattern(config.vision_config)
        if names.projector == "":
            _require_possible(source, names.architecture, config)
        refused = [_refusal(source, layer) for layer in source.layers]
        unknown = [
            Refusal(name, "llama.cpp has no place for this tensor")
            for layer, name in source.walk()
            if _parts(source, config, name) is None
        ]
        return [item for item in refused if item is not None] + unknown

    def remarks(self, source: StoredCheckpoint) -> list[str]:
        """Parts of the model that the files lack."""
        config = _config(source)
        remarks = []
        text = text_config(config)
        if read_vocabulary(source.folder, text.vocab_size, text) is None:
            remarks.append(
                "the tokenizer is none that llama.cpp has: the file has no vocabulary and takes "
                "token ids only"
            )
        if _names(source).projector == "":
            return remarks + remarks_of(_names(source).architecture, text)
        window = getattr(config.vision_config, "window_size", metadata.WINDOW)
        if window != metadata.WINDOW:
            remarks.append(
                f"llama.cpp assumes windows of {metadata.WINDOW} pixels in the vision tower, not "
                f"{window}"
            )
        return remarks

    def write(self, source: StoredCheckpoint, out: Path, progress: Progress) -> None:
        """Write ``mmproj-F16.gguf``, if it sees, and ``model-TYPE.gguf``, in this order."""
        config = _config(source)
        names = _names(source)
        library = _gguf()
        text, vision = _pieces(source, config)
        count = _Counter(progress, len(text) + len(vision))
        if names.projector:
            writer = library.GGUFWriter(None, "clip")
            kind = getattr(library.VisionProjectorType, names.projector)
            name = source.folder.resolve().name
            file_type = int(library.LlamaFileType.MOSTLY_F16)
            metadata.write_vision(writer, config, source.folder, kind, name, file_type)
            _write_file(writer, out / "mmproj-F16.gguf", vision, source, count)
        architecture = library.MODEL_ARCH[names.architecture]
        writer = library.GGUFWriter(None, library.MODEL_ARCH_NAMES[architecture])
        common = _common_type(text)
        name = _FILE_TYPES.get(common, f"MOSTLY_{common}")
        metadata.write_text(writer, config, name, int(getattr(library.LlamaFileType, name)))
        own = text_config(config)
        if not names.projector:
            write_language(writer, library, names.architecture, own)
        vocabulary = read_vocabulary(source.folder, own.vocab_size, own)
        metadata.write_vocabulary(writer, vocabulary, own.vocab_size)
        _write_file(writer, out / f"model-{common}.gguf", text, source, count)


class _Counter:
    """Counts tensors over both files."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, name: str) -> None:
        self._progress(self._done, self._total, name)
        self._done += 1


def _refusal(source: StoredCheckpoint, layer: StoredLayer) -> Refusal | None:
    if layer.rotation is not None:
        return Refusal(layer.name, "its input is rotated at run time, which llama.cpp cannot do")
    if layer.scheme is None:
        return None
    why = why_not(layer.scheme.weights, layer.shape[1])
    if why is not None:
        return Refusal(layer.name, why)
    if source.splits(layer):
        return Refusal(layer.name, "single columns of it stay in floating point")
    if source.reorders(layer):
        return Refusal(layer.name, "its groups are of columns that are no neighbours")
    # Exponents of MXFP4 are stored as they are.
    return scale_refusal(source, layer) if layer.scheme.weights.kind == "int" else None


def _config(source: StoredCheckpoint) -> Any:
    _names(source)
    return native_config(source.arch, source.folder)


def _names(source: StoredCheckpoint) -> GgufNames:
    if source.arch.gguf is None:
        titles = sorted(arch.title for arch in known_archs().values() if arch.gguf is not None)
        raise FormatError(
            f"a {source.arch.title} is not written as GGUF: no names of llama.cpp for it are known",
            where=str(source.folder),
            remedy="choose another --format, such as dense; GGUF files are written for "
            f"{', '.join(titles[:-1])} and {titles[-1]}",
        )
    return source.arch.gguf


def _require_possible(source: StoredCheckpoint, architecture: str, config: Any) -> None:
    found = impossible(architecture, config)
    if found:
        raise FormatError(
            f"llama.cpp cannot be told of this {source.arch.title}: {'; '.join(found)}",
            where=str(source.folder),
            remedy="choose another --format, such as dense",
        )


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            "the gguf package is missing", remedy="pip install 'prismquant[gguf]'"
        ) from error
    module: ModuleType = gguf
    return module


def _parts(source: StoredCheckpoint, config: Any, name: str) -> tuple[bool, list[Part]] | None:
    if not source.names.knows(name):
        return None
    vision = getattr(config, "vision_config", None)
    levels = tuple(getattr(vision, "deepstack_visual_indexes", ()))
    return parts(_names(source), source.names.to_module(name), levels)


def _pieces(source: StoredCheckpoint, config: Any) -> tuple[list[_GgufTensor], list[_GgufTensor]]:
    """The tensors of the language model's file, and of the vision tower's."""
    names, text = _names(source), text_config(config)
    files: tuple[list[_GgufTensor], list[_GgufTensor]] = ([], [])
    if (factors := None if names.projector else rope_factors(text)) is not None:
        part = Part("ROPE_FREQS", None, "weight")
        shape = tuple(factors.shape)
        files[0].append(_GgufTensor(_title(part), shape, "F32", None, "", part, values=factors))
    tied = source.tied
    for layer, name in source.walk():
        found = _parts(source, config, name)
        if found is None or (tied and found[1][0].tensor == "OUTPUT"):
            continue
        vision, own = found
        shape = layer.shape if layer is not None else source.shards.info(name).shape
        kind = _type(source, layer, name, own[0], vision=vision)
        for part in own:
            cut = _cut_shape(shape, part)
            files[vision].append(
                _GgufTensor(
                    *(_title(part), cut, kind, layer, name, part),
                    turned=_heads(text, part) if names.rotary_pairs else 0,
                    offset=1.0 if names.norms_from_one and _is_norm(part) else 0.0,
                )
            )
    return files


def _heads(config: Any, part: Part) -> int:
    """Heads of a query's or key's rows; 0 of other tensors."""
    heads = {"ATTN_Q": "num_attention_heads", "ATTN_K": "num_key_value_heads"}
    return int(getattr(config, heads[part.tensor])) if part.tensor in heads else 0


def _is_norm(part: Part) -> bool:
    return part.tensor.endswith("_NORM") and part.suffix == "weight"


def _title(part: Part) -> str:
    library = _gguf()
    base: str = library.TENSOR_NAMES[library.MODEL_TENSOR[part.tensor]]
    return f"{base.format(bid=part.block)}.{part.suffix}"


def _type(
    source: StoredCheckpoint, layer: StoredLayer | None, name: str, part: Part, *, vision: bool
) -> str:
    if layer is not None and layer.scheme is not None:
        return block_type(layer.scheme.weights, partial(source.codes, layer))
    info = source.shards.info(name)
    if len(info.shape) < 2 or part.tensor == "V_ENC_EMBD_POS" or info.dtype not in _FLOATS:
        return "F32"
    return "F16" if vision else _FLOATS[info.dtype]


def _cut_shape(shape: Sequence[int], part: Part) -> tuple[int, ...]:
    if part.tensor == "V_ENC_EMBD_PATCH" and part.suffix.startswith("weight"):
        # A convolution over two frames is one over each, added up.
        return (*shape[:2], *shape[3:])
    return (shape[0] // part.count, *shape[1:])


def _common_type(pieces: Sequence[_GgufTensor]) -> str:
    quantized = Counter(piece.type for piece in pieces if piece.type in BYTES)
    floats = Counter(piece.type for piece in pieces if len(piece.shape) > 1)
    return (quantized or floats).most_common(1)[0][0]


def _write_file(
    writer: Any,
    path: Path,
    pieces: Sequence[_GgufTensor],
    source: StoredCheckpoint,
    count: _Counter,
) -> None:
    library = _gguf()
    for piece in pieces:
        shape = (*piece.shape[:-1], _bytes_of_row(piece))
        kind = library.GGMLQuantizationType[piece.type]
        dtype = numpy.dtype(numpy.uint8)
        writer.add_tensor_info(piece.name, shape, dtype, math.prod(shape), raw_dtype=kind)
    with atomic_path(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece, data in _data(pieces, source, count):
            if data.numel() != math.prod(piece.shape[:-1]) * _bytes_of_row(piece):
                raise FormatError(f"{piece.name} has another size than announced")
            writer.write_tensor_data(data.contiguous().view(-1).numpy())
        writer.close()


def _data(
    pieces: Sequence[_GgufTensor], source: StoredCheckpoint, count: _Counter
) -> Iterator[tuple[_GgufTensor, Tensor]]:
    """The bytes of every tensor, in order; what several are cut from is read once."""
    last, whole = "", None
    for piece in pieces:
        count(piece.name)
        if piece.values is not None:
            yield piece, piece.values.view(torch.uint8)
            continue
        if piece.source != last or whole is None:
            last = piece.source
            layer = piece.layer
            coded = layer if layer is not None and layer.scheme is not None else None
            whole = source.codes(coded) if coded else source.shards.read(piece.source)
        yield piece, _bytes(piece, whole)


def _bytes(piece: _GgufTensor, whole: QuantizedTensor | Tensor) -> Tensor:
    """One piece, as uint8."""
    if isinstance(whole, QuantizedTensor):
        packed = pack(whole, piece.type)
        return _in_pairs(packed.chunk(piece.part.count)[piece.part.index], piece.turned)
    if len(piece.shape) == whole.ndim - 1:
        cut = whole[:, :, piece.part.index]
    else:
        cut = whole.chunk(piece.part.count)[piece.part.index]
    dtype = next(dtype for dtype, name in _FLOATS.items() if name == piece.type)
    values = cut.to(dtype) + piece.offset if piece.offset else cut.to(dtype)
    values = _in_pairs(values, piece.turned).contiguous()
    if not bool(values.isfinite().all()):
        raise NumericsError(f"a value does not fit {piece.type}", where=piece.source)
    return values.view(torch.uint8)


def _in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head so that those half a head apart are neighbours; 0 heads: as they are."""
    if not heads:
        return rows
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _bytes_of_row(piece: _GgufTensor) -> int:
    if piece.type in BYTES:
        return piece.shape[-1] // BLOCK * BYTES[piece.type]
    return piece.shape[-1] * _SIZES[piece.type]
