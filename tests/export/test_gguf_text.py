"""GGUF files of language models, read back by the gguf package, whose own table names tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_text
import torch

import prismquant as pq
from prismquant.api import export
from prismquant.errors import FormatError
from prismquant.export.gguf.language_models import rope_factors
from prismquant.export.gguf.vocabulary import LLAMA3_WORDS, read_vocabulary
from prismquant.export.load_quantized import load_model
from prismquant.models.config import import_transformers

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
}


def changed(folder: Path, **values: Any) -> Path:
    """A checkpoint with other values in its configuration."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def build(family: str, folder: Path, **options: Any) -> Path:
    """A checkpoint of the shape that llama.cpp has built in."""
    tiny_text.build(family, folder, dtype=torch.bfloat16, tie=family == "gemma2", **options)
    if family == "gemma3_text":
        changed(folder, layer_types=["sliding_attention"] * 2)
    return folder


def read(folder: Path) -> gguf.GGUFReader:
    (path,) = folder.glob("*.gguf")
    assert path.name.startswith("model-")
    return gguf.GGUFReader(path)


def field(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.get_field(key).contents()


def apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head with those half a head apart again, of such as stand in pairs."""
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_tensor_is_the_models(family: str, tmp_path: Path) -> None:
    source = build(family, tmp_path / "model")
    quick = {"solver": "rtn", "tuner": "none", "weight_range": "minmax"}
    blocks = {"match": {"role": ["attn", "mlp"]}, "weights": "int4-g32"}
    recipe = pq.load_recipe("w4a16").with_rules(quick, blocks)
    pq.quantize(source, recipe, tmp_path / "run")
    export(tmp_path / "run", "gguf", tmp_path / "out")
    reader = read(tmp_path / "out")
    found = {
        one.name: gguf.quants.dequantize(one.data, one.tensor_type).reshape(
            [int(n) for n in reversed(one.shape)]
        )
        for one in reader.tensors
    }
    model = load_model(tmp_path / "run", dtype=torch.float32)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[family]], 2)
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if family == "gemma2" and name == "lm_head.weight":
            continue
        module, _, suffix = name.rpartition(".")
        title = f"{table.get_name(module)}.{suffix}"
        expected, written = value.float().numpy(), found.pop(title)
        if ARCHITECTURES[family] == "LLAMA" and title.split(".")[-2] in heads:
            written = apart(written, heads[title.split(".")[-2]])
        if family.startswith("gemma") and name.endswith("norm.weight"):
            expected = expected + np.float32(1)
        assert np.array_equal(written, expected), name
    assert not found, "more was written than the model has"


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_file_says_what_the_model_is(family: str, tmp_path: Path) -> None:
    export(build(family, tmp_path / "model"), "gguf", tmp_path / "out")
    reader = read(tmp_path / "out")
    arch = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[family]]]
    assert field(reader, "general.architecture") == arch
    said = {
        "block_count": 2,
        "embedding_length": 128,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.freq_base": 1e6 if family == "gemma3_text" else 10000.0,
        "context_length": 1024,
        "vocab_size": 128,
    }
    if family != "qwen2":
        said["attention.key_length"] = 64
    if family.startswith("gemma"):
        said["attention.sliding_window"] = tiny_text.WINDOW
    if family == "gemma2":
        said |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if arch == "llama":
        said["rope.dimension_count"] = 64
    assert {key: field(reader, f"{arch}.{key}") for key in said} == said


def test_windows_that_llama_cpp_does_not_have_are_told(tmp_path: Path) -> None:
    result = export(build("mistral", tmp_path / "model"), "gguf", tmp_path / "out")
    assert any("beyond 6 tokens it looks at everything" in remark for remark in result.remarks)
    whole = changed(build("mistral", tmp_path / "whole"), sliding_window=None)
    assert not any("tokens it" in one for one in export(whole, "gguf", tmp_path / "o").remarks)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_frequencies_of_llama_3_are_those_of_transformers(tmp_path: Path) -> None:
    source = changed(build("llama", tmp_path / "model"), rope_parameters=LLAMA3)
    export(source, "gguf", tmp_path / "out")
    [written] = [one for one in read(tmp_path / "out").tensors if one.name == "rope_freqs.weight"]
    transformers = import_transformers()
    config = transformers.AutoConfig.from_pretrained(source)
    theirs, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(
        torch.tensor(written.data), (plain / theirs).float(), rtol=1e-5, atol=0
    )
    assert rope_factors(config) is not None


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, and silu is built in"),
        ("qwen3", {"rope_parameters": LLAMA3}, "its rotary embedding is of type llama3"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "divided by the root of 100"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "other layers than every 2th"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "its tokens look ahead"),
    ],
)
def test_what_it_cannot_be_told_is_refused(
    family: str, values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = changed(build(family, tmp_path / "model"), **values)
    with pytest.raises(FormatError) as caught:
        export(source, "gguf", tmp_path / "out")
    assert words in str(caught.value)
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_the_words_of_llama_3_and_a_token_before_every_text(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "model")
    tokenizer = {
        "added_tokens": [{"id": 3, "content": "<|begin|>", "special": True}],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}},
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel"},
                {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<|begin|>"}}, {"Sequence": {"id": "A"}}],
                },
            ],
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").write_text('{"bos_token": "<|begin|>"}')
    export(source, "gguf", tmp_path / "out")
    reader = read(tmp_path / "out")
    assert field(reader, "tokenizer.ggml.pre") == "llama-bpe"
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    assert field(reader, "tokenizer.ggml.bos_token_id") == 3
    shutil.rmtree(tmp_path / "out")
    del tokenizer["post_processor"]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = import_transformers().AutoConfig.from_pretrained(source)
    vocabulary = read_vocabulary(source, 128, config)
    assert vocabulary is not None
    assert not vocabulary.begins
