"""Readers that run here: PrismQuant, transformers, the gguf package, and ModelOpt's formula."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.matrix.cells import TOLERANCE, Cell, compared, stopped
from prismquant.algorithms.problem import LayerProblem
from prismquant.algorithms.rtn import RTN
from prismquant.data import read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.export.load_quantized import load_model
from prismquant.formats.quantized_layer import KVScales
from prismquant.models.attention import quantize_cache
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.models.config import import_transformers
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.opening import read_json
from prismquant.plan.bit_layout import DENSE
from prismquant.plan.plan import Plan, PlanRow, problem_groups
from prismquant.runtime.linear import quantize_inputs
from prismquant.shards import INDEX_NAME, ShardReader

# An input on the edge between two codes may fall either way; share of what rounding changed.
TIES = 0.1
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Source:
    """A float checkpoint, its samples, and its logits."""

    def __init__(self, family: str, folder: Path, data: Path) -> None:
        self.family = family
        self.folder = folder
        self.bound: BoundModel = bind(folder)
        self.batches: list[Batch] = list(
            make_batches(
                read_samples(data),
                load_processor(folder),
                batch_size=8,
                vision_token_ids=self.bound.vision_token_ids,
            )
        )
        self.shards = ShardReader(folder)
        self.logits = self.run(load_float(folder, torch.float32))

    def run(self, model: nn.Module) -> Tensor:
        """Logits [tokens, vocabulary] of all counted tokens."""
        found = []
        for batch in self.batches:
            with torch.no_grad():
                result = model(**batch.inputs, use_cache=False).logits
            found.append(result[batch.inputs["attention_mask"].bool()].float())
        return torch.cat(found)

    def weight(self, row: PlanRow) -> Tensor:
        """The weight of a layer, float32 [out, in]."""
        stored = self.shards.read(f"{row.site.disk_name}.weight").float()
        return stored.reshape(row.site.out_features, row.site.in_features)


def simulated(source: Source, plan: Plan, folder: Path) -> nn.Module:
    """The model that a plan means, put together without reading the checkpoint's configuration.

    Weights are rounded here from the source's; only static scales, which come from calibration, are
    taken from the checkpoint.
    """
    model, shards = load_float(source.folder, torch.float32), ShardReader(folder)
    for rows in problem_groups(plan.quantized):
        first = rows[0]
        # Rows of the plan that are quantized have a format.
        assert first.config.weights is not None
        problem = LayerProblem(
            tuple(row.site.name for row in rows),
            tuple(source.weight(row) for row in rows),
            first.config.weights,
            first.config.weight_range,
            source.bound.dtype,
        )
        for row, q in zip(rows, RTN().solve(problem).weights, strict=True):
            values = q.dequantize(torch.float32)
            if row.layout == DENSE:
                values = values.to(source.bound.dtype).float()
            target = model.get_submodule(row.site.name).get_parameter("weight")
            target.data.copy_(values.reshape(target.shape))
    for row in plan.quantized:
        if row.config.activations is not None:
            scales = [f"{row.site.disk_name}.input_{part}" for part in ("scale", "zero_point")]
            if row.config.activations.scale == "e4m3":
                scales[0] = f"{row.site.disk_name}.input_global_scale"
            stored = [shards.read(name) if name in shards.names else None for name in scales]
            quantize_inputs(model, row.site.name, row.config.activations, *stored)
    if plan.kv_cache is not None:
        for layer in plan.kv_cache.layers:
            names = [source.bound.names.to_disk(name) for name in layer.tensors]
            scales_of = KVScales(*(shards.read(name) for name in names))
            quantize_cache(model, layer.attention, plan.kv_cache.spec, scales_of)
    return model


def own(source: Source, plan: Plan, folder: Path) -> tuple[Cell, nn.Module, Tensor]:
    """``prismquant.load`` against the simulation: weights and logits to the last bit.

    Returns:
        The cell, the loaded model, and its logits.
    """
    model, expected = load_model(folder, dtype=torch.float32), simulated(source, plan, folder)
    apart = _apart(dict(expected.named_parameters()), dict(model.named_parameters()))
    actual = source.run(model)
    apart = max(apart, _largest(actual - source.run(expected)))
    if _share(actual - source.logits, source.logits) < 1e-4:
        return Cell("differs", "nothing was quantized", 0.0), model, actual
    return compared("weights and logits, the simulation's", apart), model, actual


def sizes(plan: Plan, folder: Path) -> Cell:
    """Bytes on disk against the plan's: of every layer, of all tensors, and in the index."""
    shards = ShardReader(folder)
    written = {name: shards.info(name).nbytes for name in shards.names}
    apart = abs(sum(written.values()) - plan.total_bytes)
    apart += abs(read_json(folder / INDEX_NAME)["metadata"]["total_size"] - plan.total_bytes)
    for row in plan.rows:
        prefix = f"{row.site.disk_name}."
        parts = {n.removeprefix(prefix): b for n, b in written.items() if n.startswith(prefix)}
        parts.pop("bias", None)
        apart += abs(sum(parts.values()) - row.stored_bytes)
    return compared("bytes of every layer and in all, the plan's", apart)


