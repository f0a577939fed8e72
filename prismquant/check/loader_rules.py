"""Rules about what ``prismquant.load``, and so ``eval`` and ``export``, make of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from prismquant.check import modelopt_rules as modelopt
from prismquant.check import packed_int_rules as packed_int
from prismquant.check.checkpoint import COMPRESSED_TENSORS, GGUF, Checkpoint
from prismquant.check.findings import Problem, gathered
from prismquant.check.target_reader import TargetReader
from prismquant.errors import FormatError, shortened
from prismquant.export.compressed_tensors.expected import layer_faults_of
from prismquant.export.compressed_tensors.stored import Linear, is_leftover, read_layers


def unread(checkpoint: Checkpoint) -> list[Problem]:
    """Formats that are well formed, and yet nothing that PrismQuant reads."""
    model = checkpoint.model
    if model is None or checkpoint.read.faults or checkpoint.method not in ("", COMPRESSED_TENSORS):
        return []
    linears = {
        layer.called: Linear(layer.name, layer.disk, (layer.out_features, layer.in_features))
        for layer in checkpoint.layers
    }
    try:
        layers = read_layers(checkpoint.config, checkpoint.read, linears, model.arch)
    except FormatError as error:
        return [Problem(error.what, (error.where or "config.json",), error.remedy or "")]
    known = {(fault.what, fault.where) for fault in checkpoint.faults}
    return gathered(
        (fault.what, fault.where, fault.remedy)
        for fault in layer_faults_of(layers, checkpoint.tensors)
        if (fault.what, fault.where) not in known
    )


def other_method(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Methods of other tools: those that have rules, for whoever asks what PrismQuant reads."""
    fine = {"", COMPRESSED_TENSORS, GGUF}
    if checkpoint.target is not TargetReader.PRISMQUANT:
        fine |= {*modelopt.METHODS, *packed_int.METHODS}
    if checkpoint.method not in fine and not is_leftover(checkpoint.folder, checkpoint.config):
        yield Problem(
            f"prismquant.load does not read quant_method {shortened(checkpoint.method)}",
            ("quant_method",),
            "delete quantization_config if the weights are in floating point; else export it as "
            "compressed-tensors with the tool that wrote it",
        )
