"""What can be wrong with a checkpoint: one change each, and the rule that must tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from checkpoint_drafts import (
    ARGS,
    DOWN,
    GATE,
    QUERY,
    TOKEN,
    Draft,
    Edit,
    as_mixed,
    both,
    cache,
    called,
    every,
    float_again,
    ignoring,
    in_file,
    narrow,
    of_args,
    of_group,
    rename_blocks,
    setting,
    split_group,
    tensor,
    transform,
    unpack_words,
    untarget,
    without,
)


@dataclass(frozen=True)
class Case:
    """One thing that is wrong: the rule that must tell, where it begins, what is changed."""

    rule: str
    base: str
    edit: Edit
    target: str | None = None
    family: str = "qwen2_vl"


INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TOKEN_OUT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT4_TOKEN = INT8_TOKEN | {"num_bits": 4}


def damaged(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor whose first element has another value."""

    def change(x: torch.Tensor) -> torch.Tensor:
        flat = x.to(torch.float32).flatten()
        flat[0] = value
        return flat.reshape(x.shape).to(x.dtype)

    return change


def in_float(draft: Draft) -> None:
    """Dequantize all layers, each by itself, as a dense export does."""
    for name in [name for name in draft.tensors if name.endswith(".weight_shape")]:
        rows, columns = draft.tensors[name].tolist()
        float_again(name.removesuffix(".weight_shape"), rows, columns)(draft)
    del draft.config["quantization_config"]


def tied(draft: Draft) -> None:
    """Say that the head is the embedding, although it is stored."""
    draft.config["tie_word_embeddings"] = True
    draft.config["text_config"]["tie_word_embeddings"] = True


# Weights that are quantized at run time, which no server runs; texts for flags; any number of bits.
TAKEN_BY_THE_LIBRARY = (of_args(dynamic=True), of_args(symmetric="no"), of_args(num_bits=10**30))

