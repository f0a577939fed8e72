"""Quantize a model in memory with MQuant's function, and see what it answers.

    python examples/mquant_drop_in.py OUT

A script of MQuant changes one import. Here the embedded model stands for Qwen2-VL, and a file of
questions for a dataset of VLMEvalKit.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import prismquant as pq
from prismquant.compat.mquant import qwen2vl_rtn_gptq_fwrd_plus
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset


class Questions:
    """Rows and prompts, as VLMEvalKit's datasets have them."""

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        self.data = SimpleNamespace(iloc=[json.loads(line) for line in file.open()])

    def build_prompt(self, row: dict) -> list[dict]:
        content = row["messages"][0]["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return [{"type": item["type"], "value": self.value(item)} for item in items]

    def value(self, item: dict) -> str | list[str]:
        shown = item[item["type"]]
        if item["type"] == "text":
            return shown
        frames = [
            str(self.folder / name) for name in ([shown] if isinstance(shown, str) else shown)
        ]
        return frames if isinstance(shown, list) else frames[0]


out = Path(sys.argv[1])
questions = Questions(write_dataset(out / "calibration", split="calibration", count=16))
evaluation = write_dataset(out / "evaluation", split="evaluation", count=32)

parser = argparse.ArgumentParser()
for flag in ("quant_llm", "quant_visual_clip", "quant_cross_attention", "llm_static", "act_order"):
    parser.add_argument(f"--{flag}", action="store_true")
for flag in ("visual_w_bits", "llm_w_bits", "nsamples", "calib_num"):
    parser.add_argument(f"--{flag}", type=int)
words = "--quant_llm --quant_visual_clip --quant_cross_attention --visual_w_bits 8 --llm_w_bits 4"
args = parser.parse_args(f"{words} --llm_static --act_order --nsamples 16".split())

model, processor = pq.load(CHECKPOINT)
wrapper = SimpleNamespace(model=model, processor=processor)
quantizers = qwen2vl_rtn_gptq_fwrd_plus(
    wrapper, questions, "cpu", "Questions", args, out=out / "checkpoint"
)
name, quantizer = next(iter(quantizers.items()))
print(f"{len(quantizers)} quantizers; {name}: {quantizer.bits} bits, scale {quantizer.scale.shape}")

# The same numbers as a checkpoint, which servers load.
fidelity = pq.measure(out / "checkpoint", evaluation, reference=CHECKPOINT)
overall = fidelity.overall
print(f"exact match {overall.exact_match:.3f}, was {overall.reference_exact_match:.3f}")
