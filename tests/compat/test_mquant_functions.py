"""MQuant's functions: the model in place equals a run of the same recipe, and MQuant's formulas."""

from __future__ import annotations

import argparse
import shlex
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from prompt_dataset import PromptDataset, questions_only

import prismquant as pq
from prismquant.compat import live_model, mquant
from prismquant.compat.mquant.families import QWEN2_VL, VIDEOLLAMA3, Family
from prismquant.errors import (
    ArgumentError,
    DataError,
    ModelError,
    NumericsError,
    PlanError,
    RecipeError,
    StorageError,
)
from prismquant.export.load_quantized import simulate_activations
from prismquant.models.attention import hooked
from prismquant.models.config import import_transformers
from prismquant.runtime.linear import QuantLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FAMILIES = {"qwen2_vl": QWEN2_VL, "video_llama_3": VIDEOLLAMA3}
PLUS = {
    "qwen2_vl": mquant.qwen2vl_rtn_gptq_fwrd_plus,
    "video_llama_3": mquant.videollama3_rtn_gptq_fwrd_plus,
}
PARTS = "--quant_llm --quant_visual_clip --{connector}"
FLAGS = {
    "rtn w4a8": "--visual_w_rtn --llm_w_rtn",
    "gptq w4a16": "--visual_a_bits 16 --llm_a_bits 16 --w_groupsize 32 --act_order",
    "gptq w8a8 static": "--visual_w_bits 8 --llm_w_bits 8 --visual_static --llm_static",
    "mixed, asymmetric, clipped": "--visual_w_bits 8 --visual_w_rtn --w_asym --llm_w_clip "
    "--llm_w_bits 3 --a_asym",
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mquant.CompatWarning)
        yield


@dataclass(frozen=True)
class Setting:
    """A family, its checkpoint, and calibration data in both forms."""

    name: str
    family: Family
    folder: Path
    dataset: PromptDataset
    file: Path

    def wrapper(self, **attributes: Any) -> Any:
        model, processor = pq.load(self.folder)
        return SimpleNamespace(model=model, processor=processor, **attributes)

    def plus(self, model: Any, args: Any, **options: Any) -> dict[str, Any]:
        return PLUS[self.name](model, self.dataset, None, "Tiny_VAL", args, **options)

    def words(self, flags: str) -> str:
        return f"{PARTS.format(connector=self.family.connector)} {flags}"


@pytest.fixture(
    scope="module",
    params=["qwen2_vl", pytest.param("video_llama_3", marks=pytest.mark.slow)],
)
def setting(
    request: pytest.FixtureRequest, tiny: Callable[..., Path], tmp_path_factory: Any
) -> Setting:
    """Each of MQuant's families."""
    place = tmp_path_factory.mktemp("prompts")
    path = tiny_vlm.samples(place, kinds=("image", "video", "text"), count=6)
    name = request.param
    file = questions_only(path, place / "questions.jsonl")
    return Setting(name, FAMILIES[name], tiny(name), PromptDataset(path), file)


def namespace(words: str) -> argparse.Namespace:
    """Flags as a parser would leave them."""
    parser = argparse.ArgumentParser()
    for word in shlex.split(words):
        if word.startswith("--"):
            parser.add_argument(word, nargs="?", const=True, type=lambda text: int(text))
    return parser.parse_args(shlex.split(words))


def logits(model: Any, processor: Any, file: Path) -> torch.Tensor:
    """Of the first sample, which has a picture."""
    with torch.no_grad():
        return model(**tiny_vlm.encode(processor, file)[0]).logits


def assert_same(model: Any, folder: Path, file: Path) -> None:
    """A model has the weights of a checkpoint, and computes the same."""
    wanted, processor = pq.load(folder)
    state = model.state_dict()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(logits(model, processor, file), logits(wanted, processor, file))


# Against a run


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_the_model_becomes_what_a_run_writes(setting: Setting, flags: str, tmp_path: Path) -> None:
    words = setting.words(flags)
    wrapper = setting.wrapper()
    quantizers = setting.plus(wrapper, namespace(words))
    result = pq.quantize(setting.folder, f"--quant {words}", tmp_path / "out", setting.file)
    assert_same(wrapper.model, tmp_path / "out", setting.file)
    assert len(quantizers) == len(result.plan.quantized)


