"""Rules about what vLLM 0.33 and transformers 5.24 really do with a scheme that they accept.

A reading of how vLLM chooses kernels, not a run on every GPU. SM75 is Turing, SM80 Ampere, SM89
Ada, SM90 Hopper, SM100 Blackwell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prismquant.check import vllm_view as vllm
from prismquant.check.checkpoint import Checkpoint
from prismquant.check.findings import Problem, gathered
from prismquant.check.target_reader import TargetReader
from prismquant.formats.section import (
    MXFP4,
    MXFP6,
    MXFP8,
    NVFP4,
    PACK,
    SchemeGroup,
)
from prismquant.models.arch import Modality

_ODD_BITS = (2, 3, 5, 6, 7)
_STRADDLING = (3, 5, 6, 7)
_W4A8_UNIT = 128


def no_scheme(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Groups that vLLM has no class for."""
    return _where(
        checkpoint,
        lambda group: vllm.scheme_class(group) is None and not vllm.lacks_inputs(group),
        "vLLM has no scheme for {group}",
        "choose another format for these layers; docs/formats.md says which run where",
    )


def w4a8_bytes(checkpoint: Checkpoint) -> Iterator[Problem]:
    """int4 weights with int8 inputs, a byte a code."""
    return _where(
        checkpoint,
        lambda group: vllm.scheme_class(group) == "CompressedTensorsW4A8Int",
        "no CUDA kernel of vLLM runs int4 weights in int8 bytes; those of ARM CPUs and XPUs do",
        "store them as pack-quantized",
    )


