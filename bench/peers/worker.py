"""What the workers share: their arguments, the samples, and the checkpoint they leave.

A worker runs in an environment of its own, with the repository's root as working directory, and
imports nothing from prismquant. It leaves the rounded weights in floating point, so that one
yardstick measures all tools, and ``peer.json`` with what it took.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

REPORT = "peer.json"
# Gates of linear attention, with an output for each head: all tools leave them in floating point.
SMALL = ("linear_attn.in_proj_a", "linear_attn.in_proj_b")


def arguments(description: str, methods: Sequence[str]) -> argparse.Namespace:
    """Arguments that all workers take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="folder of the float checkpoint")
    parser.add_argument("calibration", type=Path, help="JSON lines of samples")
    parser.add_argument("out", type=Path, help="folder of the result")
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--bits", type=int, default=4, help="of the weights")
    parser.add_argument("--group-size", type=int, default=128, help="0: one scale a row")
    parser.add_argument("--activation-bits", type=int, default=0, help="0: not quantized")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=200, help="of a method that trains")
    return parser.parse_args()


def declare_torchvision_operators() -> torch.library.Library:
    """Let a torchvision that was built for another torch be imported; keep what this returns."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def conversations(path: Path, count: int) -> list[list[dict[str, Any]]]:
    """Messages of the first ``count`` samples, their pictures as absolute paths.

    Raises:
        ValueError: A sample has more than one picture, or a clip; or only some have a picture.
    """
    found, kinds = [], set()
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        messages = json.loads(line)["messages"]
        kind = tuple(sorted(item["type"] for item in _items(messages)))
        if kind not in {("image", "text"), ("text",), ()}:
            raise ValueError(f"{path}: a sample has more than one picture and one text")
        kinds.add("image" in kind)
        for item in _items(messages):
            if item["type"] == "image":
                item["image"] = str((path.parent / item["image"]).resolve())
        found.append(messages)
    if len(kinds) > 1:
        raise ValueError(f"{path}: some samples have a picture and some have none")
    return found


def _items(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Texts and pictures of messages; those whose content is plain text have none."""
    return [item for m in messages if isinstance(m["content"], list) for item in m["content"]]


def encode(messages: list[dict[str, Any]], processor: Any) -> dict[str, torch.Tensor]:
    """The model's inputs for one conversation, as a batch of one."""
    from PIL import Image

    pictures = [Image.open(one["image"]) for one in _items(messages) if one["type"] == "image"]
    text = processor.apply_chat_template(messages, tokenize=False)
    return dict(processor(text=[text], images=pictures or None, return_tensors="pt"))


def float_model(folder: Path) -> Any:
    """The checkpoint in float32: on a CPU the arithmetic that favours every tool."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def language_linears(model: torch.nn.Module) -> list[str]:
    """Module paths of the linear layers of the language model's blocks that tools quantize."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and "language_model.layers." in name
        and not name.endswith(SMALL)
    ]


def experts_modules(model: torch.nn.Module) -> list[str]:
    """Module paths of experts whose matrices lie in two tensors, gate over up and down."""
    return [
        name
        for name, module in model.named_modules()
        if {"gate_up_proj", "down_proj"} <= dict(module.named_parameters(recurse=False)).keys()
    ]


def with_experts_together(
    parameters: Mapping[str, torch.Tensor], model: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """The parameters, and experts' tensors made of the matrices that tools have split them into.

    Args:
        parameters: Those of each expert as ``PATH.NUMBER.gate_proj.weight``, if they were split.
        model: As it is in transformers, its experts together.
    """
    found = dict(parameters)
    for path in experts_modules(model):
        numbers = range(len(model.get_parameter(f"{path}.down_proj")))
        if f"{path}.0.down_proj.weight" in found:
            gates, ups, downs = (
                [found.pop(f"{path}.{number}.{leaf}.weight") for number in numbers]
                for leaf in ("gate_proj", "up_proj", "down_proj")
            )
            pairs = zip(gates, ups, strict=True)
            found[f"{path}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
            found[f"{path}.down_proj"] = torch.stack(downs)
    return found


def language_matrices(model: torch.nn.Module) -> list[torch.Tensor]:
    """Weights [out, in] of the language model's blocks, those of each expert by itself."""
    found = [model.get_parameter(f"{name}.weight") for name in language_linears(model)]
    experts = [model.get_submodule(path) for path in experts_modules(model)]
    together = [tensor for one in experts for tensor in one.parameters(recurse=False)]
    return [*found, *(matrix for tensor in together for matrix in tensor)]


def stopwatch() -> Callable[[], dict[str, float]]:
    """Start; what is returned tells the seconds since, by the clock and of this process's CPUs."""
    clock, cpu = time.perf_counter(), time.process_time()
    return lambda: {
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - cpu,
    }


def most_levels(weight: torch.Tensor, group_size: int) -> int:
    """The largest number of distinct values among weights [out, in] that share a scale."""
    groups = weight.reshape(-1, group_size or weight.shape[1]).sort(dim=1).values
    return int((groups.diff(dim=1) != 0).sum(dim=1).max()) + 1


def save(
    options: argparse.Namespace,
    parameters: Mapping[str, torch.Tensor],
    processor: Any,
    took: Mapping[str, float],
    packages: Sequence[str],
) -> None:
    """Write the float model with the parameters put in, and the report.

    Args:
        options: From :func:`arguments`.
        parameters: By their names in the transformers model, those of experts as it has them or one
            by one; those missing stay as they were.
        processor: Goes into the folder too.
        took: From :func:`stopwatch`.
        packages: Whose versions are reported.

    Raises:
        ValueError: A layer's weights take more values than the bits allow.
    """
    model = float_model(options.model)
    parameters = with_experts_together(parameters, model)
    changed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = parameters.get(name, parameter).to(parameter.dtype)
            changed += not torch.equal(value, parameter)
            parameter.copy_(value)
        matrices = language_matrices(model)
        levels = max(most_levels(matrix, options.group_size) for matrix in matrices)
    if levels > 2**options.bits:
        raise ValueError(f"{levels} values share a scale: more than {options.bits} bits hold")
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    figures = {"layers": len(matrices), "changed_parameters": changed, "most_levels": levels}
    write_report(options.out, {**took, **figures}, packages)


def write_report(out: Path, figures: Mapping[str, Any], packages: Sequence[str]) -> None:
    """Write ``peer.json``: figures, threads, and the versions of torch and of these packages."""
    report = {
        **figures,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", *packages)},
    }
    (out / REPORT).write_text(json.dumps(report), encoding="utf-8")
