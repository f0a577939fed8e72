"""Quantize the embedded model and print what was lost.

    python examples/quantize_and_compare.py OUT

Replace the embedded model and its generated questions by your own: a folder with config.json and
*.safetensors, and a JSONL file of chat messages (see README.md).
"""

import sys
from pathlib import Path

import prismquant as pq
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import write_dataset

out = Path(sys.argv[1])
calibration = write_dataset(out / "calibration", split="calibration", count=64)
evaluation = write_dataset(out / "evaluation", split="evaluation", count=200)

result = pq.quantize(CHECKPOINT, recipe="w4a16", calibration=calibration, out=out / "w4a16")
print(f"{result.plan.float_bytes} bytes became {result.plan.total_bytes}")

fidelity = pq.measure(out / "w4a16", evaluation, reference=CHECKPOINT)
answers = fidelity.overall.divergence["answer"]
overall = fidelity.overall
print(f"exact match {overall.exact_match:.3f}, was {overall.reference_exact_match:.3f}")
print(f"KL to the float model {answers.kl:.5f} nats a token; same first choice {answers.top1:.4f}")
print(f"answers lost {len(fidelity.right_to_wrong)}, won {len(fidelity.wrong_to_right)}")

model, processor = pq.load(out / "w4a16")
print(f"loaded again: {type(model).__name__} with {type(processor).__name__}")