def w4a8_runs_w4a16(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Packed weights with int8 inputs."""
    return _where(
        checkpoint,
        lambda group: (
            vllm.scheme_class(group) == "CompressedTensorsWNA8Int"
            and group.weights is not None
            and group.weights.bits in (4, 8)
        ),
        "vLLM picks Machete or Marlin for {group} and silently leaves inputs in 16 bits",
        "start vLLM with --linear-backend humming, and look for the kernel in its log",
    )


def w4a8_channel(checkpoint: Checkpoint) -> Iterator[Problem]:
    """The same with a scale a channel, where the other way to int8 inputs is closed."""
    return _where(
        checkpoint,
        lambda group: (
            group.weights is not None
            and group.layout == PACK
            and (group.weights.type, group.weights.bits) == ("int", 4)
            and group.weights.strategy == "channel"
        ),
        "VLLM_MARLIN_INPUT_DTYPE=int8 crashes with a scale a channel",
        "use groups of 128 where Marlin is to quantize inputs to int8",
    )


def packed_int4_inputs(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Inputs of 4 bits."""
    return _where(
        checkpoint,
        lambda group: vllm.scheme_class(group) == "CompressedTensorsWNA4Int",
        "only the Humming kernel quantizes inputs to int4",
        "start vLLM with --linear-backend humming",
    )


def w4a8_fp8(checkpoint: Checkpoint) -> Iterator[Problem]:
    """int4 weights with FP8 inputs."""
    return _where(
        checkpoint,
        lambda group: vllm.is_w4a8_fp8(group),
        "int4 weights with FP8 inputs load on GPUs of exactly SM90 only",
        "use FP8 or W4A16 where other GPUs must load it",
    )


def w4a8_fp8_shape(checkpoint: Checkpoint) -> list[Problem]:
    """Shapes that their kernel cannot do; fused layers are one matrix to it."""
    rows: dict[str, int] = {}
    for layer in checkpoint.layers:
        whole = layer.fuse_key or layer.name
        rows[whole] = rows.get(whole, 0) + layer.out_features
    what = "int4 weights with FP8 inputs need groups of 128 and shapes that 128 divides"
    return gathered(
        (what, layer.called, "quantize these layers as FP8 or W4A16")
        for group, members in checkpoint.of_group()
        if vllm.is_w4a8_fp8(group) and group.weights is not None
        for layer in members
        if group.weights.group_size != _W4A8_UNIT
        or layer.in_features % _W4A8_UNIT
        or rows[layer.fuse_key or layer.name] % _W4A8_UNIT
    )


def asymmetric_bytes(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Asymmetric weights, a byte a code."""
    return _where(
        checkpoint,
        lambda group: (
            group.weights is not None
            and group.weights.type == "int"
            and not group.weights.symmetric
            and group.layout != PACK
        ),
        "vLLM has no asymmetric {group}",
        "use symmetric weights, or pack-quantized without quantized inputs",
    )


def ignored_outputs(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Quantized outputs, which vLLM knows together with static inputs only."""
    return _where(
        checkpoint,
        lambda group: (
            group.outputs is not None and vllm.scheme_class(group) != "CompressedTensorsWNA8O8Int"
        ),
        "vLLM leaves outputs in 16 bits: {group}",
        "harmless if inputs are what matters; it quantizes outputs of int8 per tensor with "
        "static int8 inputs only",
    )


def odd_bits(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Widths that one kernel has."""
    return _where(
        checkpoint,
        lambda group: _packed_bits(group) in _ODD_BITS,
        "of vLLM's kernels only Humming runs {group}, and it is a package of its own",
        "install humming beside vLLM, or use 4 or 8 bits, for which there are other kernels",
    )


def asymmetric_int8(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Asymmetric int8 weights whose inputs stay in floating point."""
    return _where(
        checkpoint,
        lambda group: (
            _packed_bits(group) == 8
            and group.inputs is None
            and group.weights is not None
            and not group.weights.symmetric
        ),
        "of vLLM's own kernels only Machete runs asymmetric int8 weights, on GPUs of exactly SM90",
        "use symmetric int8, or int4, where other GPUs must load it",
    )


def dense_stream(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Codes that straddle words."""
    return _where(
        checkpoint,
        lambda group: _packed_bits(group) in _STRADDLING,
        "codes of 3, 5, 6 or 7 bits straddle words: compressed-tensors before 0.18 misreads them",
        "use compressed-tensors >= 0.18 and vLLM >= 0.33",
    )


def fp8_gpus(checkpoint: Checkpoint) -> Iterator[Problem]:
    """FP8 with FP8 inputs."""
    return _where(
        checkpoint,
        lambda group: vllm.scheme_class(group) == "CompressedTensorsW8A8Fp8",
        "FP8 inputs need SM89 or newer; older GPUs run the weights with 16-bit inputs",
        "nothing to do on Ada, Hopper and Blackwell",
    )


def nvfp4_gpus(checkpoint: Checkpoint) -> Iterator[Problem]:
    """NVFP4."""
    return _where(
        checkpoint,
        lambda group: group.layout == NVFP4 and group.inputs is not None,
        "NVFP4 inputs need SM100 or newer; older GPUs run the weights with 16-bit inputs",
        "nothing to do on Blackwell",
    )


def mx_gpus(checkpoint: Checkpoint) -> Iterator[Problem]:
    """MXFP4 and MXFP8."""
    return _where(
        checkpoint,
        lambda group: group.layout in (MXFP4, MXFP8),
        "MX kernels need SM100 or newer; older GPUs run the weights with 16-bit inputs",
        "nothing to do on Blackwell",
    )


def mx_weight_only(checkpoint: Checkpoint) -> Iterator[Problem]:
    """MX weights with inputs in floating point, for which vLLM has no class of its own."""
    return _where(
        checkpoint,
        lambda group: group.layout in (MXFP4, MXFP8) and group.inputs is None,
        "vLLM quantizes the inputs too where the GPU can, although they are declared in 16 bits",
        "measure with the inputs' format as well",
    )


def mxfp6_vllm(checkpoint: Checkpoint) -> Iterator[Problem]:
    """MXFP6 in Hugging Face's libraries."""
    return _where(
        checkpoint,
        lambda group: group.layout == MXFP6,
        "mxfp6-pack-quantized needs a compressed-tensors newer than 0.18",
        "use MXFP8 or MXFP4 where it must load in older versions",
    )


def int8_blackwell(checkpoint: Checkpoint) -> Iterator[Problem]:
    """int8 with int8 inputs, on the newest GPUs."""
    return _where(
        checkpoint,
        lambda group: vllm.scheme_class(group) == "CompressedTensorsW8A8Int8",
        "int8 on SM100 is not verified: vLLM names its Cutlass kernel, which may lack it there",
        "use FP8 on Blackwell, or try it once",
    )


def asymmetric_in_transformers(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Packed asymmetric weights."""
    return _where(
        checkpoint,
        lambda group: (
            group.weights is not None and not group.weights.symmetric and group.layout == PACK
        ),
        "transformers with compressed-tensors 0.20 cannot load asymmetric pack-quantized weights",
        "load them with prismquant.load or vLLM, or use symmetric weights",
    )


def token_inputs_of_towers(checkpoint: Checkpoint) -> list[Problem]:
    """Dynamic inputs where tokens come as a matrix, without a batch: outside the language model."""
    what = (
        "compressed-tensors takes one scale for a whole matrix of tokens, where the configuration "
        "says one a token, and vision towers pass matrices"
    )
    remedy = "load it with prismquant.load or vLLM, or keep the tower's inputs static or in 16 bits"
    return gathered(
        (what, layer.called, remedy)
        for layer in checkpoint.layers
        if layer.site is not None
        and layer.site.modality is not Modality.LLM
        and layer.group is not None
        and layer.group.inputs is not None
        and (layer.group.inputs.dynamic, layer.group.inputs.strategy) == (True, "token")
    )


def unread_sglang(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Limits of the rules about SGLang."""
    if checkpoint.section and checkpoint.target is TargetReader.SGLANG:
        yield Problem(
            "kernels of SGLang were not read: its grammar, tensors and fused layers were checked",
            ("config.json",),
            "start the server once before relying on it",
        )


def _packed_bits(group: SchemeGroup) -> int:
    return group.weights.bits if group.weights is not None and group.layout == PACK else 0


def _where(
    checkpoint: Checkpoint, holds: Callable[[SchemeGroup], bool], what: str, remedy: str
) -> Iterator[Problem]:
    """One problem for each group of which it holds."""
    for group, members in checkpoint.of_group():
        if holds(group):
            names = tuple(layer.called for layer in members)
            yield Problem(what.format(group=group.describe()), names, remedy)
