"""llama.cpp runs exported GGUF files, text and pictures, and agrees with our simulation.

    python -m venv llama && llama/bin/pip install xllamacpp==2026.10.11549
    python -m bench.llama_cpp llama/bin/python

Small random models of every family that llama.cpp has are quantized in each kind of block type and
exported; the next token's probabilities after a text, and where it sees after a picture, are
compared with those of the same weights in float32 transformers. A line each: the number of tokens
that both readers counted, the largest difference of a logarithm over the likely tokens, and whether
they agree on the likeliest. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from prismquant.api import export, quantize
from prismquant.export.gguf.vocabulary import QWEN2_WORDS
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.opening import read_json
from prismquant.recipe.schema import load_recipe
from prismquant.storage import write_json, write_tensors

sys.path.append("tests")
import tiny_text
import tiny_vlm

FORMATS = (
    "int4-g32",
    "int4-g128",
    "int4-g32-asym",
    "int5-g32",
    "int5-g32-asym",
    "int8-channel",
    "mxfp4",
)
SEEING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = (*SEEING, *tiny_text.FAMILIES)
LLM = {"modality": "llm", "role": ["attn", "mlp"]}
TEXT = "the square is red"
# Patches of the tower that are merged into one token are 8 pixels wide and high.
PICTURE = (128, 96)


def main() -> int:
    """Compare every family and format; 1 if llama.cpp disagrees anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="of the environment with xllamacpp")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--tolerance", type=float, default=0.25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        picture = noise(Path(work) / "noise.png")
        for family in options.families:
            source = build(family, Path(work) / family)
            for number in options.formats:
                out = Path(work) / f"{family}-{number}"
                recipe = load_recipe("w4a16").with_rules(
                    {"solver": "rtn", "tuner": "none", "weight_range": "minmax"},
                    {"match": LLM, "weights": number},
                )
                quantize(source, recipe, out / "run")
                export(out / "run", "dense", out / "dense", options={"dtype": torch.float32})
                export(out / "run", "gguf", out / "gguf")
                shown = picture if family in SEEING else None
                theirs, ours = ask(options.python, out / "gguf", shown), answer(out, shown)
                rows.append({"family": family, "format": number, **compared(ours, theirs)})
                print(rows[-1], flush=True)
    print(json.dumps({"llama.cpp": rows}))
    return int(any(row["worst"] > options.tolerance or not row["counted"] for row in rows))


def build(family: str, folder: Path) -> Path:
    """A random model with a tokenizer that llama.cpp has, and of a shape that it expects."""
    folder.mkdir()
    # It adds features of the tower to the first blocks, but not to the last one.
    blocks = 4 if family == "qwen3_vl" else 2
    made = tiny_vlm if family in SEEING else tiny_text
    # It has no head of Gemma 2 that is not the embedding.
    tie = family == "gemma2"
    made.build(family, folder, dtype=torch.bfloat16, llm_blocks=blocks, tie=tie)
    config = read_json(folder / "config.json")
    if family == "gemma3_text":
        config["layer_types"] = ["sliding_attention"] * blocks  # every sixth is otherwise
    if family == "gemma2":
        # The head is the embedding, whose random columns make logits that no trained model has.
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] /= 8
        write_tensors(folder / "model.safetensors", tensors)
    if family == "mistral":
        config["sliding_window"] = None  # which it does not have
    if family == "qwen2_5_vl":
        config["vision_config"]["window_size"] = 112  # what llama.cpp assumes
    write_json(folder / "config.json", config)
    tokenizer = read_json(folder / "tokenizer.json")
    special = [entry["content"] for entry in tokenizer["added_tokens"]]
    letters = [*map(chr, range(33, 123)), "Ġ", "Ċ"]
    vocabulary = {text: number for number, text in enumerate([*special, *letters, "th", "the"])}
    tokenizer |= {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN2_WORDS},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
            ],
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [["t", "h"], ["th", "e"]],
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)
    return folder


def noise(path: Path) -> Path:
    """A picture that no model has seen, of a size that no reader resizes."""
    generator = random.Random(0)
    image = Image.frombytes("RGB", PICTURE, generator.randbytes(3 * PICTURE[0] * PICTURE[1]))
    image.save(path)
    return path


def ask(python: str, folder: Path, picture: Path | None) -> dict[str, Any]:
    """llama.cpp's answers."""
    (model,) = folder.glob("model-*.gguf")
    command = [python, "-m", "bench.peers.llama_cpp"]
    words = [TEXT, str(model)]
    words += [str(folder / "mmproj-F16.gguf"), str(picture)] if picture else []
    result = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr[-2000:] + result.stdout[-500:])
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answers


def answer(out: Path, picture: Path | None) -> dict[str, tuple[int, torch.Tensor]]:
    """Number of tokens and logarithms of probabilities by transformers, of dense weights."""
    model, processor = load_float(out / "dense"), load_processor(out / "dense")
    inputs = {"text": processor.tokenizer(TEXT, return_tensors="pt")}
    if picture is not None:
        content = [{"type": "image", "image": ""}, {"type": "text", "text": TEXT}]
        messages = [{"role": "user", "content": content}]
        chat = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        shown = processor(text=[chat], images=[Image.open(picture)], return_tensors="pt")
        inputs["picture"] = shown
    results = {}
    for name, given in inputs.items():
        with torch.no_grad():
            logits = model(**given, use_cache=False).logits[0, -1].float()
        results[name] = (given["input_ids"].shape[1], logits.log_softmax(-1))
    return results


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The largest difference, and whether both counted and chose alike."""
    row: dict[str, Any] = {"counted": True, "worst": 0.0}
    for name, (tokens, expected) in ours.items():
        found = theirs[name]
        pairs = [(value, float(expected[token])) for token, value in found["candidates"]]
        apart = max(abs(one - other) for one, other in pairs)
        row["counted"] &= tokens == found["tokens"]
        row["worst"] = max(row["worst"], apart)
        row |= {f"{name}_tokens": tokens, f"{name}_apart": round(apart, 4)}
        row[f"{name}_same"] = found["candidates"][0][0] == int(expected.argmax())
    return row


if __name__ == "__main__":
    sys.exit(main())
