"""Checkpoints in memory: changed, made in the layouts of other tools, and written again.

The layouts are made from their definition: names, shapes and dtypes, with zeros for contents.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prismquant.opening import read_json
from prismquant.shards import INDEX_NAME, ShardReader
from prismquant.storage import write_json, write_tensors

BLOCK = "model.layers.0"
CALLED = "model.language_model.layers.0"
QUERY, KEY, DOWN = (
    f"{BLOCK}.self_attn.q_proj",
    f"{BLOCK}.self_attn.k_proj",
    f"{BLOCK}.mlp.down_proj",
)
GATE = f"{BLOCK}.mlp.gate_proj"
ARGS = {"num_bits": 8, "type": "float", "symmetric": True}


@dataclass
class Draft:
    """A checkpoint in memory, to be changed and written again."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def section(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    @property
    def group(self) -> dict[str, Any]:
        return self.section["config_groups"]["group_0"]

    def layers(self) -> list[str]:
        """Prefixes on disk of the language model's linear layers."""
        pattern = r"(model[.]layers[.].*_proj)[.](weight|weight_packed|qweight)$"
        found = {match[1] for name in self.tensors if (match := re.match(pattern, name))}
        return sorted(found)

    def shape(self, layer: str) -> tuple[int, int]:
        rows, columns = self.tensors[f"{layer}.weight"].shape
        return rows, columns


def called(layer: str) -> str:
    """The module path of a layer of the old naming."""
    return layer.replace("model.layers", "model.language_model.layers")


def drafted(source: Path, folder: Path) -> Draft:
    """A copy whose tensors are in memory."""
    shutil.copytree(source, folder)
    reader = ShardReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    return Draft(folder, read_json(folder / "config.json"), tensors)


def written(draft: Draft) -> Path:
    """Write a draft as one shard with an index."""
    for path in [*draft.folder.glob("*.safetensors"), draft.folder / INDEX_NAME]:
        path.unlink(missing_ok=True)
    write_tensors(draft.folder / "model.safetensors", draft.tensors)
    size = sum(tensor.nbytes for tensor in draft.tensors.values())
    weight_map = dict.fromkeys(sorted(draft.tensors), "model.safetensors")
    write_json(
        draft.folder / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map}
    )
    write_json(draft.folder / "config.json", draft.config)
    return draft.folder


# ------------------------------------------------------------------- checkpoints of other formats


def stored(
    draft: Draft,
    layout: str,
    weights: dict[str, Any],
    tensors: Callable[[int, int], dict[str, Tensor]],
    inputs: dict[str, Any] | None = None,
) -> None:
    """Store the language model's layers in a layout of compressed-tensors."""
    layers = draft.layers()
    for layer in layers:
        rows, columns = draft.shape(layer)
        del draft.tensors[f"{layer}.weight"]
        draft.tensors |= {f"{layer}.{k}": v for k, v in tensors(rows, columns).items()}
    group = {
        "targets": [called(layer) for layer in layers],
        "format": layout,
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": inputs,
        "output_activations": None,
    }
    others = [
        *(
            f"model.visual.blocks.{i}.{n}"
            for i in (0, 1)
            for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ),
        *("model.visual.merger.mlp.0", "model.visual.merger.mlp.2", "lm_head"),
    ]
    draft.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": others,
        "config_groups": {"group_0": group},
    }


