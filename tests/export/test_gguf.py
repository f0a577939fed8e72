"""GGUF files, read back by the gguf package's own reader and dequantization."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prismquant as pq
from prismquant.api import export
from prismquant.errors import FormatError, ModelError
from prismquant.export.compressed_tensors.stored import open_checkpoint
from prismquant.export.gguf.ggml_blocks import block_type, pack, why_not
from prismquant.export.gguf.metadata import window_pattern
from prismquant.export.gguf.vocabulary import QWEN2_WORDS, read_vocabulary
from prismquant.export.load_quantized import load_model
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import spec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TYPES = {
    "int2": "Q4_0",
    "int3": "Q4_0",
    "int4": "Q4_0",
    "int5": "Q5_0",
    "int6": "Q8_0",
    "int7": "Q8_0",
    "int8": "Q8_0",
}
ALL = {"modality": ["llm", "vision", "projector"], "role": ["attn", "mlp", "projector"]}
LLM = {"modality": "llm", "role": ["attn", "mlp"]}


@pytest.fixture(scope="module")
def run(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``run(family, *rules, **options)``: a finished RTN run; equal ones are shared."""
    made: dict[str, Path] = {}

    def get(family: str, *rules: dict[str, Any], **options: Any) -> Path:
        key = repr((family, rules, sorted(options.items())))
        if key not in made:
            quick = {"solver": "rtn", "tuner": "none", "weight_range": "minmax"}
            recipe = pq.load_recipe("w4a16").with_rules(quick, *rules)
            made[key] = tmp_path_factory.mktemp("run") / "out"
            source = tiny(family, **({"dtype": torch.bfloat16} | options))
            pq.quantize(source, recipe, made[key], calibration_file)
        return made[key]

    return get


def random_weight(name: str, *, rows: int = 4, seed: int = 0) -> QuantizedTensor:
    """Any codes, zero points and signed scales of a format."""
    number, generator = spec(name), torch.Generator().manual_seed(seed)
    shape = number.scale_shape(rows, 128)
    if number.kind != "int":
        codes = torch.randint(0, 16, (rows, 128), generator=generator).to(torch.int8)
        exponent = torch.randint(1, 250, shape, generator=generator).to(torch.uint8)
        return QuantizedTensor(codes, exponent.view(torch.float8_e8m0fnu), None, number)
    low, high = -(1 << number.bits - 1), 1 << number.bits - 1
    codes = torch.randint(low, high, (rows, 128), generator=generator).to(torch.int8)
    scale = torch.randn(shape, generator=generator).clamp(-50, 50).to(torch.bfloat16)
    scale[scale.abs() < 1e-3] = 1
    zero = torch.randint(low, high, shape, generator=generator).to(torch.int8)
    return QuantizedTensor(codes, scale, None if number.symmetric else zero, number)


def unpacked(q: QuantizedTensor, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(pack(q, kind).numpy(), gguf.GGMLQuantizationType[kind])


@given(
    bits=st.integers(2, 8),
    unit=st.sampled_from(["g32", "g64", "g128", "channel", "tensor"]),
    asymmetric=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_blocks_hold_every_integer_format_exactly(
    bits: int, unit: str, asymmetric: bool, seed: int
) -> None:
    """The gguf package's dequantization gives our values, bit for bit, whatever the type."""
    name = f"int{bits}-{unit}" + "-asym" * asymmetric
    if bits == 8 and asymmetric:
        assert "nine bits" in str(why_not(spec(name), 128))
        return
    assert why_not(spec(name), 128) is None
    q = random_weight(name, seed=seed)
    kind = block_type(q.spec, lambda: q)
    if not asymmetric:
        assert kind == TYPES[f"int{bits}"]
    expected = q.dequantize(torch.float32).numpy()
    assert np.array_equal(unpacked(q, kind), expected)


@pytest.mark.parametrize(("name", "kind"), [("int4-g32-asym", "Q4_1"), ("int5-g32-asym", "Q5_1")])
def test_asymmetric_codes_keep_their_width_where_the_minimum_is_a_float16(
    name: str, kind: str
) -> None:
    q = random_weight(name)
    q.scale.copy_(torch.tensor([0.5, 0.25, 3.0, -1.5]).repeat(4, 1))
    assert block_type(q.spec, lambda: q) == kind
    assert np.array_equal(unpacked(q, kind), q.dequantize(torch.float32).numpy())


def test_mxfp4_blocks_are_stored_as_they_are() -> None:
    q = random_weight("mxfp4", seed=3)
    assert block_type(q.spec, lambda: q) == "MXFP4"
    assert np.array_equal(unpacked(q, "MXFP4"), q.dequantize(torch.float32).numpy())


def test_a_block_is_the_published_one() -> None:
    """Q4_0: a float16 scale, then elements j and j + 16 in byte j."""
    codes = (torch.arange(32) % 16 - 8).to(torch.int8).reshape(1, 32)
    q = QuantizedTensor(codes, torch.ones(1, 1, dtype=torch.bfloat16), None, spec("int4-g32"))
    block = pack(q, "Q4_0")[0].tolist()
    assert block == [0x00, 0x3C, *(n | n << 4 for n in range(16))]


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("int4-g16", 128, "groups of 16"),
        ("int4-channel", 100, "divide by 32"),
        ("fp8-channel", 128, "no block type"),
        ("fp4-g32", 128, "no block type"),
        ("nvfp4", 128, "no block type"),
        ("mxint8", 128, "no block type"),
    ],
)
def test_formats_without_a_block_type_are_refused(name: str, columns: int, message: str) -> None:
    assert message in str(why_not(spec(name), columns))


