"""Rules about checkpoints: clean ones pass, and every rule catches what it is there for.

Each case takes a checkpoint that is fine, changes one thing, and names the rule that must tell.
Layouts of other tools, and of number formats, are made here from their definition: names, shapes
and dtypes, with zeros for contents.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prismquant as pq
from prismquant.errors import ModelError
from prismquant.export.check import RULES, Reader, Report, Severity, check
from prismquant.export.check.findings import Problem, Rule, findings_of, folded
from prismquant.export.check.scheme import Args, Group, args_faults
from prismquant.export.check.vllm import scheme_class
from prismquant.recipe.schema import load_recipe
from prismquant.report.checks import findings_table, verdict
from prismquant.storage import INDEX_NAME, ShardReader, read_json, write_json, write_tensors

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


# ----------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def made(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A checkpoint of a family by preset, or by one of the formats above; ``float`` as it is."""
    cache_: dict[tuple[str, str], Path] = {}

    def get(name: str, family: str = "qwen2_vl") -> Path:
        if (name, family) not in cache_:
            cache_[name, family] = build(name, family)
        return cache_[name, family]

    def build(name: str, family: str) -> Path:
        source = tiny(family, dtype=torch.bfloat16)
        folder = tmp_path_factory.mktemp("made") / name
        if name == "float":
            return source
        if name in MADE:
            draft = drafted(source, folder)
            MADE[name](draft)
            return written(draft)
        recipe = load_recipe(name).with_rules({"solver": "rtn"})
        pq.quantize(source, recipe, folder, calibration_file)
        return folder

    return get


def rules_of(report: Report) -> set[str]:
    return {finding.rule for finding in report.findings}


# --------------------------------------------------------------------------------------- clean ones


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("preset", ["w4a16", "w8a8-all", "w8a8-static", "fp8"])
@pytest.mark.parametrize("target", [None, *Reader])
def test_what_we_write_for_servers_has_no_error_and_no_warning(
    made: Callable[[str, str], Path], preset: str, family: str, target: Reader | None
) -> None:
    report = check(made(preset, family), target)
    loud = [f for f in report.findings if f.severity is not Severity.NOTE]
    assert report.ok
    assert not loud
    assert report.layers >= 14


def test_a_family_that_vllm_does_not_have_is_refused_for_vllm_only(
    made: Callable[[str, str], Path],
) -> None:
    folder = made("w4a16", "video_llama_3")
    assert check(folder).ok
    assert check(folder, "transformers").ok
    assert {f.rule for f in check(folder, "vllm").errors} == {"model.vllm"}


@pytest.mark.parametrize("name", MADE)
def test_layouts_made_by_their_definition_have_no_error(
    made: Callable[..., Path], name: str
) -> None:
    """Their scales may be rounded: the definition leaves their dtype open."""
    report = check(made(name))
    assert report.ok, report.errors
    warned = {f.rule for f in report.findings if f.severity is Severity.WARNING}
    # lm_head is neither packed nor listed by the other two methods.
    assert warned <= {"tensors.scale-rounded", "modelopt.transformers"}


def test_a_float_checkpoint_is_told_to_be_one(made: Callable[..., Path]) -> None:
    report = check(made("float"))
    assert report.ok
    assert rules_of(report) == {"config.none"}
    assert report.layers == 0