FP4: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
MX: dict[str, Any] = {
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
TOKEN: dict[str, Any] = {**ARGS, "strategy": "token", "dynamic": True}


def nvfp4(draft: Draft) -> None:
    def tensors(rows: int, columns: int) -> dict[str, Tensor]:
        return {
            "weight_packed": torch.zeros(rows, columns // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([64.0]),
            "input_global_scale": torch.tensor([32.0]),
        }

    stored(draft, "nvfp4-pack-quantized", FP4, tensors, {**FP4, "dynamic": "local"})


def mxfp4(draft: Draft) -> None:
    def tensors(rows: int, columns: int) -> dict[str, Tensor]:
        return {
            "weight_packed": torch.zeros(rows, columns // 2, dtype=torch.uint8),
            "weight_scale": torch.zeros(rows, columns // 32, dtype=torch.uint8),
        }

    inputs = {**MX, "num_bits": 4, "dynamic": True}
    stored(draft, "mxfp4-pack-quantized", {**MX, "num_bits": 4}, tensors, inputs)


def mxfp6(draft: Draft) -> None:
    def tensors(rows: int, columns: int) -> dict[str, Tensor]:
        return {
            "weight_packed": torch.zeros(rows, columns * 3 // 4, dtype=torch.uint8),
            "weight_scale": torch.zeros(rows, columns // 32, dtype=torch.uint8),
        }

    stored(draft, "mxfp6-pack-quantized", {**MX, "num_bits": 6}, tensors)


def mxfp8(draft: Draft) -> None:
    def tensors(rows: int, columns: int) -> dict[str, Tensor]:
        return {
            "weight": torch.zeros(rows, columns).to(torch.float8_e4m3fn),
            "weight_scale": torch.zeros(rows, columns // 32, dtype=torch.uint8),
        }

    inputs = {**MX, "num_bits": 8, "dynamic": True}
    stored(draft, "mxfp8-quantized", {**MX, "num_bits": 8}, tensors, inputs)


def fp8_block(draft: Draft, size: int = 128) -> None:
    def tensors(rows: int, columns: int) -> dict[str, Tensor]:
        return {
            "weight": torch.zeros(rows, columns).to(torch.float8_e4m3fn),
            "weight_scale": torch.ones(-(-rows // size), -(-columns // size)),
        }

    weights = {**ARGS, "strategy": "block", "block_structure": [size, size]}
    inputs = {**ARGS, "strategy": "group", "group_size": 128, "dynamic": True}
    stored(draft, "float-quantized", weights, tensors, inputs)


def fp8_naive(draft: Draft) -> None:
    def tensors(rows: int, columns: int) -> dict[str, Tensor]:
        return {
            "weight": torch.zeros(rows, columns).to(torch.float8_e4m3fn),
            "weight_scale": torch.ones(rows, 1),
        }

    stored(draft, "naive-quantized", {**ARGS, "strategy": "channel"}, tensors)


def packed(
    bits: int = 4, size: int | None = 128, inputs: dict[str, Any] | None = None
) -> Callable[[Draft], None]:
    def edit(draft: Draft) -> None:
        def tensors(rows: int, columns: int) -> dict[str, Tensor]:
            groups = columns // size if size else 1
            return {
                "weight_packed": torch.zeros(rows, -(-columns * bits // 32), dtype=torch.int32),
                "weight_scale": torch.ones(rows, groups, dtype=torch.float32),
                "weight_shape": torch.tensor([rows, columns]),
            }

        strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
        weights = {"num_bits": bits, "type": "int", **strategy}
        stored(draft, "pack-quantized", weights, tensors, inputs)

    return edit


def modelopt(algo: str = "NVFP4") -> Callable[[Draft], None]:
    def edit(draft: Draft) -> None:
        layers = draft.layers()
        for layer in layers:
            rows, columns = draft.shape(layer)
            draft.tensors |= {
                f"{layer}.{suffix}": tensor
                for suffix, tensor in modelopt_tensors(algo, rows, columns).items()
            }
        ignore = ["lm_head", "model.visual*", "visual*"]
        entry = {"quant_algo": algo, "group_size": 16}
        draft.config["quantization_config"] = {
            "quant_method": "modelopt",
            **entry,
            "ignore": ignore,
        }
        write_json(
            draft.folder / "hf_quant_config.json",
            {"quantization": {**entry, "kv_cache_quant_algo": None, "exclude_modules": ignore}},
        )

    return edit


def modelopt_tensors(algo: str, rows: int, columns: int) -> dict[str, Tensor]:
    bytes_ = torch.zeros(rows, columns).to(torch.float8_e4m3fn)
    if algo == "FP8":
        return {
            "weight": bytes_,
            "weight_scale": torch.tensor(2.0),
            "input_scale": torch.tensor(3.0),
        }
    if algo == "MXFP8":
        return {"weight": bytes_, "weight_scale": torch.zeros(rows, columns // 32).to(torch.uint8)}
    return {
        "weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        "weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.5),
        "input_scale": torch.tensor(0.25),
    }


def gptq(draft: Draft) -> None:
    for layer in draft.layers():
        rows, columns = draft.shape(layer)
        del draft.tensors[f"{layer}.weight"]
        draft.tensors |= {
            f"{layer}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            f"{layer}.qzeros": torch.zeros(columns // 128, rows // 8, dtype=torch.int32),
            f"{layer}.scales": torch.ones(columns // 128, rows, dtype=torch.float16),
            f"{layer}.g_idx": torch.zeros(columns, dtype=torch.int32),
        }
    settings = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    draft.config["quantization_config"] = {
        "quant_method": "gptq",
        **settings,
        "dynamic": {r"-:.*visual.*": {}},
    }


def awq(draft: Draft) -> None:
    for layer in draft.layers():
        rows, columns = draft.shape(layer)
        del draft.tensors[f"{layer}.weight"]
        draft.tensors |= {
            f"{layer}.qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
            f"{layer}.qzeros": torch.zeros(columns // 128, rows // 8, dtype=torch.int32),
            f"{layer}.scales": torch.ones(columns // 128, rows, dtype=torch.float16),
        }
    draft.config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["visual"],
    }


def cache(draft: Draft, strategy: str = "tensor", value: float = 0.05) -> None:
    """Calibrated scales of the KV cache."""
    shape = (2, 1, 1) if strategy == "attn_head" else (1,)
    for block in (0, 1):
        for side in "kv":
            name = f"model.layers.{block}.self_attn.{side}_scale"
            draft.tensors[name] = torch.full(shape, value)
    draft.section["kv_cache_scheme"] = {**ARGS, "strategy": strategy, "dynamic": False}


MADE: dict[str, Callable[[Draft], None]] = {
    "nvfp4": nvfp4,
    "mxfp4": mxfp4,
    "mxfp6": mxfp6,
    "mxfp8": mxfp8,
    "fp8-block": fp8_block,
    "fp8-naive": fp8_naive,
    "modelopt-fp8": modelopt("FP8"),
    "modelopt-nvfp4": modelopt("NVFP4"),
    "modelopt-mxfp8": modelopt("MXFP8"),
    "gptq": gptq,
    "awq": awq,
    "w5a16": packed(5, 128),
}


# -------------------------------------------------------------------------------------------- edits

Edit = Callable[[Draft], Any]


def setting(**fields: Any) -> Edit:
    return lambda draft: draft.section.update(fields)


def of_group(**fields: Any) -> Edit:
    return lambda draft: draft.group.update(fields)


def of_args(role: str = "weights", **fields: Any) -> Edit:
    return lambda draft: draft.group[role].update(fields)


def tensor(name: str, change: Callable[[Tensor], Tensor] | Tensor) -> Edit:
    def edit(draft: Draft) -> None:
        draft.tensors[name] = change if isinstance(change, Tensor) else change(draft.tensors[name])

    return edit


def without(*names: str) -> Edit:
    return lambda draft: [draft.tensors.pop(name) for name in names]


def both(*edits: Edit) -> Edit:
    def edit(draft: Draft) -> None:
        for one in edits:
            one(draft)

    return edit


def every(suffix: str, value: float) -> Edit:
    def edit(draft: Draft) -> None:
        for name in [n for n in draft.tensors if n.endswith(suffix)]:
            draft.tensors[name] = torch.full_like(draft.tensors[name], value)

    return edit


def split_group(**fields: Any) -> Edit:
    """Give one layer a group of its own."""

    def edit(draft: Draft) -> None:
        name = called(QUERY)
        draft.group["targets"].remove(name)
        group = {**draft.group, "targets": [name]}
        group["weights"] = group["weights"] | fields
        draft.section["config_groups"]["group_1"] = group

    return edit


def transform(**fields: Any) -> Edit:
    apply = {"targets": [f"re:(.*[.])?{re.escape('layers.0.mlp.down_proj')}$"], "location": "input"}
    scheme = {"type": "hadamard", "head_dim": 64, "apply": [apply | fields.pop("apply", {})]}
    return setting(transform_config={"config_groups": {"hadamard_64": scheme | fields}})


def unpack_words(draft: Draft) -> None:
    """As libraries before 0.18 packed five bits: six codes a word."""
    for layer in draft.layers():
        rows, columns = draft.tensors[f"{layer}.weight_shape"].tolist()
        words = -(-columns // 6)
        draft.tensors[f"{layer}.weight_packed"] = torch.zeros(rows, words, dtype=torch.int32)


def float_again(layer: str, rows: int, columns: int) -> Edit:
    def edit(draft: Draft) -> None:
        for name in [n for n in draft.tensors if n.startswith(f"{layer}.") and "bias" not in n]:
            del draft.tensors[name]
        draft.tensors[f"{layer}.weight"] = torch.zeros(rows, columns, dtype=torch.bfloat16)

    return edit


def ignoring(pattern: str) -> Edit:
    return lambda draft: draft.section["ignore"].append(pattern)


def untarget(name: str) -> Edit:
    return lambda draft: draft.group["targets"].remove(name)


def as_mixed(**algorithms: str) -> Edit:
    """A ModelOpt checkpoint of mixed precision, every layer of it listed."""

    def edit(draft: Draft) -> None:
        listed = {
            called(layer): {"quant_algo": algorithms.get(layer.rpartition(".")[2], "NVFP4")}
            for layer in draft.layers()
        }
        draft.section.update(quant_algo="MIXED_PRECISION", quantized_layers=listed)

    return edit


def in_file(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(draft: Draft) -> None:
        path = draft.folder / "hf_quant_config.json"
        content = read_json(path)
        change(content["quantization"])
        write_json(path, content)

    return edit


def narrow(draft: Draft) -> None:
    """A model whose MLP is 24 wider: no multiple of 16."""
    draft.config["text_config"]["intermediate_size"] = 280


def rename_blocks(draft: Draft, edit: Callable[..., None], **fields: Any) -> None:
    """An edit of the cache for checkpoints whose names on disk are module paths."""
    before = set(draft.tensors)
    edit(draft, **fields)
    for name in set(draft.tensors) - before:
        draft.tensors[called(name)] = draft.tensors.pop(name)