def test_rotations_and_splits_are_put_into_the_model(setting: Setting, tmp_path: Path) -> None:
    flags = "--rotate --rotate_llm --online_llm_hadamard --llm_split --llm_w_rtn --llm_a_bits 8"
    words = f"--quant_llm {flags}"
    wrapper = setting.wrapper()
    quantizers = setting.plus(wrapper, namespace(words))
    pq.quantize(setting.folder, f"--quant {words}", tmp_path / "out", setting.file)
    assert_same(wrapper.model, tmp_path / "out", setting.file)
    split = [key for key in quantizers if key.endswith(".L2")]
    assert split == [f"model.model.layers.{i}.mlp.down_proj.L2" for i in range(2)]
    with pytest.raises(ModelError, match="rotates inputs of this model at run time"):
        setting.plus(wrapper, namespace(words))


def test_a_tied_head_is_untied_where_a_rotation_asks_for_it(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny("qwen2_vl", tie=True)
    words = "--quant_llm --llm_w_rtn --llm_a_bits 16 --rotate --rotate_llm"
    model, _ = pq.load(folder)
    model.tie_weights()
    PLUS["qwen2_vl"](model, None, None, None, namespace(words))
    pq.quantize(folder, f"--quant {words}", tmp_path / "out")
    wanted, _ = pq.load(tmp_path / "out")
    assert not model.config.tie_word_embeddings
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_tied_head_stays_tied_and_one_with_a_weight_of_its_own_is_kept(
    tiny: Callable[..., Path],
) -> None:
    args = namespace("--quant_llm --llm_w_rtn --llm_a_bits 16")
    for own in (False, True):
        model, _ = pq.load(tiny("qwen2_vl", tie=True))
        model.tie_weights()
        if own:  # as MQuant's driver does for the smallest model
            weight = model.lm_head.weight.detach().clone() * 2
            model.lm_head.weight = torch.nn.Parameter(weight)
        head = model.lm_head.weight.detach().clone()
        PLUS["qwen2_vl"](model, None, None, None, args)
        embedding = model.model.language_model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, head)
        assert (model.lm_head.weight.data_ptr() == embedding.data_ptr()) == (not own)


def test_bfloat16_models_keep_their_dtype(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("qwen2_vl", dtype=torch.bfloat16)
    model, _ = pq.load(folder)
    words = "--quant_llm --llm_w_rtn --llm_a_bits 16"
    PLUS["qwen2_vl"](model, None, None, None, namespace(words))
    pq.quantize(folder, f"--quant {words}", tmp_path / "out")
    wanted, _ = pq.load(tmp_path / "out")
    for name, tensor in wanted.state_dict().items():
        assert model.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(model.state_dict()[name], tensor), name


def test_wishes_beside_the_flags_reach_the_engine(setting: Setting, tmp_path: Path) -> None:
    words = setting.words(FLAGS["gptq w4a16"])
    wrapper, out = setting.wrapper(), tmp_path / "kept"
    options: dict[str, Any] = {
        "kv_cache": "int8-head",
        "batch_size": 2,
        "dtype": "float32",
        "max_pixels": 256,
        "max_frames": 2,
        "memory_budget": "64GiB",
    }
    setting.plus(wrapper, namespace(words), out=out, **options)
    pq.quantize(setting.folder, f"--quant {words}", tmp_path / "out", setting.file, **options)
    assert_same(wrapper.model, tmp_path / "out", setting.file)
    assert_same(wrapper.model, out, setting.file)
    attentions = [m for m in wrapper.model.modules() if hooked(m) is not None]
    assert len(attentions) == 2


# Against MQuant's formulas


def theirs(weight: torch.Tensor, *, asym: bool) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Scale, zero point, least and highest code of each row, by MQuant's formulas."""
    low = weight.amin(1, keepdim=True).clamp(max=0)
    high = weight.amax(1, keepdim=True).clamp(min=0)
    if not asym:
        scale = torch.maximum(-low, high) / 7
        return scale, torch.zeros_like(scale), -8, 7
    scale = (high - low) / 15
    return scale, (-low / scale).round(), 0, 15


@pytest.mark.parametrize("flags", ["", "--w_asym"])
def test_rounding_and_quantizers_are_those_of_the_formulas(setting: Setting, flags: str) -> None:
    """Weights that the caller has changed in memory count."""
    wrapper = setting.wrapper()
    changed = wrapper.model.model.language_model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        changed.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in wrapper.model.state_dict().items()}
    args = namespace(f"--quant_llm --llm_w_rtn --llm_w_bits 4 --llm_a_bits 16 {flags}")
    quantizers = setting.plus(wrapper, args)
    assert len(quantizers) == 14
    for key, quantizer in quantizers.items():
        name = key.removesuffix(".module").replace("model.model.", "model.language_model.", 1)
        weight = before[f"{name}.weight"].double()
        scale, zero, low, high = theirs(weight.float(), asym=bool(flags))
        assert (quantizer.bits, quantizer.sym) == (4, not flags)
        assert int(quantizer.maxq) == high
        assert torch.equal(quantizer.scale, scale)
        assert torch.equal(quantizer.zero, zero)
        scale = quantizer.scale.double()
        codes = ((weight / scale).round() + zero).clamp(low, high)
        values = ((codes - zero) * scale).float()
        assert torch.equal(wrapper.model.state_dict()[f"{name}.weight"], values)
    untouched = [n for n in before if ".language_model.layers." not in n]
    assert all(torch.equal(wrapper.model.state_dict()[n], before[n]) for n in untouched)