def read(folder: Path, prefix: str) -> gguf.GGUFReader:
    (path,) = folder.glob(f"{prefix}*.gguf")
    return gguf.GGUFReader(path)


def values(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """float32 arrays in the usual order of axes."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            [int(n) for n in reversed(tensor.shape)]
        )
        for tensor in reader.tensors
    }


def field(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.get_field(key).contents()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_models(family: str, run: Callable[..., Path], tmp_path: Path) -> None:
    """The language model's exactly; the tower's quantized layers too, the rest in float16."""
    source = run(family, {"match": ALL, "weights": "int4-g32"})
    result = export(source, "gguf", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.gguf")) == [
        "mmproj-F16.gguf",
        "model-Q4_0.gguf",
    ]
    opened = open_checkpoint(source)
    assert result.layers == len(opened.quantized)
    model = dict(load_model(source, dtype=torch.float32).state_dict())
    tensors = values(read(tmp_path / "out", "model-")) | values(read(tmp_path / "out", "mmproj"))
    quantized = {f"{layer.name}.weight" for layer in opened.quantized}
    for name, value in model.items():
        expected = value.numpy()
        if name.startswith("model.visual.") and name not in quantized and "pos_embed" not in name:
            expected = expected if value.ndim < 2 else expected.astype(np.float16)
        for title, part in located(family, name, expected).items():
            assert np.array_equal(tensors.pop(title), part.astype(np.float32)), (name, title)
    assert not tensors, "more was written than the model has"


def located(family: str, name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Names that the gguf package's own table gives; only what its converter cuts is cut here."""
    suffix = name.rpartition(".")[2]
    short = name.replace("model.language_model.", "model.").removesuffix(f".{suffix}")
    short = short.replace("model.visual.", "visual.")
    arch = "MMPROJ" if short.startswith("visual.") else "QWEN2VL"
    if arch != "MMPROJ" and family == "qwen3_vl":
        arch = "QWEN3VL"
    # As many blocks as it takes for the merger's layers to be in the table.
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 8)
    if short == "visual.patch_embed.proj" and suffix == "weight":
        return {"v.patch_embd.weight": value[:, :, 0], "v.patch_embd.weight.1": value[:, :, 1]}
    if short.endswith("attn.qkv") and family != "qwen3_vl":
        thirds = np.split(value, 3)
        titles = [table.get_name(short.replace("qkv", part)) for part in "qkv"]
        return {f"{t}.{suffix}": third for t, third in zip(titles, thirds, strict=True)}
    if family == "qwen3_vl" and "merger" in short:
        ends = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
        title = ends[short.rpartition(".")[2]]
        if "deepstack" in short:
            block = (0, 1)[int(short.split(".")[2])]
            title = f"v.deepstack.{block}.{short.rpartition('.')[2].removeprefix('linear_')}"
        return {f"{title}.{suffix}": value}
    title = table.get_name(short)
    assert title is not None, short
    return {f"{title}.{suffix}": value}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_say_what_the_model_is(
    family: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    export(run(family), "gguf", tmp_path / "out")
    text, vision = read(tmp_path / "out", "model-"), read(tmp_path / "out", "mmproj")
    arch = "qwen3vl" if family == "qwen3_vl" else "qwen2vl"
    assert field(text, "general.architecture") == arch
    assert field(text, "general.file_type") == int(gguf.LlamaFileType.MOSTLY_Q4_0)
    said = {
        "block_count": 2,
        "embedding_length": 128,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_sections": [4, 6, 6, 0],
        "rope.freq_base": 10000.0,
        "context_length": 1024,
    }
    assert {key: field(text, f"{arch}.{key}") for key in said} == said
    projector = {
        "qwen2_vl": "qwen2vl_merger",
        "qwen2_5_vl": "qwen2.5vl_merger",
        "qwen3_vl": "qwen3vl_merger",
    }[family]
    assert field(vision, "general.architecture") == "clip"
    assert field(vision, "clip.projector_type") == projector
    assert field(vision, "clip.vision.feed_forward_length") == 256
    assert field(vision, "clip.vision.patch_size") == 4
    assert field(vision, "clip.vision.image_mean") == pytest.approx(
        [0.48145466, 0.4578275, 0.40821073]
    )
    if family == "qwen3_vl":
        assert field(text, "qwen3vl.n_deepstack_layers") == 2
        assert field(vision, "clip.vision.is_deepstack_layers") == [True, True, False]
    if family == "qwen2_5_vl":
        assert field(vision, "clip.vision.n_wa_pattern") == 2


def test_wider_groups_and_whole_rows_repeat_their_scale(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    """Presets with groups of 128 and scales of whole rows have no block type of their own."""
    down = {"match": {"modality": "llm", "role": "mlp.down"}, "weights": "int8-channel"}
    source = run("qwen2_vl", {"match": LLM, "weights": "int4-g128"}, down)
    export(source, "gguf", tmp_path / "out")
    reader = read(tmp_path / "out", "model-")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "BF16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    weights, model = values(reader), load_model(source, dtype=torch.float32)
    for title, path in (("ffn_down", "down_proj"), ("ffn_up", "up_proj")):
        layer = model.get_submodule(f"model.language_model.layers.1.mlp.{path}")
        expected = layer.get_parameter("weight").numpy()
        assert np.array_equal(weights[f"blk.1.{title}.weight"], expected)


def test_tied_embeddings_have_no_output(run: Callable[..., Path], tmp_path: Path) -> None:
    export(run("qwen2_vl", tie=True), "gguf", tmp_path / "out")
    assert "output.weight" not in values(read(tmp_path / "out", "model-"))


def test_an_unquantized_model_is_converted_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    export(tiny("qwen2_vl", dtype=torch.bfloat16), "gguf", tmp_path / "out")
    reader = read(tmp_path / "out", "model-BF16")
    assert field(reader, "general.file_type") == int(gguf.LlamaFileType.MOSTLY_BF16)


# The tokenizer


def test_a_tokenizer_of_another_kind_is_left_out_and_told(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    result = export(run("qwen2_vl"), "gguf", tmp_path / "out")
    assert any("no vocabulary" in remark for remark in result.remarks)
    reader = read(tmp_path / "out", "model-")
    assert field(reader, "tokenizer.ggml.model") == "no_vocab"
    assert field(reader, "qwen2vl.vocab_size") == 128


def test_a_byte_level_tokenizer_is_carried_over(run: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(run("qwen2_vl"), source)
    tokenizer = {
        "added_tokens": [
            {"id": 4, "content": "<|im_end|>", "special": True},
            {"id": 6, "content": "<tool>", "special": False},
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated"},
                {"type": "ByteLevel"},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 5},
            "merges": [["a", "b"], "Ġ ab"],
        },
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    result = export(source, "gguf", tmp_path / "out")
    assert result.remarks == ()
    reader = read(tmp_path / "out", "model-")
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.pre") == "qwen2"
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert tokens[:8] == ["a", "b", "Ġ", "ab", "<|im_end|>", "Ġab", "<tool>", "[PAD7]"]
    assert len(tokens) == 128
    assert field(reader, "tokenizer.ggml.token_type")[:8] == [1, 1, 1, 1, 3, 1, 4, 5]
    assert field(reader, "tokenizer.ggml.merges") == ["a b", "Ġ ab"]
    assert field(reader, "tokenizer.ggml.eos_token_id") == 4
    assert "im_start" in field(reader, "tokenizer.chat_template")


def test_a_folder_without_a_tokenizer_has_no_vocabulary(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path, 8, None) is None


# Refusals


@pytest.mark.parametrize("layout", [None, "remote"])
def test_videollama3_has_no_architecture_there(
    run: Callable[..., Path], tmp_path: Path, layout: str | None
) -> None:
    with pytest.raises(FormatError, match="is not written as GGUF"):
        export(run("video_llama_3", layout=layout), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_without_a_block_type_are_listed(run: Callable[..., Path], tmp_path: Path) -> None:
    source = run("qwen2_vl", {"match": LLM, "weights": "int8-channel-asym"})
    with pytest.raises(FormatError, match="nine bits") as caught:
        export(source, "gguf", tmp_path / "out")
    assert "layers.{0-1}.mlp.down_proj" in str(caught.value)
    source = run("qwen2_vl", dtype=torch.float32)
    with pytest.raises(FormatError, match="not all of its float32 scales are float16"):
        export(source, "gguf", tmp_path / "out")


def test_unevenly_spaced_windows_cannot_be_said() -> None:
    class Vision:
        fullatt_block_indexes = (1, 3, 6)

    with pytest.raises(FormatError, match="every n-th"):
        window_pattern(Vision())
    Vision.fullatt_block_indexes = (7, 15, 23, 31)
    assert window_pattern(Vision()) == 8


def test_without_the_package_the_error_says_how_to_get_it(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="gguf package is missing") as caught:
        export(run("qwen2_vl"), "gguf", tmp_path / "out")
    assert "prismquant[gguf]" in str(caught.value)