def transformers(source: Source, folder: Path, ours: Tensor) -> Cell:
    """transformers with the installed compressed-tensors: its logits, and ours."""
    with _quietly():
        auto = import_transformers().AutoModelForImageTextToText
        model: Any = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        model.eval()
        # The library decompresses on the first pass, MX weights to bfloat16 whatever the model's
        # dtype; their values are exact in it.
        with contextlib.suppress(RuntimeError):
            source.run(model)
        # The wrapper's own `float` refuses.
        model = nn.Module.float(model)
        cell = _logits(source, source.run(model), ours)
        if (cell.apart or 0.0) <= TOLERANCE:
            return cell
        with _one_scale_a_token():
            mended = _logits(source, source.run(model), ours)
    if mended.verdict == "ran" and (mended.apart or 0.0) < (cell.apart or 0.0) / 10:
        why = "one scale for a whole matrix in vision towers; given a leading axis, logits are ours"
        return Cell("foretold", f"compressed-tensors takes {why}", cell.apart)
    return cell


def _logits(source: Source, theirs: Tensor, ours: Tensor) -> Cell:
    difference = theirs - ours
    apart = _largest(difference) / _largest(ours)
    share = _norm(difference) / _norm(ours - source.logits)
    if apart > TOLERANCE and share < TIES:
        return Cell("ran", "logits, all but ties", apart)
    what = "logits" if apart <= TOLERANCE else f"logits, by {share:.0%} of what rounding changes"
    return compared(what, apart, TOLERANCE)


@contextlib.contextmanager
def _one_scale_a_token() -> Iterator[None]:
    """Within, compressed-tensors does for matrices what it does for batches of them."""
    from compressed_tensors.quantization.lifecycle import forward as lifecycle

    original = lifecycle.compute_dynamic_scales_and_zp

    def per_token(value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if value.ndim != 2:
            return original(value, *args, **kwargs)
        scale, zero_point = original(value[None], *args, **kwargs)
        return scale[0], zero_point[0]

    lifecycle.compute_dynamic_scales_and_zp = per_token
    try:
        yield
    finally:
        lifecycle.compute_dynamic_scales_and_zp = original


def dense(folder: Path, model: nn.Module) -> Cell:
    """Weights of the dense export in transformers, and ours."""
    read = load_float(folder, torch.float32)
    apart = _apart(dict(model.named_parameters()), dict(read.named_parameters()))
    return compared("weights", apart)


def gguf(source: Source, plan: Plan, folder: Path, model: nn.Module) -> Cell:
    """Weights of the language model by the gguf package's own reader and arithmetic."""
    import gguf as package

    (file,) = folder.glob("model-*.gguf")
    reader = package.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    arch = "QWEN3VL" if source.family == "qwen3_vl" else "QWEN2VL"
    table = package.get_tensor_name_map(package.MODEL_ARCH[arch], 8)
    apart, kinds = 0.0, set()
    for row in plan.quantized:
        if not row.site.name.startswith("model.language_model."):
            continue
        short = row.site.name.replace("model.language_model.", "model.")
        tensor = tensors[f"{table.get_name(short)}.weight"]
        values = torch.from_numpy(package.quants.dequantize(tensor.data, tensor.tensor_type))
        expected = model.get_submodule(row.site.name).get_parameter("weight")
        apart = max(apart, _largest(values.reshape(expected.shape) - expected))
        kinds.add(tensor.tensor_type.name)
    return compared(f"weights, {' and '.join(sorted(kinds))}", apart)


def modelopt(source: Source, plan: Plan, folder: Path, model: nn.Module) -> Cell:
    """Weights by ModelOpt's formula, ``weight * weight_scale * weight_scale_2``."""
    shards, apart = ShardReader(folder), 0.0
    for row in plan.quantized:
        prefix = f"{row.site.disk_name}."
        names = [n for n in shards.names if n.startswith(prefix)]
        values = by_formula({n.removeprefix(prefix): shards.read(n) for n in names})
        expected = model.get_submodule(row.site.name).get_parameter("weight")
        apart = max(apart, _largest(values.reshape(expected.shape) - expected))
    return compared("weights, by ModelOpt's formula", apart)


def attempted(read: Any, *given: Any) -> Cell:
    """A reader's cell; that it stopped, where it does."""
    try:
        cell: Cell = read(*given)
    except Exception as error:
        return stopped(f"{type(error).__name__}: {error}")
    return cell


def by_formula(stored: Mapping[str, Tensor]) -> Tensor:
    weight, scale = stored["weight"], stored.get("weight_scale")
    if scale is None:
        return weight.float()
    if weight.dtype == torch.uint8:
        table = torch.tensor([*_FP4, *(-value for value in _FP4)])
        nibbles = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1)
        factor = scale.float() * stored["weight_scale_2"]
        return table[nibbles.int()] * factor.repeat_interleave(16, dim=1)
    if scale.dtype == torch.uint8:
        factor = torch.ldexp(torch.ones(scale.shape), scale.int() - 127)
        return weight.float() * factor.repeat_interleave(32, dim=1)
    if scale.ndim == 4:
        blocks = scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return weight.float() * blocks[: len(weight)]
    return weight.float() * (scale[:, None] if scale.ndim else scale)


def _apart(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> float:
    if expected.keys() != actual.keys():
        return float("nan")
    return max(_largest(value.float() - actual[name].float()) for name, value in expected.items())


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _norm(x: Tensor) -> float:
    return float(x.norm())


def _share(difference: Tensor, whole: Tensor) -> float:
    return _norm(difference) / _norm(whole)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Within, nothing is told of bars and of what is known."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