def test_a_calibrated_cache_is_fine_by_tensor_and_by_head(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    for strategy in ("tensor", "attn_head"):
        draft = drafted(made("w4a16"), tmp_path / strategy)
        cache(draft, strategy)
        assert not {f.rule for f in check(written(draft)).findings if f.rule.startswith("kv")}


def test_a_model_that_is_not_known_still_has_its_grammar_checked(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    draft = drafted(made("w4a16"), tmp_path / "x")
    draft.config["model_type"] = "something_vl"
    draft.group["extra"] = 1
    report = check(written(draft))
    assert rules_of(report) == {"model.unknown", "config.unknown-key"}


# -------------------------------------------------------------------------------- one case a rule

Edit = Callable[[Draft], Any]


@dataclass(frozen=True)
class Case:
    """One thing that is wrong: the rule that must tell, where it begins, what is changed."""

    rule: str
    base: str
    edit: Edit
    target: str | None = None
    family: str = "qwen2_vl"


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


INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC_OUT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT4_TOKEN = INT8_TOKEN | {"num_bits": 4}

CASES = [
    # files, on top of the folder as it was written: see test_what_is_wrong_with_files_is_told
    Case("config.method", "w4a16", setting(quant_method="bitsandbytes")),
    Case("config.method-missing", "w4a16", lambda d: d.section.pop("quant_method")),
    Case("config.group-shape", "w4a16", of_group(targets="Linear")),
    Case("config.group-shape", "w4a16", setting(config_groups=["group_0"])),
    Case("config.unknown-key", "w4a16", of_args(calibrated=True)),
    Case("config.unknown-key", "w4a16", of_group(note="mine")),
    Case("config.top-key", "w4a16", setting(made_by="me")),
    Case("config.arguments", "w4a16", of_args(group_size=None)),
    Case("config.arguments", "w4a16", of_args(strategy="channel")),
    Case("config.arguments", "w4a16", of_args(strategy="rows", group_size=None)),
    Case("config.arguments", "w4a16", of_args(actorder="group")),
    Case("config.arguments", "w4a16", of_args(dynamic=True)),
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
    Case("tensors.extra", "w4a16", tensor(f"{QUERY}.weight_g_idx", torch.zeros(1)), "vllm"),
    Case("tensors.extra", "w8a8-all", tensor(f"{QUERY}.input_scale", torch.ones(1)), "vllm"),
    Case("tensors.prismquant-only", "w4a16", tensor(f"{DOWN}.split_index", torch.zeros(1)), "vllm"),
    Case("tensors.ungrouped", "w4a16", untarget(called(QUERY))),
    Case("tensors.plain", "w4a16", without("model.norm.weight")),
    Case("tensors.plain-shape", "w4a16", tensor("model.norm.weight", torch.ones(7))),
    Case("tensors.plain-shape", "float", tensor(f"{QUERY}.weight", lambda t: t.to(torch.int8))),
    Case("tensors.unknown", "w4a16", tensor("model.layers.7.mlp.extra", torch.ones(1))),
    Case("tensors.scalar", "w8a8-static", every(".input_scale", 0.0)),
    Case("tensors.scalar", "nvfp4", every(".weight_global_scale", float("inf"))),
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
    Case("vllm.w4a8-fp8-shape", "w4a16", of_group(input_activations=TOKEN), "vllm"),
    Case("vllm.outputs", "w8a8-all", of_group(output_activations=STATIC_OUT), "vllm"),
    Case("vllm.odd-bits", "w5a16", lambda d: None, "vllm"),
    Case("vllm.fp8", "fp8", lambda d: None, "vllm"),
    Case("vllm.nvfp4", "nvfp4", lambda d: None, "vllm"),
    Case("vllm.mx", "mxfp8", lambda d: None, "vllm"),
    Case("vllm.mx-inputs", "mxfp4", of_group(input_activations=None), "vllm"),
    Case("vllm.int8-blackwell", "w8a8-all", lambda d: None, "vllm"),
    Case("ct.dense-stream", "w5a16", lambda d: None),
    Case("ct.mxfp6", "mxfp6", lambda d: None),
    Case("transformers.asymmetric", "w4a16", of_args(symmetric=False), "transformers"),
    Case("sglang.kernels", "w4a16", lambda d: None, "sglang"),
    Case("model.vllm", "w4a16", lambda d: None, "vllm", "video_llama_3"),
    Case("model.unknown", "w4a16", lambda d: d.config.update(model_type="other_vl")),
    Case("config.none", "float", lambda d: None),
    Case("kv.arguments", "w4a16", both(cache, lambda d: d.section["kv_cache_scheme"].update(x=1))),
    Case(
        "kv.kind",
        "w4a16",
        both(cache, lambda d: d.section["kv_cache_scheme"].update(type="int")),
        "vllm",
    ),
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
        "modelopt.fields", "modelopt-nvfp4", in_file(lambda q: q.pop("kv_cache_quant_algo")), "vllm"
    ),
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


def narrow(draft: Draft) -> None:
    """A model whose MLP is 24 wider: no multiple of 16."""
    draft.config["text_config"]["intermediate_size"] = 280


def rename_blocks(draft: Draft, edit: Callable[..., None], **fields: Any) -> None:
    """An edit of the cache for checkpoints whose names on disk are module paths."""
    before = set(draft.tensors)
    edit(draft, **fields)
    for name in set(draft.tensors) - before:
        draft.tensors[called(name)] = draft.tensors.pop(name)


FILE_RULES = {
    *("files.shards", "files.index", "files.unindexed", "files.doubled", "files.total-size"),
    *("files.leftovers", "files.companions"),
}


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{number}-{case.rule}" for number, case in enumerate(CASES)]
)
def test_every_rule_tells_what_it_is_there_for(
    made: Callable[[str, str], Path], tmp_path: Path, case: Case
) -> None:
    draft = drafted(made(case.base, case.family), tmp_path / "x")
    case.edit(draft)
    report = check(written(draft), case.target)
    rule = next(rule for rule in RULES if rule.name == case.rule)
    told = [finding for finding in report.findings if finding.rule == case.rule]
    assert told, sorted(rules_of(report))
    assert all(
        finding.severity is rule.severity for finding in told if case.target or not rule.readers
    )
    assert all(finding.what and finding.where and finding.remedy for finding in told)
    assert report.ok == (not report.errors)


def test_every_rule_has_a_case() -> None:
    assert {rule.name for rule in RULES} == {case.rule for case in CASES} | FILE_RULES


def test_what_is_wrong_with_files_is_told(made: Callable[..., Path], tmp_path: Path) -> None:
    def told(change: Callable[[Path], Any]) -> set[str]:
        folder = tmp_path / "x"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made("w4a16"), folder)
        change(folder)
        return rules_of(check(folder))

    def cut(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:-10])

    def claim(folder: Path, **fields: Any) -> None:
        index = read_json(folder / INDEX_NAME)
        write_json(folder / INDEX_NAME, index | fields)

    def entry(folder: Path, name: str | None) -> None:
        index = read_json(folder / INDEX_NAME)
        first = min(index["weight_map"])
        if name is None:
            del index["weight_map"][first]
        else:
            index["weight_map"][name] = index["weight_map"][first]
        write_json(folder / INDEX_NAME, index)

    def double(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        shutil.copy(path, folder / "model-again.safetensors")

    def unfinished(folder: Path) -> None:
        record = read_json(folder / "prismquant" / "record.json")
        write_json(folder / "prismquant" / "record.json", record | {"finished": False})

    assert "files.shards" in told(cut)
    assert "files.shards" in told(lambda f: sorted(f.glob("*.safetensors"))[0].unlink())
    assert "files.shards" in told(lambda f: (f / INDEX_NAME).write_text("{"))
    assert "files.shards" in told(lambda f: claim(f, weight_map=[]))
    assert "files.shards" in told(lambda f: [p.unlink() for p in f.glob("model*")])
    assert "files.index" in told(lambda f: entry(f, "model.ghost"))
    assert "files.unindexed" in told(lambda f: entry(f, None))
    assert "files.doubled" in told(double)
    assert "files.total-size" in told(lambda f: claim(f, metadata={"total_size": 1}))
    assert "files.leftovers" in told(lambda f: (f / ".config.json.a1.tmp").touch())
    assert "files.leftovers" in told(unfinished)
    assert "files.companions" in told(lambda f: [p.unlink() for p in f.glob("tokenizer*")])
    assert "files.companions" in told(lambda f: [p.unlink() for p in f.glob("*processor*")])


# ------------------------------------------------------------------------------------- other parts


def test_a_folder_without_a_config_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        check(tmp_path / "none")
    with pytest.raises(ModelError, match=r"config\.json is missing") as caught:
        check(tmp_path)
    assert "--resume" in str(caught.value.remedy)


def test_no_weight_is_read(made: Callable[..., Path], tmp_path: Path) -> None:
    """Shards that are headers and holes are as good as whole ones."""
    folder = tmp_path / "x"
    shutil.copytree(made("w8a8-static"), folder)
    before = check(folder).to_dict()["findings"]
    small = {name for name, info in headers(folder).items() if info.nbytes <= 1024}
    for path in folder.glob("*.safetensors"):
        hollow(path, small)
    assert check(folder).to_dict()["findings"] == before


def headers(folder: Path) -> dict[str, Any]:
    reader = ShardReader(folder)
    return {name: reader.info(name) for name in reader.names}


def hollow(path: Path, keep: set[str]) -> None:
    """Overwrite the data of large tensors with ones."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name not in keep and name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            data[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(bytes(data))


def test_what_only_some_reader_refuses_is_a_warning_for_nobody_in_particular() -> None:
    rule = Rule("a.b", Severity.ERROR, "says", lambda c: [Problem("x")], (Reader.VLLM,))
    assert findings_of(rule, [Problem("x")], None)[0].severity is Severity.WARNING
    assert findings_of(rule, [Problem("x")], Reader.VLLM)[0].severity is Severity.ERROR
    assert rule.concerns(None)
    assert not rule.concerns(Reader.TRANSFORMERS)


def test_places_are_folded() -> None:
    assert folded(("a",)) == "a"
    assert folded(("a", "b", "c")) == "a and 2 more"


def test_rules_have_names_and_say_something() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]+[.][a-z0-9-]+", name) for name in names)
    assert all(rule.says for rule in RULES)


def test_the_documentation_lists_every_rule_with_its_severity() -> None:
    text = (Path(__file__).parent.parent / "docs" / "check.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip("` "): cells[1].strip()
        for line in text.splitlines()
        if line.startswith("| `") and (cells := line.strip("|").split("|"))
    }
    assert rows == {rule.name: str(rule.severity) for rule in RULES}


def test_the_table_has_a_row_a_finding_and_survives_brackets(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    draft = drafted(made("w4a16"), tmp_path / "x")
    draft.section["ignore"].append("re:.*[/red]x[bold]")
    report = check(written(draft))
    table = findings_table(report)
    assert table is not None
    assert table.row_count == len(report.findings)
    assert "[/red]" in report.findings[0].where[0]
    assert f"{report.count(Severity.WARNING)} warning" in verdict(report)


def test_the_report_is_json(made: Callable[..., Path]) -> None:
    content = json.loads(json.dumps(check(made("w8a8-all"), "vllm").to_dict()))
    assert content["ok"] is True
    assert content["for"] == "vllm"
    assert content["quantized_layers"] == 24
    assert {finding["rule"] for finding in content["findings"]} == {"vllm.int8-blackwell"}


@pytest.mark.parametrize(
    ("weights", "inputs", "layout", "expected"),
    [
        (("int", 4, "group", 128), None, "pack-quantized", "WNA16"),
        (("int", 4, "channel", None), ("int", 8, "token"), "pack-quantized", "WNA8Int"),
        (("int", 4, "channel", None), ("int", 4, "token"), "pack-quantized", "WNA4Int"),
        (("int", 4, "channel", None), ("int", 8, "token"), "int-quantized", "W4A8Int"),
        (("int", 4, "channel", None), ("int", 8, "tensor"), "pack-quantized", None),
        (("int", 8, "channel", None), ("int", 8, "token"), "int-quantized", "W8A8Int8"),
        (("int", 8, "tensor", None), ("int", 8, "tensor"), "int-quantized", "W8A8Int8"),
        (("int", 8, "group", 128), ("int", 8, "token"), "int-quantized", None),
        (("int", 6, "channel", None), ("int", 8, "token"), "int-quantized", None),
        (("float", 8, "channel", None), ("float", 8, "token"), "float-quantized", "W8A8Fp8"),
        (("float", 8, "group", 128), ("float", 8, "token"), "float-quantized", None),
        (("float", 8, "channel", None), None, "naive-quantized", "W8A16Fp8"),
        (("float", 4, "tensor_group", 16), None, "nvfp4-pack-quantized", "W4A4Fp4"),
        (("float", 4, "group", 32), None, "mxfp4-pack-quantized", "W4A4Mxfp4"),
        (("float", 4, "group", 32), ("float", 8, "token"), "mxfp4-pack-quantized", "W4A8Mxfp4"),
        (("float", 6, "group", 32), None, "mxfp6-pack-quantized", None),
        (("int", 4, "group", 128), ("float", 8, "token"), "pack-quantized", "W4A8Fp8"),
    ],
)
def test_schemes_of_vllm(
    weights: tuple[str, int, str, int | None],
    inputs: tuple[str, int, str] | None,
    layout: str,
    expected: str | None,
) -> None:
    """What vLLM's own code chose when it was run on checkpoints with these configurations."""
    kind, bits, strategy, size = weights
    given = Args(bits, kind, True, strategy, size)
    read = (
        Args(inputs[1], inputs[0], True, inputs[2], dynamic=inputs[2] == "token")
        if inputs
        else None
    )
    group = Group("g", ("Linear",), layout, True, given, read, None, True)
    assert scheme_class(group) == (f"CompressedTensors{expected}" if expected else None)


def test_arguments_that_infer_their_strategy_are_no_fault() -> None:
    assert not args_faults({"num_bits": 4, "group_size": 128}, "weights")
    assert not args_faults({"num_bits": 4, "group_size": -1}, "weights")
    assert not args_faults({}, "weights")
    assert not args_faults(None, "weights")
    assert args_faults("int4", "weights") == ["is a str, not an object"]
