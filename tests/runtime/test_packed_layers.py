"""Models that run on the codes of their checkpoint, beside the same in floating point."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sample_logits import sample_logits

import prismquant as pq
from prismquant.api import export
from prismquant.errors import FormatError, ModelError
from prismquant.export.load_quantized import load_model
from prismquant.runtime.packed_layers import PackedLinear, kernel_uses, packed_layers

Make = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def made(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """``made(family, recipe)``: a quantized checkpoint; each is made once."""
    folders: dict[tuple[str, str], Path] = {}

    def make(family: str, recipe: str) -> Path:
        if (family, recipe) not in folders:
            out = tmp_path_factory.mktemp("packed") / "out"
            data = {"calibration": calibration_file} if recipe != "w4a16" else {}
            pq.quantize(tiny(family), recipe, out, solver="rtn", **data)
            folders[family, recipe] = out
        return folders[family, recipe]

    return make


CASES = [
    ("qwen2_vl", "w4a16"),
    ("qwen2_vl", "w8a8-static-all"),
    ("qwen2_5_vl", "nvfp4a16"),
    ("qwen3_vl_moe", "w4a16"),
    ("video_llama_3", "mquant-w4a8-static"),
    *(
        pytest.param("qwen3_vl", recipe, marks=pytest.mark.slow)
        for recipe in ("fp8-block", "w3a16", "mxfp4", "rotation-gptq-w4a8", "awq-gptq-w2a16")
    ),
]


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_a_packed_model_gives_the_logits_of_the_dequantized_one(
    made: Make, tiny: Callable[..., Path], calibration_file: Path, family: str, recipe: str
) -> None:
    folder = made(family, recipe)
    packed = load_model(folder, dtype=torch.float32, packed=True)
    dense = load_model(folder, dtype=torch.float32)
    layers = list(packed_layers(packed))
    assert layers
    logits = [sample_logits(model, tiny(family), calibration_file) for model in (packed, dense)]
    error = (logits[0] - logits[1]).norm() / logits[1].norm()
    # A rounded input that lies on the edge between two codes may fall to either side.
    assert error < (1e-5 if "a16" in recipe else 0.02), float(error)
    for name, parameter in packed.named_parameters():
        assert not parameter.isnan().any(), name


def test_a_packed_model_takes_little_more_than_its_stored_bytes(made: Make) -> None:
    folder = made("qwen2_vl", "w4a16")
    model = load_model(folder, packed=True)
    floats = sum(one.nbytes for one in [*model.parameters(), *model.buffers()])
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    held = floats + sum(layer.store.nbytes for layer in packed_layers(model))
    assert held < 1.15 * stored


def test_answers_are_generated_with_a_cache_in_batches(
    made: Make, processors: Callable[[str], object]
) -> None:
    folder = made("qwen2_vl", "w4a16")
    answers = []
    for packed in (True, False):
        model, processor = pq.load(folder, dtype="float32", packed=packed)
        tokens = processor.tokenizer(["a b c", "d"], return_tensors="pt", padding=True)
        generator: object = model
        answers.append(
            generator.generate(  # type: ignore[attr-defined]
                **tokens, max_new_tokens=5, do_sample=False, use_cache=True
            )
        )
    assert torch.equal(*answers)


def test_what_a_packed_model_cannot_do_is_said(made: Make, tmp_path: Path) -> None:
    model = load_model(made("qwen2_vl", "w4a16"), packed=True)
    with pytest.raises(ModelError, match="cannot be trained"):
        model.train()
    with pytest.raises(ModelError, match="cannot be saved"):
        model.state_dict()
    with pytest.raises(ModelError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "copy")  # type: ignore[operator]
    layer = next(iter(packed_layers(model)))
    x = torch.ones(1, layer.in_features, dtype=layer.weight.dtype)
    with pytest.raises(ModelError, match="knows no gradients"):
        layer(x.requires_grad_())
    assert layer.weight.isnan().all()


def test_codes_and_scales_keep_their_dtypes(made: Make) -> None:
    model = load_model(made("qwen2_vl", "w4a16"), packed=True)
    layer = next(iter(packed_layers(model)))
    scale = layer.store.weight.scale
    model.to(torch.float16)
    assert layer.weight.dtype == torch.float16
    assert layer.store.weight.scale is scale
    x = torch.ones(3, layer.in_features, dtype=torch.float16)
    assert layer(x).dtype == torch.float16
    clone = copy.deepcopy(layer)
    assert isinstance(clone, PackedLinear)
    assert torch.equal(clone(x), layer(x))


def test_it_is_told_which_kernels_run(made: Make) -> None:
    (use,) = kernel_uses(load_model(made("qwen2_vl", "w4a16"), packed=True))
    assert use.layers == 14
    assert use.format == "int4 g128 sym"
    assert (use.decode, use.prefill) == ("numba", "tiles")
    assert any(refusal.startswith("numba: it takes") for refusal in use.refusals)


def test_other_formats_are_not_loaded_packed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    pq.quantize(tiny("qwen2_vl", dtype=torch.bfloat16), "w4a16", tmp_path / "out", solver="rtn")
    export(tmp_path / "out", "gptq", tmp_path / "gptq")
    with pytest.raises(FormatError, match="kept in codes"):
        load_model(tmp_path / "gptq", packed=True)
