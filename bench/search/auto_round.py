"""Scores and mixes of AutoRound's ``AutoScheme``, in an environment of its own.

    python -m bench.search.auto_round MODEL SAMPLES OUT.json --bits 2.5 3
        [--formats 2 3 4] [--group-size 32]

MODEL is a float checkpoint, SAMPLES a folder of one safetensors file a sample: what the model is
given, and ``labels`` with -100 wherever no answer is. Formats are symmetric integers in groups,
weights alone, rounded to nearest. Nothing is imported from prismquant.

Called as its users call it, on a model that sees, AutoScheme scores the language model alone, by
texts of its own choice; asked for the vision tower, it takes pictures of a data set that it
downloads. So the list of layers, all towers', is handed to it here, and its loader gives our
samples, clips among them. The rest is its own: one pass forth and back for each format, with all
layers rounded at once; a layer's score is the sum of |gradient of its weight x change of its
weight|; the mix is found by its dynamic programming. A mean counts the codes of the weights alone,
without scales (``ignore_scale_zp_bits``), which take the same room in each format.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from bench.peers.worker import declare_torchvision_operators, stopwatch
from bench.search.tool_worker import arguments, float_model, samples, spent, tell

# Servers load them as one matrix; AutoScheme lets its user say so.
SHARED = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]

Scores = dict[str, list[float]]


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Module paths of all linear layers, but for a head that is tied to the embeddings."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    return [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and not (tied and name == "lm_head")
    ]


def groups_of(scores: list[Scores]) -> dict[str, dict[str, Any]]:
    """Scores of layers added over those that share a format; the last is to leave them alone.

    Args:
        scores: For each format by layer: bits, and the loss.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name in scores[0]:
        front, _, last = name.rpartition(".")
        shared = next((group for group in SHARED if last in group), [last])
        empty = {"modules": [], "scores": [0.0] * (len(scores) + 1)}
        group = groups.setdefault(f"{front}.{shared[0]}", empty)
        group["modules"].append(name)
        for place, one in enumerate(scores):
            group["scores"][place] += one[name][1]
    return groups


def main() -> None:
    """Score once, then choose at each budget."""
    options = arguments(__doc__ or "")
    library = declare_torchvision_operators()
    from auto_round.auto_scheme import delta_loss
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
    from auto_round.compressors.mllm import dataset
    from auto_round.schemes import preset_name_to_scheme
    from transformers import AutoProcessor

    model = float_model(options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    # It looks into the first sample alone, whether there are pictures at all; sums have no order.
    loader = sorted(samples(options.samples), key=lambda one: "pixel_values" not in one)
    dataset.get_mllm_dataloader = lambda **_: (loader, None, None, None)
    # Its files of scores know the folder of the model, but not which samples are in the loader.
    model.config._name_or_path = None
    known: dict[str, Scores] = {}
    scored = delta_loss.get_score_for_scheme

    def once(*args: Any, scheme_tag: str, **more: Any) -> Scores:
        if scheme_tag not in known:
            known[scheme_tag] = scored(*args, scheme_tag=scheme_tag, **more)
        return {name: list(score) for name, score in known[scheme_tag].items()}

    delta_loss.get_score_for_scheme = once
    scheme = AutoScheme(
        avg_bits=list(options.bits),
        options=[
            replace(preset_name_to_scheme("W4A16"), bits=bits, group_size=options.group_size)
            for bits in options.formats
        ],
        shared_layers=SHARED,
        ignore_scale_zp_bits=True,
        nsamples=len(loader),
        batch_size=1,
        low_gpu_mem_usage=False,
        enable_torch_compile=False,
    )
    watch = stopwatch()
    generator = GenScheme(
        scheme,
        model,
        linear_layers(model),
        {},
        dataset=str(options.samples),
        device_map="cpu",
        tokenizer=processor.tokenizer,
        enable_torch_compile=False,
        processor=processor,
    )
    layers = generator.get_layer_config()
    took = spent(watch)
    del library
    chosen = {
        bits: {name: int(config["bits"]) for name, config in layers[bits].items()}
        for bits in options.bits
    }
    groups = groups_of([known[tag] for tag in sorted(known)])
    told = {"version": version("auto-round"), **took, "groups": groups, "chosen": chosen}
    tell(options.out, told)


if __name__ == "__main__":
    main()
