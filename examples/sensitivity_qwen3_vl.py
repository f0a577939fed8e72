"""Which layers of a Qwen3-VL suffer from W4A8, and the W4A8 checkpoint itself.

    python examples/sensitivity_qwen3_vl.py MODEL CALIB.jsonl OUT

W4: integers, one symmetric scale for each output channel, narrow range (-7 .. 7). A8: integers, a
scale for each token as it arrives, narrow range (-127 .. 127). The head is ignored, and so are
`vpm` and `resampler.*` of models that have them. Every unit of choice is scored in this format
against leaving it alone: by squared gradients of the answers and by the KL divergence that it makes
alone, for the language model only and for all towers. Then the fixed recipe makes the checkpoint.

The same on the command line, method by method:

    prismquant analyze MODEL --calib CALIB.jsonl --formats int4-channel-narrow+int8-token-narrow \\
        --disable '*lm_head*' --disable vpm --disable 'resampler.*' --modalities llm \\
        --method kl_div --out OUT/llm-kl_div.json
"""

import json
import sys
from pathlib import Path

import prismquant as pq

W4A8 = "int4-channel-narrow+int8-token-narrow"
IGNORED = ["*lm_head*", "vpm", "resampler.*"]
COVERAGE = {"llm": ["llm"], "all": ["vision", "projector", "llm"]}
SHOWN = 5

RECIPE = {
    "name": "w4a8-narrow",
    "rules": [
        {
            "weights": "int4-channel-narrow",
            "activations": "int8-token-narrow",
            "weight_range": "mse",
            "solver": "gptq",
        },
        # No checkpoint format declares a quantized input for a convolution.
        {"match": {"role": "patch_embed"}, "activations": "none"},
        {"match": {"role": "lm_head"}, "skip": True},
    ],
}


def main(model: Path, calibration: Path, out: Path) -> None:
    """Write OUT/sensitivity.json, a file for each analysis, and the checkpoint OUT/w4a8."""
    out.mkdir(parents=True, exist_ok=True)
    ranking: dict[str, dict[str, dict[str, float]]] = {}
    for coverage, modalities in COVERAGE.items():
        for method in ("gradient", "kl_div"):
            found = pq.analyze(
                model,
                formats=W4A8,
                out=out / f"{coverage}-{method}.json",
                calibration=calibration,
                method=method,
                modalities=modalities,
                disable=IGNORED,
            )
            losses = {
                unit.name: option.scores["answer"].loss
                for unit in found.units
                for option in unit.options[1:]
            }
            worst = dict(sorted(losses.items(), key=lambda item: -item[1]))
            ranking.setdefault(coverage, {})[method] = worst
            print(f"{coverage}, {method}: {len(worst)} units, the most sensitive:")
            for name, loss in list(worst.items())[:SHOWN]:
                print(f"  {loss:.3g}  {name}")
    (out / "sensitivity.json").write_text(json.dumps(ranking, indent=2))

    result = pq.quantize(model, RECIPE, out / "w4a8", calibration)
    plan = result.plan
    print(f"{out / 'w4a8'}: {plan.float_bytes} bytes became {plan.total_bytes}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
