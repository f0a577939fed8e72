"""GPTQ by llm-compressor on a Qwen2-VL, for comparison; run it in an environment of its own.

    python -m venv peer && peer/bin/pip install llmcompressor==0.14.0.1
    peer/bin/python bench/peers/llm_compressor.py MODEL CALIBRATION.jsonl OUT [--bits 4]

Only samples with a picture are used: its tracing fails on a set that mixes pictures and clips. OUT
holds the rounded weights in floating point, so that ``prismquant eval OUT --reference MODEL``
measures them as it measures ours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch


def declare_torchvision_operators() -> torch.library.Library:
    """Let a torchvision that was built for another torch be imported."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def calibration_rows(path: Path, processor: Any, count: int) -> list[dict[str, Any]]:
    """Processor outputs of the first samples that have a picture, as nested lists."""
    from PIL import Image

    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        items = [item for m in messages if isinstance(m["content"], list) for item in m["content"]]
        pictures = [Image.open(path.parent / i["image"]) for i in items if i["type"] == "image"]
        if pictures and len(rows) < count:
            text = processor.apply_chat_template(messages, tokenize=False)
            encoded = processor(text=[text], images=pictures, return_tensors="pt")
            rows.append({key: value.tolist() for key, value in encoded.items()})
    return rows


def one_sample(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate a batch of one."""
    return {key: torch.tensor(value) for key, value in batch[0].items()}


def main() -> None:
    """Quantize and write the rounded weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    options = parser.parse_args()
    _operators = declare_torchvision_operators()  # gone as soon as nothing holds it
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, original = (
        AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
        for _ in range(2)
    )
    processor = AutoProcessor.from_pretrained(options.model)
    rows = calibration_rows(options.calibration, processor, options.samples)
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
    }
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["re:.*lm_head", "re:.*visual.*"],
    )
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        data_collator=one_sample,
        processor=processor,
        num_calibration_samples=len(rows),
        sequential_targets=["Qwen2VLDecoderLayer"],
    )
    rounded = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            parameter.copy_(rounded[name])
    original.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"{len(rows)} samples; written: {options.out}")


if __name__ == "__main__":
    main()