@pytest.mark.parametrize("flags", ["--w_asym", "--w_asym --w_groupsize 32", "--llm_w_clip"])
def test_weights_lie_on_the_grids_of_their_quantizers(setting: Setting, flags: str) -> None:
    wrapper = setting.wrapper()
    words = setting.words(f"{flags} --llm_a_bits 16 --visual_a_bits 16")
    quantizers = setting.plus(wrapper, namespace(words))
    state = wrapper.model.state_dict()
    for key, quantizer in quantizers.items():
        weight = state[f"{module_name(key)}.weight"]
        grouped = quantizer.groupsize > 0
        assert quantizer.scale.dim() == (2 if grouped else weight.dim())
        size = quantizer.groupsize if grouped else 1
        scale, zero = (
            one.repeat_interleave(size, 1) if grouped else one
            for one in (quantizer.scale.double(), quantizer.zero.double())
        )
        codes = (weight.flatten(1) if grouped else weight).double() / scale + zero
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        low = 0 if not quantizer.sym else -int(quantizer.maxq) - 1
        assert int(codes.round().min()) >= low
        assert int(codes.round().max()) <= int(quantizer.maxq)
        assert int(quantizer.maxq) == (7 if quantizer.sym else 15)


def module_name(key: str) -> str:
    """Of a quantizer, in transformers."""
    pairs = {
        "model.model.": "model.language_model.",
        "model.vision_encoder.": "model.vision_model.",
        "model.mm_projector.": "model.projector.",
    }
    for theirs, ours in pairs.items():
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
    return key.removesuffix(".module")


def test_keys_are_mquants(setting: Setting) -> None:
    quantizers = setting.plus(setting.wrapper(), namespace(setting.words(FLAGS["rtn w4a8"])))
    keys = {
        "qwen2_vl": (
            *("model.visual.patch_embed.proj.module", "model.visual.blocks.1.attn.qkv.module"),
            *("model.visual.blocks.0.mlp.fc2.module", "model.visual.merger.mlp.0.module"),
            "model.model.layers.1.self_attn.o_proj.module",
        ),
        "video_llama_3": (
            "model.vision_encoder.embeddings.patch_embedding",
            "model.vision_encoder.encoder.layers.1.self_attn.out_proj",
            *("model.mm_projector.readout.2", "model.model.layers.0.mlp.down_proj"),
        ),
    }[setting.name]
    assert set(keys) <= quantizers.keys()
    ends = {key.endswith(".module") for key in quantizers}
    assert ends == {setting.name == "qwen2_vl"}


# Parts


def part_calls(setting: Setting, *, rtn: bool) -> list[str]:
    names = [name for name in mquant.__all__ if name.startswith("gptq_") != rtn]
    stem = "qwen2vl" if setting.name == "qwen2_vl" else "videollama3"
    found = [name for name in names if stem in name and not name.endswith("_plus")]
    # In the order of the model.
    order = ("conv1", "patch", "resblocks", "layers", "encoder", "clip_rtn", "cross", "proj", "llm")
    return sorted(found, key=lambda name: next(i for i, o in enumerate(order) if o in name))


@pytest.mark.parametrize("rtn", [True, False])
def test_functions_of_parts_together_do_what_the_one_for_all_does(
    setting: Setting, rtn: bool
) -> None:
    flags = "--visual_a_bits 16 --llm_a_bits 16" + rtn * " --visual_w_rtn --llm_w_rtn"
    args = namespace(setting.words(flags))
    whole = setting.wrapper()
    wanted = setting.plus(whole, args)
    model, quantizers = setting.wrapper(), {}
    calls = part_calls(setting, rtn=rtn)
    assert len(calls) == (3 if rtn else 4)
    for name in calls:
        function = getattr(mquant, name)
        if rtn:  # is given what the wrapper holds, as there
            returned = function(model.model, None, args, quantizers)
        else:
            returned = function(model, setting.dataset, None, "Tiny_VAL", args, quantizers)
        assert returned is quantizers
    assert quantizers.keys() == wanted.keys()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name


