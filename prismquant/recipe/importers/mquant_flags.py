"""Flags of MQuant's drivers and of its VideoLLaMA3 fork, each with its default and meaning."""

from __future__ import annotations

from collections.abc import Mapping

from prismquant.recipe.importers.source_section import Setting, Table, idle

_NEVER = "never read there"
_FOLDED = "norms are folded where a rotation asks for it, and only there"

QUANTIZED: Table = (
    Setting("quant", "false", "rules", "without it nothing is quantized"),
    Setting("quant_visual_clip", "false", "match.modality: vision"),
    Setting("quant_cross_attention", "false", "match.modality: projector"),
    Setting("quant_visual_projector", "false", "match.modality: projector", "of the fork"),
    Setting("quant_llm", "false", "match.modality: llm"),
    Setting("skip_names", "[]", "skip: true", "parts of names, of every layer"),
)
WEIGHTS: Table = (
    Setting("visual_w_bits", "4; qwenvl, minicpmv 16", "weights", "16: left alone"),
    Setting("llm_w_bits", "4; qwenvl, minicpmv 16", "weights", "16: left alone"),
    Setting("visual_w_rtn", "false", "solver: rtn"),
    Setting("llm_w_rtn", "false", "solver: rtn"),
    Setting("visual_w_clip", "false", "weight_range: mse"),
    Setting("llm_w_clip", "false", "weight_range: mse"),
    Setting("w_groupsize", "-1", "weights", "of GPTQ alone; of the original order of columns"),
    Setting("w_asym", "false", "weights", "without: scale absmax / (2^(b-1) - 1)"),
    Setting("percdamp", "0.01", "options.damping", "of the mean of the diagonal"),
    Setting("act_order", "false", "options.order", "activation or original"),
)
INPUTS: Table = (
    Setting("visual_a_bits", "8; qwenvl, minicpmv 16", "activations", "16: none"),
    Setting("llm_a_bits", "8; qwenvl, minicpmv 16", "activations", "16: none"),
    Setting("visual_static", "false", "activations", "of the tensor, symmetric"),
    Setting("llm_static", "false", "activations", "of the tensor, symmetric"),
    Setting("a_groupsize", "-1", "activations", "of dynamic scales alone"),
    Setting("a_asym", "false", "activations", "of dynamic scales alone"),
    Setting("a_clip_ratio", "1.0", "", "below 1 dropped: dynamic scales clip nothing"),
    Setting("act_per_tensor", "false", "activations", "dynamic ones become per token"),
    idle("observer_type", "always minmax there", "activation_range: minmax", "minmax"),
    idle("calibration_mode", "always layer_wise there", default="layer_wise"),
)
TRANSFORMS: Table = (
    Setting("rotate", "false", "transforms: rotation"),
    Setting("rotate_visual_clip", "false", "match.modality: vision"),
    Setting("rotate_llm", "false", "match.modality: llm"),
    Setting("rotate_mode", "hadamard", "options.kind"),
    Setting("online_visual_hadamard", "false", "options.online", "in blocks, without padding"),
    Setting("online_llm_hadamard", "false", "options.online", "in blocks, without padding"),
    Setting("visual_split", "false", "transforms: split", "the column is measured"),
    Setting("llm_split", "false", "transforms: split", "the column is measured"),
    *(
        idle(name, "a projector follows its neighbours")
        for name in ("rotate_visual_cross_attn", "rotate_visual_projector")
    ),
    idle("rotate_visual_encoder", "commented out in the fork", "rotate_visual_clip"),
    idle("fp32_had", "the precision of a layer is that of the run"),
    *(
        idle(name, _FOLDED)
        for name in (
            *("not_fuse_layer_norms", "no_fuse_visual_clip", "no_fuse_visual_cross_attn"),
            *("no_fuse_llm", "no_fuse_visual_encoder", "no_fuse_visual_projector"),
        )
    ),
)
CALIBRATION: Table = (
    Setting("nsamples", "8; minicpmv 128", "calibration.samples", "the larger of both"),
    Setting("calib_num", "32", "calibration.samples", "the larger of both"),
    Setting("seed", "42", "calibration.seed"),
    idle("dataset_name", "named on the command line", "--calib"),
    idle("local_dataset_file", "named on the command line", "--calib"),
    idle("calib_mode", "read by no driver there", default="v2"),
)
OTHERS: Table = (
    Setting("load_gptq", "", "", "an error: no pickle is ever read"),
    idle("dump_gptq", "the result is a folder", "--out"),
    idle("model_name", "named on the command line", "MODEL"),
    idle("name", "named on the command line", "MODEL"),
    idle("int8_down_proj", "read by one driver alone", "a rule with role: mlp.down, bits: 8"),
    idle("max_new_tokens", "about evaluation", "prismquant eval"),
    idle("verbose", "progress is always shown"),
    *(
        idle(name, _NEVER)
        for name in (
            *("demo", "eval_num", "analysis", "analysis_c_proj", "analysis_num", "analysis_mode"),
            *("draw_save_path", "real", "real_mllm", "test_static", "test_time", "aifs", "ttif"),
            *("multi_moda", "batchsize", "eval_textVQA", "eval_docVQA", "max_sample_num"),
            *("generate_method", "answer_path"),
        )
    ),
)
TABLES: Mapping[str, Table] = {
    "Which parts": QUANTIZED,
    "Weights": WEIGHTS,
    "Activations": INPUTS,
    "Rotations and splits": TRANSFORMS,
    "Calibration": CALIBRATION,
    "Others": OTHERS,
}
FLAGS: Mapping[str, Setting] = {
    setting.name: setting for table in TABLES.values() for setting in table
}
"""All flags by name."""

VALUES: Mapping[str, type] = {
    **dict.fromkeys(
        (
            *("visual_w_bits", "llm_w_bits", "visual_a_bits", "llm_a_bits", "w_groupsize"),
            *("a_groupsize", "nsamples", "calib_num", "seed", "max_new_tokens", "eval_num"),
            *("analysis_num", "batchsize", "max_sample_num"),
        ),
        int,
    ),
    **dict.fromkeys(("percdamp", "a_clip_ratio"), float),
    **dict.fromkeys(
        (
            *("rotate_mode", "observer_type", "calibration_mode", "dataset_name", "calib_mode"),
            *("local_dataset_file", "load_gptq", "dump_gptq", "model_name", "name"),
            *("analysis_mode", "draw_save_path", "generate_method", "answer_path"),
        ),
        str,
    ),
}
"""Flags that take a value, and of which type; the others are on or off."""
