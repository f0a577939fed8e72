"""Scores and mixes of ModelOpt's ``auto_quantize``, in an environment of its own.

    python -m bench.search.modelopt MODEL SAMPLES OUT.json --method gradient|kl_div --bits 2.5 3
        [--formats 2 3 4] [--group-size 32]

MODEL is a float checkpoint, SAMPLES a folder of one safetensors file a sample: what the model is
given, and ``labels`` with -100 wherever no answer is. Formats are integers in groups, weights
alone, rounded to nearest. Nothing is imported from prismquant.
"""

from __future__ import annotations

from typing import Any

import modelopt
import modelopt.torch.quantization as mtq

from bench.peers.worker import declare_torchvision_operators, stopwatch
from bench.search.tool_worker import arguments, float_model, samples, spent, tell

# A convolution cannot be rounded in groups: it stays as it is, as it does with ours.
LEFT_ALONE = ["*patch_embed*"]
METHOD = {"choices": ["gradient", "kl_div"], "default": "gradient"}


def format_of(bits: int, group_size: int) -> dict[str, Any]:
    """Configuration of a weight format: integers in groups along the input."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": {"num_bits": bits, "block_sizes": {-1: group_size}},
                "enable": True,
            },
        ],
        "algorithm": "max",
    }


def chosen_bits(state: dict[str, Any], bits: float) -> dict[str, int]:
    """Bits of each module in the mix that its solver finds, but for those that are left alone."""
    entries = mtq.get_auto_quantize_config(state, {"effective_bits": bits})["quant_cfg"]
    suffix = ".weight_quantizer"
    return {
        entry["quantizer_name"].removesuffix(suffix): int(entry["cfg"]["num_bits"])
        for entry in entries
        if entry["quantizer_name"].endswith(suffix) and entry.get("cfg") and entry["enable"]
    }


def main() -> None:
    """Score once, then choose at each budget."""
    options = arguments(__doc__ or "", method=METHOD)
    library = declare_torchvision_operators()
    model = float_model(options.model)
    loader = samples(options.samples)
    divergence = options.method == "kl_div"
    watch = stopwatch()
    tied = getattr(model.config, "tie_word_embeddings", False)
    left_alone = [*LEFT_ALONE, *(["*lm_head*"] if tied else [])]
    cost = {"excluded_module_name_patterns": left_alone}
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": options.bits[0], "cost": cost},
        quantization_formats=[format_of(bits, options.group_size) for bits in options.formats],
        data_loader=loader,
        # Divergences are of logits, and losses of what the model makes of its labels.
        forward_step=lambda m, batch: m(**batch).logits if divergence else m(**batch),
        loss_func=None if divergence else lambda output, batch: output.loss,
        disabled_layers=left_alone,
        num_calib_steps=len(loader),
        num_score_steps=len(loader),
        method=options.method,
        verbose=False,
    )
    took = spent(watch)
    del library
    chosen = {bits: chosen_bits(state, bits) for bits in options.bits}
    groups = {
        name: {
            "modules": list(stats["module_names"]),
            "formats": [str(one) for one in stats["formats"]],
            "scores": [float(score) for score in stats["scores"]],
        }
        for name, stats in state["candidate_stats"].items()
    }
    told = {"version": modelopt.__version__, **took, "groups": groups, "chosen": chosen}
    tell(options.out, told)


if __name__ == "__main__":
    main()