def test_a_part_may_have_bits_of_its_own(setting: Setting) -> None:
    wrapper, quantizers = setting.wrapper(), {}
    connector = next(
        name for name in part_calls(setting, rtn=True) if "cross" in name or "proj" in name
    )
    getattr(mquant, connector)(wrapper.model, None, {"visual_w_bits": 8}, quantizers)
    assert {one.bits for one in quantizers.values()} == {8}
    llm = next(name for name in part_calls(setting, rtn=True) if "llm_rtn" in name)
    getattr(mquant, llm)(wrapper.model, None, {"llm_w_bits": 3}, quantizers)
    assert {one.bits for one in quantizers.values()} == {3, 8}


def test_a_part_says_that_inputs_stay_and_refuses_rotations(setting: Setting) -> None:
    llm = getattr(mquant, next(n for n in part_calls(setting, rtn=True) if "llm_rtn" in n))
    wrapper = setting.wrapper()
    with pytest.warns(mquant.CompatWarning, match=f"{setting.family.entry} quantizes inputs"):
        llm(wrapper.model, None, SimpleNamespace(), {})
    assert not any(isinstance(module, QuantLinear) for module in wrapper.model.modules())
    with pytest.raises(RecipeError, match="a rotation is of a whole model"):
        llm(wrapper.model, None, SimpleNamespace(rotate=True, rotate_llm=True), {})
    with pytest.raises(ArgumentError, match="a NoneType cannot take quantizers"):
        llm(wrapper.model, None, SimpleNamespace(), None)


# Models as callers load them


def test_a_model_of_transformers_still_generates(setting: Setting) -> None:
    transformers = import_transformers()
    kind = getattr(transformers, setting.family.hf_class)
    model = kind.from_pretrained(setting.folder, dtype=torch.bfloat16)
    processor = transformers.AutoProcessor.from_pretrained(setting.folder)
    args = namespace(
        f"{setting.words('--visual_static --llm_static --act_order --rotate --rotate_llm')} "
        "--rotate_visual_clip --online_llm_hadamard --online_visual_hadamard --visual_split"
    )
    wrapper = SimpleNamespace(model=model, processor=processor)
    setting.plus(wrapper, args, kv_cache="fp8", dtype="float32")
    inputs = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in tiny_vlm.encode(processor, setting.file)[0].items()
    }
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert length < found.shape[1] <= length + 3


def test_a_model_from_a_checkpoint_of_the_original_layout(
    tiny: Callable[..., Path], setting: Setting
) -> None:
    model, processor = pq.load(tiny("video_llama_3", layout="remote"))
    wrapper = SimpleNamespace(model=model, processor=processor)
    quantizers = mquant.gptq_videollama3_fwrd_visual_projector(
        wrapper, setting.dataset, None, None, {}, {}
    )
    assert list(quantizers) == ["model.mm_projector.readout.0", "model.mm_projector.readout.2"]


def test_a_bare_model_takes_the_processor_of_its_folder(setting: Setting) -> None:
    wrapper, bare = setting.wrapper(), setting.wrapper().model
    args = namespace("--quant_llm --llm_a_bits 16")
    assert setting.plus(bare, args).keys() == setting.plus(wrapper, args).keys()
    for name, tensor in wrapper.model.state_dict().items():
        assert torch.equal(bare.state_dict()[name], tensor), name


# What stays, and what is taken out again


def test_quantizers_of_inputs_can_be_taken_out_again(setting: Setting) -> None:
    wrapper, weights = setting.wrapper(), setting.wrapper()
    words = setting.words("--visual_w_rtn --llm_w_rtn")
    setting.plus(wrapper, namespace(words), kv_cache="int8-head")
    setting.plus(weights, namespace(f"{words} --visual_a_bits 16 --llm_a_bits 16"))
    wanted = logits(weights.model, weights.processor, setting.file)
    assert not torch.equal(logits(wrapper.model, wrapper.processor, setting.file), wanted)
    mquant.remove_quantizers(wrapper)
    assert torch.equal(logits(wrapper.model, wrapper.processor, setting.file), wanted)
    with pytest.raises(ModelError, match="is no model"):
        mquant.remove_quantizers(object())