CASES = [
    # files, on top of the folder as it was written: see test_what_is_wrong_with_files_is_told
    Case("config.method", "w4a16", setting(quant_method="bitsandbytes")),
    Case("config.method-missing", "w4a16", lambda d: d.section.pop("quant_method")),
    Case("config.group-shape", "w4a16", of_group(targets="Linear")),
    Case("config.group-shape", "w4a16", setting(config_groups=["group_0"])),
    Case("config.unknown-key", "w4a16", of_args(calibrated=True)),
    Case("config.group-key", "w4a16", of_group(note="mine"), "transformers"),
    Case("config.top-key", "w4a16", setting(made_by="me")),
    Case("config.type", "w4a16", setting(global_compression_ratio="much")),
    Case("config.type", "w4a16", setting(ignore="lm_head")),
    Case("config.misspelt", "w4a16", setting(ignored=["lm_head"])),
    Case("config.arguments", "w4a16", of_args(group_size=None)),
    Case("config.arguments", "w4a16", of_args(strategy="channel")),
    Case("config.arguments", "w4a16", of_args(strategy="rows", group_size=None)),
    Case("config.arguments", "w4a16", of_args(actorder="sideways")),
    *(Case("config.arguments", "w4a16", edit) for edit in TAKEN_BY_THE_LIBRARY[1:]),
    Case("config.arguments", "w4a16", of_args(scale_dtype="torch.float8_x")),
    Case("config.actorder", "w4a16", of_args(actorder="group"), "vllm"),
    Case("config.arguments", "w4a16", TAKEN_BY_THE_LIBRARY[0]),
    Case("config.arguments", "w4a16", of_args(type="complex")),
    Case("config.arguments", "w4a16", of_args(num_bits="four")),
    Case("config.arguments", "w8a8-all", of_args("input_activations", dynamic=False)),
    Case("config.arguments", "w8a8-all", of_args("input_activations", dynamic="local")),
    Case("config.arguments", "fp8-block", of_args(block_structure=None)),
    Case("config.arguments", "w8a8-all", of_args(block_structure=[128, 128])),
    Case("config.weights", "w4a16", of_group(weights=None), "vllm"),
    Case("config.inputs", "w8a8-all", of_group(input_activations=None), "vllm"),
    Case("config.format-missing", "w4a16", lambda d: d.group.pop("format")),
    Case("config.format-name", "w4a16", of_group(format="mixed-precision")),
    Case("config.format-name", "w4a16", of_group(format="marlin-24")),
    Case("config.format-top", "w4a16", setting(format="int-quantized")),
    Case("config.format-fits", "w4a16", of_group(format="float-quantized")),
    Case("config.format-fits", "nvfp4", of_args(group_size=32)),
    Case("config.format-fits", "mxfp4", of_args(symmetric=False)),
    Case("config.status", "w4a16", setting(quantization_status="frozen"), "transformers"),
    Case("config.sparsity", "w4a16", setting(sparsity_config={"targets": ["Linear"]}), "vllm"),
    Case("config.pattern", "w4a16", ignoring("re:(")),
    Case("config.pattern", "w4a16", ignoring(r"re:([^/]|[^/][^/])+[!?]"), "prismquant"),
    Case(
        "names.overlap",
        "w4a16",
        both(split_group(num_bits=8), lambda d: d.group["targets"].append("re:.*q_proj")),
    ),
    Case("names.target", "w4a16", lambda d: d.group["targets"].append("model.layers.9.mlp.x")),
    Case("names.ignore", "w4a16", ignoring("visual.blocks.0.attn.qkv_proj")),
    Case("names.uncovered", "w4a16", lambda d: d.section["ignore"].remove("lm_head")),
    Case(
        "names.vllm",
        "w8a8-all",
        both(of_group(targets=["re:model.visual.*", "re:.*_proj$"])),
        "vllm",
    ),
    Case("names.vllm", "w4a16", of_group(targets=["re:model[.]language_model[.]layers.*"]), "vllm"),
    Case(
        "names.transformers",
        "w4a16",
        both(of_group(targets=["Linear"]), setting(ignore=["re:visual.*", "lm_head"])),
        "transformers",
    ),
    Case("tensors.missing", "w4a16", without(f"{QUERY}.weight_shape")),
    Case("tensors.missing", "nvfp4", without(f"{QUERY}.input_global_scale")),
    Case("tensors.missing", "w8a8-static", without(f"{QUERY}.input_scale")),
    Case("tensors.shape", "w4a16", of_args(num_bits=8)),
    Case("tensors.shape", "w4a16", of_args(group_size=64)),
    Case("tensors.shape", "fp8-block", tensor(f"{QUERY}.weight_scale", torch.ones(2, 1))),
    Case("tensors.shape", "mxfp6", of_args(group_size=64)),
    Case("tensors.dtype", "w8a8-all", tensor(f"{QUERY}.weight", lambda t: t.to(torch.uint8))),
    Case("tensors.dtype", "mxfp8", tensor(f"{QUERY}.weight_scale", lambda t: t.float())),
    Case("tensors.old-packing", "w5a16", unpack_words),
    Case("tensors.extra", "w4a16", tensor(f"{QUERY}.weight_zero_point", torch.zeros(1)), "vllm"),
    Case("tensors.extra", "w4a16", tensor(f"{QUERY}.weight_g_idx", torch.zeros(1))),
    Case("tensors.extra", "w4a16", tensor(f"{QUERY}.weight", torch.ones(128, 128))),
    Case("tensors.extra", "w8a8-all", tensor(f"{QUERY}.input_scale", torch.ones(1))),
    Case(
        "tensors.vllm-extra",
        "w8a8-static",
        tensor(f"{QUERY}.input_zero_point", torch.zeros(1, dtype=torch.int8)),
        "vllm",
    ),
    *(
        Case("tensors.scale", base, tensor(f"{QUERY}.weight_scale", damaged(value)))
        for base in ("w4a16", "fp8", "nvfp4")
        for value in (math.nan, 0.0)
    ),
    Case("tensors.scale", "fp8", tensor(f"{QUERY}.weight_scale", damaged(-1.0))),
    Case("tensors.scale", "w5a16", tensor(f"{QUERY}.weight_scale", damaged(math.inf))),
    Case("tensors.scale", "mxfp4", tensor(f"{QUERY}.weight_scale", damaged(255))),
    Case("tensors.told-shape", "w4a16", tensor(f"{QUERY}.weight_shape", torch.tensor([128, 96]))),
    Case(
        "tensors.told-shape",
        "w4a16",
        both(
            of_args(actorder="group"),
            tensor(f"{QUERY}.weight_g_idx", torch.ones(128, dtype=torch.int32)),
        ),
    ),
    Case(
        "tensors.tied-codes",
        "w4a16",
        both(tied, tensor("lm_head.weight_scale", torch.ones(1))),
        "transformers",
    ),
    Case("tensors.tied-head", "w4a16", tied, "vllm"),
    Case("tensors.finite", "w4a16", tensor("model.norm.weight", damaged(math.nan))),
    Case("tensors.finite", "float", tensor(f"{QUERY}.bias", damaged(-math.inf))),
    Case("tensors.finite", "gptq", tensor(f"{QUERY}.scales", damaged(math.inf))),
    Case("tensors.finite", "modelopt-nvfp4", tensor(f"{QUERY}.weight_scale", damaged(math.nan))),
    Case("tensors.unread", "w4a16", tensor("model.norm.weight", torch.ones((1 << 22) + 1))),
    Case("tensors.prismquant-only", "w4a16", tensor(f"{DOWN}.split_index", torch.zeros(1)), "vllm"),
    Case("tensors.ungrouped", "w4a16", untarget(called(QUERY))),
    Case("tensors.plain", "w4a16", without("model.norm.weight")),
    Case("tensors.plain-shape", "w4a16", tensor("model.norm.weight", torch.ones(7))),
    Case("tensors.plain-shape", "float", tensor(f"{QUERY}.weight", lambda t: t.to(torch.int8))),
    Case("tensors.unknown", "w4a16", tensor("model.layers.7.mlp.extra", torch.ones(1)), "vllm"),
    Case("tensors.scalar", "w8a8-static", every(".input_scale", 0.0)),
    Case("tensors.scalar", "nvfp4", every(".weight_global_scale", float("inf"))),
    Case(
        "tensors.scalar",
        "w8a8-static",
        tensor(f"{QUERY}.input_zero_point", torch.tensor([3], dtype=torch.int8)),
    ),
    Case("tensors.uncalibrated", "w8a8-static", every(".input_scale", 1.0)),
    Case("tensors.scale-rounded", "w5a16", lambda d: None, "vllm"),
    Case("fused.scheme", "w4a16", split_group(num_bits=8), "vllm"),
    Case("fused.scheme", "w4a16", untarget(called(GATE)), "sglang"),
    Case("fused.ignore", "w4a16", ignoring(called(QUERY)), "vllm"),
    Case(
        "fused.global-scale", "nvfp4", tensor(f"{QUERY}.weight_global_scale", torch.tensor([8.0]))
    ),
    Case("shapes.group", "w4a16", of_args(group_size=96)),
    Case("shapes.block", "fp8-block", of_args(block_structure=[96, 128]), "vllm"),
    Case("shapes.block-columns", "fp8-block", of_args(block_structure=[128, 96])),
    Case("shapes.tensor-parallel", "w4a16", lambda d: None, "vllm"),
    Case("vllm.scheme", "nvfp4", of_group(input_activations=TOKEN), "vllm"),
    Case("vllm.scheme", "mxfp8", of_args(scale_dtype=None), "vllm"),
    Case("vllm.asymmetric-bytes", "w8a8-all", of_args(symmetric=False), "vllm"),
    Case("vllm.w4a8-bytes", "w8a8-all", of_args(num_bits=4), "vllm"),
    Case("vllm.w4a8", "w4a16", of_group(input_activations=INT8_TOKEN), "vllm"),
    Case("vllm.w4a8-channel", "w4a8", lambda d: None, "vllm"),
    Case("vllm.w4a4", "w4a16", of_group(input_activations=INT4_TOKEN), "vllm"),
    Case("vllm.w4a8-fp8", "w4a16", of_group(input_activations=TOKEN), "vllm"),
    Case(
        "vllm.w4a8-fp8-shape",
        "w4a16",
        both(of_args(group_size=64), of_group(input_activations=TOKEN)),
        "vllm",
    ),
    Case("vllm.outputs", "w8a8-all", of_group(output_activations=TOKEN_OUT), "vllm"),
    Case("vllm.odd-bits", "w5a16", lambda d: None, "vllm"),
    Case("vllm.asymmetric-int8", "w4a16", of_args(symmetric=False, num_bits=8), "vllm"),
    Case("vllm.fp8", "fp8", lambda d: None, "vllm"),
    Case("vllm.nvfp4", "nvfp4", lambda d: None, "vllm"),
    Case("vllm.mx", "mxfp8", lambda d: None, "vllm"),
    Case("vllm.mx-inputs", "mxfp4", of_group(input_activations=None), "vllm"),
    Case("vllm.int8-blackwell", "w8a8-all", lambda d: None, "vllm"),
    Case("ct.dense-stream", "w5a16", lambda d: None),
    Case("ct.mxfp6", "mxfp6", lambda d: None),
    Case("transformers.asymmetric", "w4a16", of_args(symmetric=False), "transformers"),
    Case("transformers.experts", "w4a16", lambda d: None, "transformers", "qwen3_vl_moe"),
    Case("transformers.experts", "w8a8", lambda d: None, "transformers", "qwen3_moe"),
    Case("transformers.single-experts", "w4a16", in_float, "transformers", "qwen3_vl_moe"),
    Case("vllm.experts", "w8a8-static", lambda d: None, "vllm", "qwen3_vl_moe"),
    Case("transformers.expert-inputs", "fp8", lambda d: None, "transformers", "qwen3_moe"),
    Case("transformers.tower-tokens", "w8a8-all", lambda d: None, "transformers"),
    Case("sglang.kernels", "w4a16", lambda d: None, "sglang"),
    Case("model.vllm", "w4a16", lambda d: None, "vllm", "video_llama_3"),
    Case("vllm.unquantized", "w4a16-all", lambda d: None, "vllm", "llama4"),
    Case("model.unknown", "w4a16", lambda d: d.config.update(model_type="other_vl")),
    Case("model.config", "w4a16", lambda d: d.config["text_config"].update(hidden_size="wide")),
    Case("model.config", "w4a16", lambda d: d.config.pop("model_type")),
    Case("prismquant.reads", "fp8-block", of_args(block_structure=[64, 128]), "prismquant"),
    Case(
        "prismquant.reads",
        "w4a16",
        setting(kv_cache_scheme={**ARGS, "strategy": "channel"}),
        "prismquant",
    ),
    Case(
        "prismquant.reads",
        "w4a16",
        lambda d: d.config.update(prismquant={"activation": {}}),
        "prismquant",
    ),
    Case(
        "prismquant.reads",
        "w4a16",
        lambda d: d.config.update(prismquant={"activations": {"x": {"input": {"bits": 4}}}}),
        "prismquant",
    ),
    Case("prismquant.method", "gptq", lambda d: None, "prismquant"),
    Case("config.none", "float", lambda d: None),
    Case(
        "kv.arguments",
        "w4a16",
        both(cache, lambda d: d.section["kv_cache_scheme"].update(x=1)),
        "transformers",
    ),
    Case(
        "kv.kind",
        "w4a16",
        both(cache, lambda d: d.section["kv_cache_scheme"].update(type="int")),
        "vllm",
    ),
    Case("kv.passed-over", "w4a16", cache, "transformers"),
    Case(
        "kv.missing",
        "w4a16",
        setting(kv_cache_scheme={**ARGS, "strategy": "tensor"}),
        None,
        "qwen3_vl",
    ),
    Case("kv.missing-biased", "w4a16", setting(kv_cache_scheme={**ARGS, "strategy": "tensor"})),
    Case(
        "kv.uncalibrated",
        "w4a16",
        both(lambda d: rename_blocks(d, cache, value=1.0)),
        None,
        "qwen3_vl",
    ),
    Case("kv.uncalibrated-biased", "w4a16", lambda d: cache(d, value=1.0)),
    Case(
        "kv.shape",
        "w4a16",
        lambda d: (cache(d), d.section["kv_cache_scheme"].update(strategy="attn_head")),
    ),
    Case("kv.value", "w4a16", lambda d: cache(d, value=-1.0)),
    Case("kv.unused", "w4a16", lambda d: (cache(d), d.section.pop("kv_cache_scheme"))),
    Case("transforms.grammar", "w4a16", transform(apply={"location": "inside"})),
    Case("transforms.grammar", "w4a16", transform(speed=3)),
    Case("transforms.grammar", "w4a16", transform(type="fourier")),
    Case("transforms.size", "w4a16", transform(head_dim=96)),
    Case("transforms.kernel", "w4a16", transform(head_dim=96), "vllm"),
    Case("transforms.bias", "w4a16", transform(apply={"targets": ["re:.*q_proj$"]}), "vllm"),
    Case(
        "transforms.target", "w4a16", transform(apply={"targets": ["model.layers.0.mlp.down_proj"]})
    ),
    Case("transforms.one-gpu", "w4a16", transform(), "vllm"),
    Case(
        "transforms.matrix",
        "w4a16",
        both(transform(), tensor(f"{DOWN}.hadamard_64_input.weight", torch.ones(2, 2))),
    ),
    Case("transforms.transformers", "w4a16", transform(), "transformers"),
    Case("modelopt.algorithm", "modelopt-fp8", setting(quant_algo="W4A16_AWQ"), "vllm"),
    Case("modelopt.algorithm", "modelopt-nvfp4", as_mixed(q_proj="INT8"), "vllm"),
    Case(
        "modelopt.fields",
        "modelopt-nvfp4",
        both(
            in_file(lambda q: q.pop("kv_cache_quant_algo")),
            lambda d: d.config.pop("quantization_config"),
        ),
        "vllm",
    ),
    Case(
        "modelopt.types",
        "modelopt-nvfp4",
        both(setting(quant_algo=None), in_file(lambda q: q.pop("quant_algo"))),
    ),
    Case("modelopt.types", "modelopt-nvfp4", setting(ignore="lm_head")),
    Case("modelopt.mixed", "modelopt-nvfp4", setting(quant_algo="MIXED_PRECISION")),
    Case("modelopt.agreement", "modelopt-nvfp4", in_file(lambda q: q.update(quant_algo="FP8"))),
    Case("modelopt.agreement", "modelopt-nvfp4", in_file(lambda q: q["exclude_modules"].pop())),
    Case("modelopt.group", "modelopt-nvfp4", lambda d: narrow(d), "vllm"),
    Case("modelopt.fused", "modelopt-nvfp4", as_mixed(q_proj="FP8"), "vllm"),
    Case(
        "modelopt.global-scale",
        "modelopt-nvfp4",
        tensor(f"{QUERY}.weight_scale_2", torch.tensor(4.0)),
    ),
    Case("modelopt.tensors", "modelopt-nvfp4", without(f"{QUERY}.weight_scale_2")),
    Case("modelopt.shape", "modelopt-fp8", tensor(f"{QUERY}.weight_scale", torch.ones(128, 1))),
    Case("modelopt.shape", "modelopt-mxfp8", tensor(f"{QUERY}.weight_scale", lambda t: t.float())),
    Case("modelopt.excluded", "modelopt-fp8", lambda d: d.section["ignore"].append(called(DOWN))),
    Case("modelopt.transformers", "modelopt-fp8", lambda d: None, "transformers"),
    Case("packed.keys", "gptq", lambda d: d.section.pop("desc_act")),
    Case("packed.keys", "awq", lambda d: d.section.pop("zero_point")),
    Case("packed.keys", "gptq", setting(bits="4")),
    Case("packed.keys", "gptq", setting(dynamic={"-:(": {}})),
    Case("packed.bits", "gptq", setting(sym=False), "vllm"),
    Case("packed.bits", "awq", setting(bits=8), "vllm"),
    Case(
        "packed.none",
        "float",
        lambda d: d.config.update(quantization_config={"quant_method": "gptq"}),
    ),
    Case("packed.tensors", "gptq", without(f"{QUERY}.qzeros")),
    Case("packed.shape", "gptq", setting(bits=8)),
    Case("packed.shape", "awq", tensor(f"{QUERY}.scales", lambda t: t.to(torch.int8))),
    Case("packed.group", "gptq", setting(group_size=96)),
    Case("packed.fused", "gptq", float_again(QUERY, 128, 128), "vllm"),
    Case("packed.excluded", "awq", setting(modules_to_not_convert=[])),
    Case("packed.excluded", "gptq", setting(dynamic={})),
]
