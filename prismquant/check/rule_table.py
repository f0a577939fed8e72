"""The table of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prismquant.check import coverage_rules as coverage
from prismquant.check import expert_rules as experts
from prismquant.check import file_rules as files
from prismquant.check import fusion_rules as fusion
from prismquant.check import grammar_rules as grammar
from prismquant.check import kernel_rules as kernels
from prismquant.check import kv_rules as kv
from prismquant.check import loader_rules as ours
from prismquant.check import modelopt_rules as modelopt
from prismquant.check import packed_int_rules as packed_int
from prismquant.check import tensor_rules as tensors
from prismquant.check import transform_rules as transforms
from prismquant.check.checkpoint import (
    COMPRESSED_TENSORS,
    GGUF,
    Checkpoint,
)
from prismquant.check.findings import Problem, Rule, Severity, faults_under
from prismquant.check.target_reader import TargetReader
from prismquant.export.compressed_tensors.expected import VLLM_EXTRA

_Find = Callable[[Checkpoint], Iterable[Problem]]
_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
_VLLM, _HF, _SGL = TargetReader.VLLM, TargetReader.TRANSFORMERS, TargetReader.SGLANG
_SERVERS = (_VLLM, _SGL)


def _held_by_loading(name: str, says: str, *, layered: bool = False) -> Rule:
    """A rule that loading holds as well."""
    return Rule(name, _E, says, faults_under(name), layered=layered)


FILE_RULES = (
    Rule("files.shards", _E, "every shard is there and whole", files.broken_shards),
    Rule("files.index", _E, "every indexed tensor is in its shard", files.index_and_headers),
    Rule("files.unindexed", _E, "every tensor is in the index", files.unindexed),
    Rule("files.doubled", _E, "no tensor is in two shards", files.doubled),
    Rule("files.total-size", _N, "the index claims the bytes that there are", files.total_size),
    Rule("files.leftovers", _W, "nothing is left of an unfinished run", files.leftovers),
    Rule("files.companions", _W, "tokenizer and image processor are there", files.companions),
    Rule("model.unknown", _N, "the architecture is known", files.unknown_model),
    Rule("model.config", _E, "the configuration describes it", files.broken_model),
)


def _stacked(name: str, says: str, find: _Find, severity: Severity = _E) -> Rule:
    return Rule(name, severity, says, find, (_HF,), layered=True)


def _refused_by_vllm(name: str, says: str, find: _Find) -> Rule:
    return Rule(name, _E, says, find, (_VLLM,), layered=True)


_MODEL = (
    _refused_by_vllm(
        "model.vllm", "vLLM has a class for the architecture", coverage.unknown_to_vllm
    ),
    _refused_by_vllm(
        "vllm.unquantized", "vLLM builds the layer by its scheme", coverage.plain_in_vllm
    ),
)
_SECTION = (
    Rule("config.none", _N, "there is a quantization_config", grammar.not_quantized),
    Rule("config.method", _W, "there are rules for its method", grammar.method),
    _held_by_loading("config.method-missing", "quantization_config names its method"),
    Rule("sglang.kernels", _N, "kernels of SGLang are known", kernels.unread_sglang, (_SGL,)),
)
_CONFIG = (
    _held_by_loading("config.type", "values are of the types that readers expect"),
    _held_by_loading("config.group-shape", "groups have a list of targets"),
    _held_by_loading("config.unknown-key", "arguments have no unknown key"),
    _held_by_loading("config.group-key", "neither have groups"),
    _held_by_loading("config.misspelt", "no key is all but one that readers know"),
    Rule("config.top-key", _N, "the section has no key of others", grammar.unknown_top_keys),
    _held_by_loading("config.arguments", "arguments agree with each other"),
    Rule(
        "config.actorder",
        _E,
        "groups are of neighbouring columns",
        grammar.reordered,
        (_VLLM, _HF, _SGL),
    ),
    Rule("config.weights", _E, "every group has weights", grammar.missing_weights, (_VLLM,)),
    Rule("config.inputs", _E, "plain integers have inputs", grammar.no_inputs, _SERVERS),
    Rule("config.format-missing", _W, "every group says its format", grammar.own_format, (_HF,)),
    Rule("config.format-name", _E, "formats are known ones", grammar.format_name),
    Rule("config.format-top", _W, "the top-level format agrees", grammar.top_format),
    Rule("config.format-fits", _E, "formats hold their weights", grammar.format_holds),
    Rule("config.status", _E, "quantization_status is compressed", grammar.status, (_HF,)),
    Rule("config.sparsity", _E, "there is no sparsity", grammar.sparsity, _SERVERS),
    _held_by_loading("config.pattern", "patterns compile, and match in moments"),
)
_NAMES = (
    Rule("names.overlap", _W, "each layer is in one group", coverage.overlap, layered=True),
    Rule("names.target", _W, "targets match layers", coverage.unmatched_targets, layered=True),
    Rule("names.ignore", _W, "ignores match layers", coverage.unmatched_ignores, layered=True),
    Rule(
        "names.uncovered", _W, "each layer is targeted or ignored", coverage.uncovered, layered=True
    ),
    _refused_by_vllm(
        "names.vllm", "vLLM finds the scheme that transformers finds", coverage.misread_by_vllm
    ),
    Rule(
        "names.transformers",
        _E,
        "transformers finds layers in floating point that are stored so",
        coverage.misread_by_transformers,
        (_HF,),
        layered=True,
    ),
)
_TENSORS = (
    _held_by_loading("tensors.missing", "quantized layers are complete", layered=True),
    _held_by_loading("tensors.shape", "their tensors have their shapes", layered=True),
    _held_by_loading("tensors.dtype", "their tensors have their dtypes", layered=True),
    _held_by_loading("tensors.old-packing", "codes are a dense stream", layered=True),
    _held_by_loading("tensors.extra", "they have no other tensor", layered=True),
    Rule(
        VLLM_EXTRA,
        _E,
        "nor one that only vLLM stops at",
        faults_under(VLLM_EXTRA),
        (_VLLM,),
        layered=True,
    ),
    Rule("tensors.scale", _E, "scales of weights are scales", tensors.bad_scales, layered=True),
    Rule(
        "tensors.told-shape",
        _E,
        "shapes and orders told in tensors are the layers'",
        tensors.wrong_shapes,
        layered=True,
    ),
    Rule(
        "tensors.prismquant-only",
        _E,
        "other readers know all tensors",
        tensors.only_ours,
        (_VLLM, _HF, _SGL),
    ),
)
_PLAIN = (
    _stacked("transformers.single-experts", "it finds stacks of experts", experts.single),
    _held_by_loading("tensors.ungrouped", "stored codes belong to a group", layered=True),
    _held_by_loading("tensors.plain", "other tensors are complete", layered=True),
    _held_by_loading("tensors.plain-shape", "and as the model has them", layered=True),
    Rule(
        "tensors.tied-codes",
        _E,
        "a head in codes is not tied to the embedding",
        tensors.tied_codes,
        (_VLLM, _HF, _SGL),
        layered=True,
    ),
    Rule(
        "tensors.tied-head",
        _W,
        "neither is one with values of its own",
        tensors.tied_values,
        (_VLLM,),
        layered=True,
    ),
    Rule("tensors.finite", _E, "norms, biases and scales are finite", tensors.not_finite),
    Rule("tensors.unread", _N, "they are small enough to be looked at", tensors.unread),
    Rule(
        "tensors.unknown", _E, "each belongs to the model", tensors.unknown, (_VLLM,), layered=True
    ),
    Rule("tensors.scalar", _E, "static scales are positive", tensors.bad_scalars, layered=True),
    Rule(
        "tensors.uncalibrated",
        _W,
        "static scales were calibrated",
        tensors.uncalibrated,
        layered=True,
    ),
    Rule(
        "tensors.scale-rounded",
        _W,
        "vLLM keeps scales as they are",
        tensors.rounded_scales,
        (_VLLM,),
        layered=True,
    ),
)
_FUSION = (
    Rule("fused.scheme", _E, "fused layers share a scheme", fusion.schemes, _SERVERS, layered=True),
    Rule("fused.ignore", _E, "and are ignored together", fusion.torn, (_VLLM,), layered=True),
    Rule(
        "fused.global-scale",
        _W,
        "and share NVFP4 global scales",
        fusion.global_scales,
        _SERVERS,
        layered=True,
    ),
    Rule("shapes.group", _E, "groups divide the input", fusion.groups_divide, layered=True),
    Rule(
        "shapes.block", _E, "blocks fill fused parts", fusion.blocks_divide, _SERVERS, layered=True
    ),
    Rule("shapes.block-columns", _W, "blocks fill rows", fusion.short_blocks, layered=True),
    Rule(
        "shapes.tensor-parallel",
        _N,
        "layers can be split over 2, 4 and 8 GPUs",
        fusion.tensor_parallel,
        _SERVERS,
        layered=True,
    ),
)


def _vllm(name: str, severity: Severity, says: str, find: _Find) -> Rule:
    return Rule(f"vllm.{name}", severity, says, find, (_VLLM,), layered=True)


_KERNELS = (
    _vllm("scheme", _E, "vLLM has a scheme for every group", kernels.no_scheme),
    _vllm("asymmetric-bytes", _E, "weights a byte a code are symmetric", kernels.asymmetric_bytes),
    _vllm("w4a8-bytes", _E, "int4 with int8 inputs is packed", kernels.w4a8_bytes),
    _vllm("w4a8", _W, "int8 inputs run in int8", kernels.w4a8_runs_w4a16),
    _vllm("w4a8-channel", _N, "Marlin could quantize inputs to int8", kernels.w4a8_channel),
    _vllm("w4a4", _W, "int4 inputs run in int4", kernels.packed_int4_inputs),
    _vllm("w4a8-fp8", _W, "it runs on any recent GPU", kernels.w4a8_fp8),
    _vllm("w4a8-fp8-shape", _E, "its kernel can do the shapes", kernels.w4a8_fp8_shape),
    _vllm("outputs", _W, "quantized outputs are quantized", kernels.ignored_outputs),
    _vllm("odd-bits", _W, "a kernel of vLLM's own runs the width", kernels.odd_bits),
    _vllm("asymmetric-int8", _W, "it runs on any recent GPU", kernels.asymmetric_int8),
    _vllm("fp8", _N, "FP8 runs on any GPU", kernels.fp8_gpus),
    _vllm("nvfp4", _N, "NVFP4 runs on any GPU", kernels.nvfp4_gpus),
    _vllm("mx", _N, "MX formats run on any GPU", kernels.mx_gpus),
    _vllm("mx-inputs", _N, "inputs stay in 16 bits where declared", kernels.mx_weight_only),
    _vllm("int8-blackwell", _N, "int8 runs on any GPU", kernels.int8_blackwell),
    Rule(
        "ct.dense-stream",
        _N,
        "any compressed-tensors unpacks the codes",
        kernels.dense_stream,
        layered=True,
    ),
    Rule("ct.mxfp6", _N, "any compressed-tensors has the format", kernels.mxfp6_vllm, layered=True),
    Rule(
        "transformers.asymmetric",
        _E,
        "transformers unpacks the zero points",
        kernels.asymmetric_in_transformers,
        (_HF,),
        layered=True,
    ),
    _stacked("transformers.experts", "it stacks experts", experts.unread),
    _refused_by_vllm("vllm.experts", "it has kernels for experts", experts.served),
    _stacked("transformers.expert-inputs", "it rounds inputs of experts", experts.float_inputs, _W),
    Rule(
        "transformers.tower-tokens",
        _N,
        "inputs have a scale a token",
        kernels.token_inputs_of_towers,
        (_HF,),
        layered=True,
    ),
)
_CACHE = (
    _held_by_loading("kv.arguments", "kv_cache_scheme is well formed"),
    Rule("kv.kind", _E, "the KV cache is one of vLLM's", kv.kind, _SERVERS),
    Rule("kv.passed-over", _W, "every transformers rounds the cache", kv.passed_over, (_HF,)),
    Rule("kv.missing", _W, "its scales are there", kv.missing, layered=True),
    Rule(
        "kv.missing-biased", _E, "also where k_proj has a bias", kv.missing_with_bias, layered=True
    ),
    Rule("kv.uncalibrated", _W, "they were calibrated", kv.ones, layered=True),
    Rule(
        "kv.uncalibrated-biased",
        _E,
        "also where k_proj has a bias",
        kv.ones_with_bias,
        layered=True,
    ),
    Rule("kv.shape", _E, "they have the strategy's shape", kv.shapes, layered=True),
    Rule("kv.value", _E, "they are positive", kv.values, layered=True),
    Rule("kv.unused", _N, "they are declared", kv.unused, layered=True),
)
_TRANSFORMS = (
    _held_by_loading("transforms.grammar", "transform_config is well formed"),
    Rule("transforms.size", _E, "blocks divide the input", transforms.sizes, layered=True),
    Rule(
        "transforms.kernel",
        _E,
        "vLLM has a kernel for the blocks",
        transforms.kernel_sizes,
        (_VLLM,),
        layered=True,
    ),
    Rule(
        "transforms.bias",
        _E,
        "rotated layers have no bias",
        transforms.biased,
        (_VLLM,),
        layered=True,
    ),
    Rule("transforms.target", _W, "targets match layers", transforms.unmatched, layered=True),
    Rule(
        "transforms.one-gpu",
        _N,
        "it can be split over GPUs",
        transforms.one_gpu,
        (_VLLM,),
        layered=True,
    ),
    Rule("transforms.matrix", _E, "matrices have their shape", transforms.matrices, layered=True),
    Rule(
        "transforms.transformers",
        _E,
        "nothing happens at run time",
        transforms.in_transformers,
        (_HF,),
    ),
)
_MODELOPT = (
    Rule("modelopt.types", _E, "the configuration says what it must", modelopt.types),
    Rule("modelopt.algorithm", _E, "servers have the algorithm", modelopt.algorithm, _SERVERS),
    Rule("modelopt.fields", _E, "NVFP4 says what it must", modelopt.fields, (_VLLM,)),
    Rule("modelopt.mixed", _E, "mixed precision lists its layers", modelopt.mixed),
    Rule("modelopt.agreement", _W, "both files say the same", modelopt.agreement),
    Rule("modelopt.group", _E, "blocks divide the input", modelopt.divisible, layered=True),
    Rule("modelopt.fused", _E, "fused layers share an algorithm", modelopt.fused, layered=True),
    Rule("modelopt.global-scale", _W, "and global scales", modelopt.global_scales, layered=True),
    Rule("modelopt.tensors", _E, "quantized layers are complete", modelopt.tensors, layered=True),
    Rule("modelopt.shape", _E, "shapes and dtypes are right", modelopt.shapes, layered=True),
    Rule("modelopt.excluded", _E, "stored codes are declared", modelopt.excluded, layered=True),
    Rule("modelopt.transformers", _E, "transformers reads it", modelopt.in_transformers, (_HF,)),
)
_PACKED = (
    Rule("packed.keys", _E, "GPTQ and AWQ say what they must", packed_int.keys),
    Rule("packed.bits", _E, "vLLM has the width", packed_int.widths, (_VLLM,), layered=True),
    Rule("packed.none", _E, "some layer is packed", packed_int.nothing_packed, layered=True),
    Rule("packed.tensors", _E, "packed layers are complete", packed_int.tensors, layered=True),
    Rule("packed.shape", _E, "shapes and dtypes are right", packed_int.shapes, layered=True),
    Rule("packed.group", _E, "groups and words divide", packed_int.divisible, layered=True),
    Rule("packed.fused", _E, "fused layers are alike", packed_int.fused, _SERVERS, layered=True),
    Rule("packed.excluded", _W, "other layers are left out", packed_int.excluded, layered=True),
)
_OURS = (
    Rule(
        "prismquant.reads",
        _E,
        "prismquant.load reads what the configuration says",
        ours.unread,
        (TargetReader.PRISMQUANT,),
        layered=True,
    ),
    Rule(
        "prismquant.method",
        _E,
        "prismquant.load reads the method",
        ours.other_method,
        (TargetReader.PRISMQUANT,),
    ),
)
_GGUF = (Rule("gguf.unread", _N, "there are rules for the format", files.unread_gguf),)
# Whose configurations rules read.
_OWNERS: tuple[tuple[tuple[Rule, ...], tuple[str, ...]], ...] = (
    ((*_CONFIG, *_NAMES, *_TENSORS, *_FUSION, *_KERNELS, *_TRANSFORMS), (COMPRESSED_TENSORS,)),
    (_CACHE, (COMPRESSED_TENSORS, *modelopt.METHODS)),
    (_MODELOPT, modelopt.METHODS),
    (_PACKED, packed_int.METHODS),
    (_GGUF, (GGUF,)),
)
METHODS = {rule.name: methods for rules, methods in _OWNERS for rule in rules}

RULES = (
    *FILE_RULES,
    *_MODEL,
    *_SECTION,
    *_CONFIG,
    *_NAMES,
    *_TENSORS,
    *_PLAIN,
    *_FUSION,
    *_KERNELS,
    *_CACHE,
    *_TRANSFORMS,
    *_MODELOPT,
    *_PACKED,
    *_OURS,
    *_GGUF,
)