def test_hooks_on_layers_stay(tiny: Callable[..., Path]) -> None:
    model, processor = pq.load(tiny("qwen2_vl"))
    seen: list[str] = []
    layers = model.model.language_model.layers
    handles = [
        layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append("after")),
        layers[0].mlp.up_proj.register_forward_pre_hook(lambda *_: seen.append("before")),
    ]
    PLUS["qwen2_vl"](model, None, None, None, {"quant_llm": True, "llm_w_rtn": True})
    assert isinstance(layers[0].mlp.up_proj, QuantLinear)
    inputs = processor.tokenizer("what is it", return_tensors="pt")
    model(**inputs)
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    model(**inputs)
    assert len(seen) == 2


@pytest.mark.parametrize("fault", ["picture", "number"])
def test_a_model_is_as_it_was_after_an_error(setting: Setting, fault: str, tmp_path: Path) -> None:
    path = tiny_vlm.samples(tmp_path, kinds=("image",), count=4)
    wrapper, dataset = setting.wrapper(), PromptDataset(path)
    args = namespace(setting.words("--visual_static"))
    if fault == "picture":
        (tmp_path / "2.png").unlink()
    else:
        with torch.no_grad():
            wrapper.model.model.language_model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in wrapper.model.state_dict().items()}
    with pytest.raises(DataError if fault == "picture" else NumericsError):
        PLUS[setting.name](wrapper, dataset, None, None, args)
    after = wrapper.model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].nan_to_num(7.0), tensor.nan_to_num(7.0))


