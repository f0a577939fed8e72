"""Small checkpoints written by llm-compressor, that tests read; for an environment of its own.

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    OMP_NUM_THREADS=1 peer/bin/python tools/make_golden_checkpoints.py tests/golden

A folder holds what llm-compressor saved of one random Qwen2-VL (less ``recipe.yaml``), and the file
``<name>.safetensors`` beside it what readers must make of it:

``<module path>.weight``
    of every quantized layer, as the decompression of compressed-tensors gives it.
``quantized_logits``
    of the inputs below, by llm-compressor's own model: weights decompressed again, inputs (and keys
    and values) rounded in the course of its forward pass, in float32 arithmetic.
``input.*``
    a conversation with one picture.

The pictures are random numbers and the tokens random words, so no processor is needed; sizes and
special tokens are those of the tests' own small models, whose processor fits therefore.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import tempfile
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# As in tests/tiny_vlm.py.
VOCABULARY, PATCH = 128, 4
VISION_START, VISION_END, IMAGE, VIDEO = 3, 4, 5, 6
WORDS = range(8, 90)
SAMPLES = 6
# As llm-compressor's examples write it: what is saved expands it to names on disk.
TOWER = ["re:.*lm_head", "re:.*visual.*"]
VERSIONED = ("llmcompressor", "compressed-tensors", "transformers", "torch", "safetensors")


@dataclass(frozen=True)
class Golden:
    """One checkpoint.

    Attributes:
        scheme: Name of a preset, if one is used as it is.
        groups: Else, a preset with what differs: by targets.
        ignore: Layers that stay in floating point.
        kv_cache: A scheme for keys and values.
        gptq: Solve by GPTQ, not by rounding to nearest.
        rotated: Layers whose input a Hadamard matrix rotates at run time (QuIP's V).
        layout: Asked for when saving; None: what llm-compressor takes.
        hidden: Width of the language model.
        dtype: Of the model.
    """

    scheme: str | None = None
    groups: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    ignore: tuple[str, ...] = tuple(TOWER)
    kv_cache: dict[str, Any] | None = None
    gptq: bool = False
    rotated: tuple[str, ...] = ()
    layout: str | None = None
    hidden: int = 64
    dtype: torch.dtype = torch.bfloat16


ALL = "Linear"
G32 = {"weights": {"group_size": 32}}
FP8_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
STATIC = {"strategy": "tensor", "dynamic": False, "observer": "static_minmax"}

CHECKPOINTS: dict[str, Golden] = {
    "w4a16": Golden(groups={ALL: ("W4A16", G32)}, gptq=True),
    "w4a16-asym": Golden(groups={ALL: ("W4A16_ASYM", G32)}),
    "w3a16": Golden(groups={ALL: ("W3A16", G32)}),
    "w4a8": Golden(groups={ALL: ("W4A8", G32)}),
    "w4a8-packed": Golden(groups={ALL: ("W4A8", G32)}, layout="pack-quantized"),
    "w4afp8": Golden(groups={ALL: ("W4AFP8", G32)}, layout="pack-quantized"),
    "w8a8": Golden(scheme="W8A8", ignore=("lm_head",)),
    "w8a8-static": Golden(groups={ALL: ("W8A8", {"input_activations": STATIC})}),
    "w8a8-static-asym": Golden(
        groups={ALL: ("W8A8", {"input_activations": STATIC | {"symmetric": False}})},
        dtype=torch.float32,
    ),
    "fp8": Golden(scheme="FP8"),
    "fp8-dynamic": Golden(scheme="FP8_DYNAMIC", ignore=("lm_head",)),
    "fp8-block": Golden(scheme="FP8_BLOCK", hidden=128),
    "nvfp4": Golden(scheme="NVFP4"),
    "nvfp4a16": Golden(scheme="NVFP4A16"),
    "mxfp4": Golden(scheme="MXFP4"),
    "mxfp4a16": Golden(scheme="MXFP4A16"),
    "mxfp8": Golden(scheme="MXFP8"),
    "fp8-kv": Golden(scheme="FP8_DYNAMIC", kv_cache=FP8_CACHE | {"strategy": "tensor"}),
    "fp8-kv-head": Golden(
        groups={ALL: ("W4A16", G32)},
        kv_cache=FP8_CACHE | {"strategy": "attn_head"},
        dtype=torch.float32,
    ),
    "w4a16-head": Golden(groups={ALL: ("W4A16", G32)}, ignore=("re:.*visual.*",)),
    "w4a16-rotated": Golden(groups={ALL: ("W4A16", G32)}, rotated=("re:.*(gate|up)_proj$",)),
    "mixed": Golden(
        groups={
            "re:.*mlp.(gate|up|down)_proj$": ("W4A16", G32),
            "re:.*self_attn.(q|k|v|o)_proj$": ("FP8_DYNAMIC", {}),
        }
    ),
}


def source(hidden: int, dtype: torch.dtype, folder: Path) -> Path:
    """Save a random Qwen2-VL of one vision block and one block of the language model."""
    import transformers

    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": 128 if hidden % 128 == 0 else 96,
            "num_hidden_layers": 1,
            "num_attention_heads": hidden // 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
            # Sections of the rotary frequencies: half of a head in all.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": hidden,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": PATCH,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 1.0)
            else:
                parameter.normal_(0.0, 1.3 * parameter[0].numel() ** -0.5)
    model.to(dtype).save_pretrained(folder)
    return folder


def sample(seed: int) -> dict[str, torch.Tensor]:
    """Model inputs: some words, a picture of 4 x 4 patches, some words."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(WORDS.start, WORDS.stop, (count,), generator=generator).tolist()

    picture = [VISION_START, *4 * [IMAGE], VISION_END]
    tokens = torch.tensor([[1, *words(5 + seed % 3), *picture, *words(9), 2]])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": torch.randn(16, 3 * 2 * PATCH**2, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def any_tokenizer() -> Any:
    """llm-compressor wants one although it has nothing to do."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    )


def modifiers(golden: Golden) -> list[Any]:
    """llm-compressor's modifiers."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform import QuIPModifier

    given: dict[str, Any] = {"ignore": list(golden.ignore), "kv_cache_scheme": golden.kv_cache}
    if golden.scheme is not None:
        given |= {"scheme": golden.scheme, "targets": [ALL]}
    else:
        given["config_groups"] = {}
        for number, (targets, (preset, changes)) in enumerate(golden.groups.items()):
            group = preset_name_to_scheme(preset, [targets]).model_dump()
            for side, values in changes.items():
                group[side] = deepcopy(group[side]) | values
            given["config_groups"][f"group_{number}"] = group
    rounding = (GPTQModifier if golden.gptq else QuantizationModifier)(**given)
    if not golden.rotated:
        return [rounding]
    targets, ignore = list(golden.rotated), list(golden.ignore)
    rotation = QuIPModifier(
        rotations=["v"], transform_type="hadamard", targets=targets, ignore=ignore
    )
    return [rotation, rounding]


def make(golden: Golden, folder: Path) -> None:
    """Quantize, save, and note what is expected of a reader."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.core import active_session
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText

    active_session().reset()
    if folder.exists():
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory() as scratch:
        origin = source(golden.hidden, golden.dtype, Path(scratch))
        model = AutoModelForImageTextToText.from_pretrained(origin, dtype=golden.dtype)
        rows = [{k: v.tolist() for k, v in sample(i).items()} for i in range(SAMPLES)]
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=modifiers(golden),
            data_collator=lambda batch: {
                k: torch.tensor(v, dtype=golden.dtype if k == "pixel_values" else None)
                for k, v in batch[0].items()
            },
            num_calibration_samples=SAMPLES,
            processor=any_tokenizer(),
            sequential_targets=["Qwen2VLDecoderLayer"],
        )
        model.save_pretrained(folder, quantization_format=golden.layout)
    asked = sample(100)
    given = asked | {"pixel_values": asked["pixel_values"].to(golden.dtype)}
    with torch.no_grad():
        # The model that was compressed to be saved decompresses itself at its next forward pass.
        model.eval()(**given, use_cache=False)
        expected = {
            f"{name}.weight": module.weight.detach().clone()
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and hasattr(module, "quantization_scheme")
        }
        logits = model.float()(**asked, use_cache=False).logits
    (folder / "recipe.yaml").unlink(missing_ok=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    expected |= {"quantized_logits": logits} | {f"input.{k}": v for k, v in asked.items()}
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in expected.items()},
        folder.with_name(f"{folder.name}.safetensors"),
        metadata={"versions": json.dumps(versions)},
    )


def scale_every_token() -> None:
    """Let dynamic inputs of two dimensions, as in vision towers, have the scale a token declared.

    compressed-tensors keeps the first two axes whatever the rank, and so takes one scale for the
    whole matrix there.
    """
    from compressed_tensors.quantization.lifecycle import forward as lifecycle

    original = lifecycle.compute_dynamic_scales_and_zp

    def per_token(value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if value.ndim != 2:
            return original(value, *args, **kwargs)
        scale, zero_point = original(value[None], *args, **kwargs)
        return scale[0], zero_point[0]

    lifecycle.compute_dynamic_scales_and_zp = per_token


def main() -> None:
    """Write all checkpoints, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CHECKPOINTS))
    options = parser.parse_args()
    # A torchvision that was built for another torch can be imported once these are declared.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    scale_every_token()
    for name in options.names or CHECKPOINTS:
        make(CHECKPOINTS[name], options.out / name)


if __name__ == "__main__":
    main()