def test_a_model_is_restored_where_its_result_cannot_be_put_in(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what an earlier call has put around its layers."""
    wrapper = setting.wrapper()
    args = namespace("--quant_llm --llm_w_rtn --llm_a_bits 4")
    setting.plus(wrapper, args, kv_cache="int8-head")
    wanted = logits(wrapper.model, wrapper.processor, setting.file)

    def fail(model: Any, checkpoint: Any) -> None:
        simulate_activations(model, checkpoint)
        raise StorageError("the disk is gone")

    monkeypatch.setattr(live_model, "simulate_activations", fail)
    words = setting.words("--visual_w_rtn --llm_w_rtn --rotate --rotate_llm --online_llm_hadamard")
    with pytest.raises(StorageError, match="the disk is gone"):
        setting.plus(wrapper, namespace(words), kv_cache="fp8")
    assert torch.equal(logits(wrapper.model, wrapper.processor, setting.file), wanted)


# Wrong calls


def test_the_wrong_family_is_told_which_function_to_call(tiny: Callable[..., Path]) -> None:
    for name, other in (("qwen2_vl", "video_llama_3"), ("video_llama_3", "qwen2_vl")):
        model, _ = pq.load(tiny(other))
        with pytest.raises(ModelError) as found:
            PLUS[name](SimpleNamespace(model=model), None, None, None, {"quant_llm": True})
        assert f"quantizes {FAMILIES[name].title}" in found.value.what
        assert f"call {FAMILIES[other].entry}(" in str(found.value.remedy)
        assert FAMILIES[other].connector in str(found.value.remedy)
    other_model, _ = pq.load(tiny("qwen3_vl"))
    with pytest.raises(ModelError, match="this is a Qwen3VLForConditionalGeneration") as found:
        PLUS["qwen2_vl"](other_model, None, None, None, {"quant_llm": True})
    assert "prismquant.quantize(" in str(found.value.remedy)


def test_a_model_of_remote_code_is_told_how_to_be_loaded() -> None:
    class Videollama3Qwen2ForCausalLM(torch.nn.Module):
        """Of the original repositories."""

        def __init__(self) -> None:
            super().__init__()
            self.config, self.lm_head = SimpleNamespace(), torch.nn.Linear(2, 2)

    wrapper = SimpleNamespace(model=Videollama3Qwen2ForCausalLM())
    with pytest.raises(ModelError, match="of the checkpoint's own code") as found:
        PLUS["video_llama_3"](wrapper, None, None, None, {"quant_llm": True})
    assert "prismquant.load(FOLDER)" in str(found.value.remedy)
    with pytest.raises(ModelError) as other:
        PLUS["qwen2_vl"](wrapper, None, None, None, {"quant_llm": True})
    assert "call videollama3_rtn_gptq_fwrd_plus(" in str(other.value.remedy)


def test_the_other_familys_connector_is_told_this_ones(setting: Setting) -> None:
    other = next(one for one in FAMILIES.values() if one is not setting.family)
    with pytest.raises(RecipeError) as found:
        setting.plus(setting.wrapper(), {other.connector: True})
    assert setting.family.connector in found.value.what
    assert f"set {setting.family.connector} = True" in str(found.value.remedy)


def test_options_devices_and_memory_are_checked(setting: Setting) -> None:
    args = {"quant_llm": True, "llm_w_rtn": True}
    with pytest.raises(ArgumentError, match="no option 'batchsize'") as found:
        setting.plus(setting.wrapper(), args, batchsize=2)
    assert "did you mean 'batch_size'" in str(found.value.remedy)
    with pytest.raises(ArgumentError) as refused:
        PLUS[setting.name](setting.wrapper(), None, "cuda:99", None, args)
    assert (refused.value.where, refused.value.remedy) == (
        "dev",
        "give another dev; None is where the model is",
    )
    with pytest.raises(StorageError, match="exists and is not empty"):
        setting.plus(setting.wrapper(), args, out=setting.folder)
    with pytest.raises(PlanError) as misfit:
        setting.plus(setting.wrapper(), args | {"llm_w_bits": 16})
    assert misfit.value.where == "the model in memory"
    wrapper = setting.wrapper()
    wrapper.model.model.language_model.layers[0].to("meta")
    with pytest.raises(ModelError, match="it was offloaded"):
        setting.plus(wrapper, args)


def test_names_that_are_skipped_are_those_within_wrappers(setting: Setting) -> None:
    skip = {"skip_names": ["mlp.down_proj.module"], "quant_llm": True, "llm_w_rtn": True}
    keys = setting.plus(setting.wrapper(), skip)
    assert len(keys) == 12
    assert not any("down_proj" in key for key in keys)


def test_bits_of_inputs_that_are_not_given_are_told(setting: Setting) -> None:
    args = {"quant_llm": True, "llm_w_rtn": True}
    with pytest.warns(mquant.CompatWarning, match="llm_a_bits: not given, so 8"):
        setting.plus(setting.wrapper(), args)
    with pytest.warns(mquant.CompatWarning) as found:
        setting.plus(setting.wrapper(), args | {"llm_a_bits": 8})
    assert "not given" not in str(found[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setting.plus(setting.wrapper(), args | {"llm_a_bits": 16})


@pytest.mark.parametrize("size", [3, 7, 24, 96])
def test_a_group_size_that_divides_no_layer_is_told(setting: Setting, size: int) -> None:
    args = {"quant_llm": True, "llm_a_bits": 16, "w_groupsize": size}
    told = rf"group size {size} does not divide its \d+ input features: int4 .* instead: model\."
    with pytest.warns(mquant.CompatWarning, match=told):
        setting.plus(setting.wrapper(), args)


def test_a_model_without_head_and_wrapped_layers_are_refused(setting: Setting) -> None:
    wrapper = setting.wrapper()
    with pytest.raises(ModelError, match="takes a whole model"):
        setting.plus(wrapper.model.model, {"quant_llm": True})

    class ActQuantWrapper(torch.nn.Module):
        """MQuant's."""

    wrapper.model.model.language_model.layers[0].mlp.up_proj = ActQuantWrapper()
    with pytest.raises(ModelError, match="wrapped by MQuant already"):
        setting.plus(wrapper, {"quant_llm": True})


def test_calibration_needs_a_processor_and_a_dataset(setting: Setting) -> None:
    wrapper = setting.wrapper()
    wrapper.model.config._name_or_path = ""
    with pytest.raises(DataError, match="it has no processor"):
        setting.plus(wrapper.model, {"quant_llm": True})
    with pytest.raises(pq.PrismQuantError, match="no dataset to calibrate on"):
        PLUS[setting.name](wrapper, object(), None, None, {"quant_llm": True})


def test_nothing_to_quantize_and_contradictions_are_told(setting: Setting) -> None:
    for nothing in (None, SimpleNamespace(), {"llm_w_bits": 8}):
        with pytest.raises(RecipeError, match="asks for no part of the model"):
            setting.plus(setting.wrapper(), nothing)
    args = SimpleNamespace(quant_llm=True, llm_static=True, a_asym=True)
    with pytest.warns(mquant.CompatWarning, match="a_asym: true .*symmetric") as found:
        setting.plus(setting.wrapper(), args)
    assert found[0].filename == __file__
