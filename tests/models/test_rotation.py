"""A rotated checkpoint computes the same function, in float64 to the last digits."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from torch import nn

from prismquant.algorithms.rotation import RotatedTower, Rotation
from prismquant.errors import ModelError, PlanError, RecipeError
from prismquant.formats.online_rotation import OnlineRotation
from prismquant.models import rotated_reader
from prismquant.models.arch import EdgeKind, Modality
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.models.load import empty_model, materialize
from prismquant.models.processor import load_processor
from prismquant.models.rotated_reader import RotatedReader
from prismquant.models.rotated_towers import online_rotations, untied
from prismquant.numerics.hadamard import block_hadamard
from prismquant.recipe.match import Match
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

# Everything that the tests draw is random, so the error of an equal function is far below this.
TOLERANCE = 1e-12

LLM, VISION = Modality.LLM, Modality.VISION
ONLY_RESIDUAL = {"values": False}
ONLY_VALUES = {"residual": False}
ONLY_ONLINE = {"residual": False, "values": False, "online": True}
CASES = {
    "llm residual": [RotatedTower(LLM, Rotation(**ONLY_RESIDUAL))],
    "llm values": [RotatedTower(LLM, Rotation(**ONLY_VALUES))],
    "llm online": [RotatedTower(LLM, Rotation(**ONLY_ONLINE))],
    "vision residual": [RotatedTower(VISION, Rotation(**ONLY_RESIDUAL))],
    "vision values": [RotatedTower(VISION, Rotation(**ONLY_VALUES))],
    "vision online": [RotatedTower(VISION, Rotation(**ONLY_ONLINE, online_block=32))],
    "plain signs": [
        RotatedTower(LLM, Rotation(online=True, signs=False)),
        RotatedTower(VISION, Rotation(online=True, signs=False)),
    ],
    "random": [
        RotatedTower(LLM, Rotation(kind="random", seed=4)),
        RotatedTower(VISION, Rotation(kind="random")),
    ],
    "all": [
        RotatedTower(LLM, Rotation(online=True, seed=1)),
        RotatedTower(VISION, Rotation(online=True, online_block=64)),
    ],
}
ALL = CASES["all"]


# ---------------------------------------------------------------------------------- equivalence


def _wide_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    """An RMSNorm that keeps float64; that of transformers computes in float32."""
    mean = x.pow(2).mean(-1, keepdim=True)
    return self.weight * (x * torch.rsqrt(mean + self.variance_epsilon))


@torch.no_grad()
def _logits(
    bound: BoundModel,
    reader: ShardReader,
    samples: Sequence[dict[str, torch.Tensor]],
    online: dict[str, OnlineRotation],
    seen: dict[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Float64 logits of all samples; ``seen`` receives the rotated inputs of the online sites."""
    model = empty_model(bound.config, bound.arch)
    materialize(model, "", reader, bound.names, "cpu", torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_wide_norm, module)

    def hook(name: str, rotate: OnlineRotation):
        def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            rotated = rotate.apply(args[0])
            if seen is not None:
                seen[name] = rotated
            return (rotated,)

        return before

    for name, rotate in online.items():
        model.get_submodule(name).register_forward_pre_hook(hook(name, rotate))
    ready = [
        {k: v.double() if v.is_floating_point() else v for k, v in sample.items()}
        for sample in samples
    ]
    return [model(**sample).logits for sample in ready]


@pytest.fixture(scope="module")
def samples(
    tiny: Callable[..., Path], calibration_file: Path
) -> Callable[[str], list[dict[str, torch.Tensor]]]:
    """Two texts, two pictures and two clips for a family; all layouts take the same inputs."""
    return functools.cache(
        lambda family: tiny_vlm.encode(load_processor(tiny(family)), calibration_file)
    )


@pytest.fixture(scope="module")
def error(samples) -> Callable[..., float]:
    """Largest difference of a logit when rotated, relative to the largest logit."""
    references: dict[Path, list[torch.Tensor]] = {}

    def largest(bound: BoundModel, family: str, rotations: Sequence[Rotation]) -> float:
        folder = bound.folder
        if folder not in references:
            references[folder] = _logits(bound, ShardReader(folder), samples(family), {})
        online = online_rotations(bound, rotations)
        reader = RotatedReader(folder, bound, rotations)
        after = _logits(bound, reader, samples(family), online)
        return _difference(after, references[folder])

    return largest


def _difference(after: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> float:
    pairs = zip(after, before, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays(tiny: Callable[..., Path], error, family: str, case: str):
    """Each part alone and all together, on text, pictures and videos."""
    bound = bind(tiny(family, dtype=torch.float64))
    assert error(bound, family, CASES[case]) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen2_vl", "native"), ("qwen2_5_vl", "native"), ("video_llama_3", "remote")],
)
def test_other_layouts_on_disk_are_rotated_as_well(
    tiny: Callable[..., Path], error, family: str, layout: str
):
    bound = bind(tiny(family, dtype=torch.float64, layout=layout))
    assert error(bound, family, ALL) < TOLERANCE


def test_a_tied_head_is_untied(tiny: Callable[..., Path], error, family: str):
    """The final norm's scale goes into the head alone."""
    bound = bind(tiny(family, dtype=torch.float64, tie=True))
    assert bound.tied
    assert untied(bound, ALL)
    reader = RotatedReader(bound.folder, bound, ALL)
    assert reader.names - ShardReader(bound.folder).names == {"lm_head.weight"}
    embedding = bound.names.to_disk(f"{bound.arch.embeddings}.weight")
    assert reader.info("lm_head.weight") == reader.info(embedding)
    head, table = reader.read("lm_head.weight"), reader.read(embedding)
    assert head.shape == table.shape
    assert not torch.allclose(head, table)
    assert error(bound, family, ALL) < TOLERANCE


@pytest.mark.parametrize("case", ["llm values", "llm online", "vision residual"])
def test_a_tied_head_stays_tied_where_its_stream_is_not_rotated(
    tiny: Callable[..., Path], error, case: str
):
    bound = bind(tiny("qwen3_vl", dtype=torch.float64, tie=True))
    assert not untied(bound, CASES[case])
    reader = RotatedReader(bound.folder, bound, CASES[case])
    assert "lm_head.weight" not in reader.names
    assert error(bound, "qwen3_vl", CASES[case]) < TOLERANCE
    assert not untied(bind(tiny("qwen3_vl", dtype=torch.float64)), ALL)


@pytest.mark.parametrize("case", sorted(CASES))
def test_lines_of_a_rotated_tensor_are_those_of_the_whole(tiny: Callable[..., Path], case: str):
    bound = bind(tiny("qwen2_vl", dtype=torch.float64, tie=True))
    reader, rows = RotatedReader(bound.folder, bound, CASES[case]), torch.tensor([0, 3, 3, 9])
    for name in sorted(reader.names):
        whole = reader.read(name)
        if whole.ndim == 2 and len(whole) > 9:
            lines = reader.read_rows(name, rows)
            torch.testing.assert_close(lines, whole[rows], rtol=0, atol=1e-14)


def test_widths_that_are_no_power_of_two_are_rotated(
    tmp_path: Path, calibration_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Heads of 36 channels, a stream of 144, MLPs of 264; and tensors a few rows at a time."""
    monkeypatch.setattr(rotated_reader, "_CHUNK", 1000)
    monkeypatch.setattr(tiny_vlm, "HIDDEN", 144)
    monkeypatch.setattr(tiny_vlm, "INTERMEDIATE", 264)
    bound = bind(tiny_vlm.build("video_llama_3", tmp_path, dtype=torch.float64))
    inputs = tiny_vlm.encode(load_processor(tmp_path), calibration_file)
    rotations = [
        RotatedTower(LLM, Rotation(online=True)),
        RotatedTower(VISION, Rotation(online=True)),
    ]
    assert {online.block for online in online_rotations(bound, rotations).values()} == {8}
    before = _logits(bound, ShardReader(tmp_path), inputs, {})
    reader = RotatedReader(tmp_path, bound, rotations)
    after = _logits(bound, reader, inputs, online_rotations(bound, rotations))
    assert _difference(after, before) < TOLERANCE


def test_the_models_own_code_agrees_in_float32(tiny_folder: Path, samples, family: str):
    """With its norms as they are, and weights rounded to float32."""
    bound = bind(tiny_folder)
    rotations = [RotatedTower(LLM), RotatedTower(VISION)]
    before, after = (
        _float32(bound, reader, samples(family))
        for reader in (ShardReader(tiny_folder), RotatedReader(tiny_folder, bound, rotations))
    )
    assert _difference(after, before) < 2e-4


@torch.no_grad()
def _float32(bound: BoundModel, reader: ShardReader, samples) -> list[torch.Tensor]:
    model = empty_model(bound.config, bound.arch)
    materialize(model, "", reader, bound.names, "cpu", torch.float32)
    return [model(**sample).logits for sample in samples]


# ------------------------------------------------------------------------------------ what it does


def _outlier_ratio(x: torch.Tensor) -> float:
    """Largest channel over the root mean square."""
    return (x.abs().amax() / x.pow(2).mean().sqrt()).item()


@torch.no_grad()
def test_an_outlier_channel_of_the_stream_disappears(tiny: Callable[..., Path], samples, family):
    """Inputs of the first block's readers, with one channel of the embeddings a hundred times up.

    The same happens in the vision tower, where the mean over channels must stay.
    """
    bound = bind(tiny(family, dtype=torch.float64))
    for modality in (LLM, VISION):
        stream = next(s for s in bound.streams if s.modality is modality)
        reader = RotatedReader(bound.folder, bound, [RotatedTower(modality)])
        spike = torch.zeros(1, stream.width, dtype=torch.float64)
        spike[0, 5] = 100.0
        turned = _turned(bound, reader, stream.writers[-1], spike)
        assert turned.norm() == pytest.approx(100.0)
        assert _outlier_ratio(spike) == pytest.approx(math.sqrt(stream.width))
        assert _outlier_ratio(turned) < 3
        ones = _turned(bound, reader, stream.writers[-1], torch.ones_like(spike))
        assert torch.allclose(ones, torch.ones_like(ones)) == stream.centred


def _turned(bound: BoundModel, reader: RotatedReader, writer: str, x: torch.Tensor):
    """``x Q``, with the rotation taken from the weights of a writer: ``W' = Q^T W``."""
    name = bound.names.to_disk(f"{writer}.weight")
    old = ShardReader(bound.folder).read(name).flatten(1)
    new = reader.read(name).flatten(1)
    return x @ torch.linalg.lstsq(old.mT, new.mT, driver="gelsd").solution


def test_norms_become_plain_and_their_parameters_move(tiny_folder: Path, family: str):
    bound = bind(tiny_folder)
    reader = RotatedReader(tiny_folder, bound, [RotatedTower(LLM), RotatedTower(VISION)])
    norms = {edge.norm for edge in bound.edges if edge.kind is EdgeKind.NORM}
    assert norms == {name for stream in bound.streams for name in stream.norms}, family
    for name in norms:
        weight = reader.read(bound.names.to_disk(f"{name}.weight"))
        assert torch.equal(weight, torch.ones_like(weight))
        if f"{name}.bias" in bound.shapes:
            assert not reader.read(bound.names.to_disk(f"{name}.bias")).any()


@pytest.mark.parametrize("case", CASES)
def test_only_the_rotated_tower_and_its_neighbours_change(tiny: Callable[..., Path], case: str):
    """And nothing of shape, dtype and names."""
    bound = bind(tiny("qwen3_vl", dtype=torch.bfloat16))
    old, new = ShardReader(bound.folder), RotatedReader(bound.folder, bound, CASES[case])
    assert new.names == old.names
    assert all(new.info(name) == old.info(name) for name in old.names)
    changed = set()
    for name in old.names:
        before, after = old.read(name), new.read(name)
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        assert after.is_contiguous()
        if not torch.equal(before, after):
            changed.add(name)
    touched = {
        "llm residual": {"model.language_model.norm.weight", "lm_head.weight"},
        "llm values": {"model.language_model.layers.0.self_attn.v_proj.weight"},
        "llm online": {"model.language_model.layers.1.mlp.up_proj.weight"},
        "vision residual": {"model.visual.pos_embed.weight", "model.visual.patch_embed.proj.bias"},
        "vision values": {"model.visual.blocks.2.attn.qkv.bias"},
        "vision online": {"model.visual.blocks.0.mlp.linear_fc2.weight"},
    }.get(case, set())
    assert touched <= changed
    tower = {"llm": "model.language_model.", "vision": "model.visual."}.get(case.split()[0], "")
    other = {n for n in changed if not n.startswith((tower, "lm_head"))}
    if case == "llm residual":
        # the last linears of the mergers write to the language model's stream
        assert other == {
            f"model.visual.{merger}.linear_fc2.{leaf}"
            for merger in ("merger", "deepstack_merger_list.0", "deepstack_merger_list.1")
            for leaf in ("weight", "bias")
        }
    else:
        assert not other


def test_query_and_key_rows_of_a_fused_layer_stay(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl"))
    name = "visual.blocks.0.attn.qkv.weight"
    old = ShardReader(bound.folder).read(name)
    new = RotatedReader(bound.folder, bound, CASES["vision values"]).read(name)
    third = len(old) // 3
    assert torch.equal(new[: 2 * third], old[: 2 * third])
    assert not torch.allclose(new[2 * third :], old[2 * third :])


def test_exact_tensors_come_in_float32_and_round_to_the_others(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_5_vl", dtype=torch.bfloat16))
    exact = {f"{site.name}.weight" for site in bound.sites}
    plain = RotatedReader(bound.folder, bound, ALL)
    fine = RotatedReader(bound.folder, bound, ALL, exact)
    for name in sorted(plain.names):
        wanted = torch.float32 if bound.names.to_module(name) in exact else torch.bfloat16
        tensor = fine.read(name)
        assert tensor.dtype == fine.info(name).dtype == wanted
        assert torch.equal(tensor.to(torch.bfloat16), plain.read(name))


def test_an_exact_tensor_that_is_not_rotated_is_widened_only(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl", dtype=torch.bfloat16))
    name = "lm_head.weight"
    reader = RotatedReader(bound.folder, bound, CASES["vision values"], [name])
    assert torch.equal(reader.read(name), ShardReader(bound.folder).read(name).float())


def test_a_seed_decides_the_rotation(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl"))
    name = "model.embed_tokens.weight"
    first, same, other = (
        RotatedReader(bound.folder, bound, [RotatedTower(LLM, Rotation(seed=seed))]).read(name)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------------------------------ online


def test_every_last_linear_of_an_mlp_is_named(tiny_folder: Path, family: str):
    bound = bind(tiny_folder)
    for modality in (LLM, VISION):
        found = online_rotations(bound, [RotatedTower(modality, Rotation(online=True))])
        blocks = [s for s in bound.steps if s.modality is modality and s.kind == "block"]
        assert len(found) == len(blocks)
        for name, rotate in found.items():
            site = bound.site(name)
            assert (site.role, site.modality) == ("mlp.down", modality)
            assert rotate.block == 256
            # behind SwiGLU the rows of up_proj have the signs; GELU lets none through
            gated = modality is LLM or family == "qwen2_5_vl"
            assert (rotate.signs is None) == gated
            if rotate.signs is not None:
                assert rotate.signs.dtype == torch.int8
                assert rotate.signs.shape == (site.in_features,)
                assert rotate.signs.abs().eq(1).all()
    assert online_rotations(bound, [RotatedTower(LLM), RotatedTower(VISION)]) == {}


def test_signs_differ_between_layers_and_can_be_left_out(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl"))
    first, second = online_rotations(bound, [RotatedTower(VISION, Rotation(online=True))]).values()
    assert not torch.equal(first.signs, second.signs)
    plain = online_rotations(bound, [RotatedTower(VISION, Rotation(online=True, signs=False))])
    assert all(rotate.signs is None for rotate in plain.values())


def test_the_online_input_is_the_old_one_turned(tiny: Callable[..., Path], samples):
    """Seen at the layer: signs and blocks applied to what the unrotated layer reads."""
    bound = bind(tiny("video_llama_3", dtype=torch.float64))
    inputs = samples("video_llama_3")[1:2]
    rotations = [RotatedTower(VISION, Rotation(**ONLY_ONLINE, online_block=16))]
    online = online_rotations(bound, rotations)
    turned: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    reader = RotatedReader(bound.folder, bound, rotations)
    _logits(bound, reader, inputs, online, turned)
    nothing = dict.fromkeys(online, OnlineRotation(1, 1))
    _logits(bound, ShardReader(bound.folder), inputs, nothing, plain)
    assert turned.keys() == plain.keys()
    for name, rotate in online.items():
        expected = block_hadamard(plain[name] * rotate.signs, 16)
        torch.testing.assert_close(turned[name], expected, rtol=1e-9, atol=1e-9)


def test_an_online_rotation_keeps_the_dtype():
    rotate = OnlineRotation(8, 16, "a seed")
    x = torch.randn(3, 16)
    assert rotate.apply(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(rotate.apply(x).norm(), x.norm())


# ----------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hadamrd"}, "unknown kind 'hadamrd'"),
        ({"residual": False, "values": False}, "a rotation of nothing"),
        ({"online_block": 32}, "online_block 32 needs online: true"),
        ({"online": True, "online_block": 24}, "a power of two from 2 up"),
        ({"online": True, "online_block": 0}, "a power of two from 2 up"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        Rotation(**options)
    assert caught.value.remedy


@pytest.mark.parametrize("modality", ["projector", "audio"])
def test_only_towers_are_rotated(modality: str):
    with pytest.raises(RecipeError, match=f"{modality} modality cannot be rotated") as caught:
        RotatedTower(modality)  # type: ignore[arg-type]
    assert caught.value.remedy


def test_a_modality_may_be_given_by_name():
    assert RotatedTower("llm").modality == LLM  # type: ignore[arg-type]


def test_a_transform_rotates_the_towers_that_are_meant(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl"))
    assert Rotation(seed=3).plan(bound, Match(modality="llm")) == [
        RotatedTower(LLM, Rotation(seed=3))
    ]
    assert Rotation().plan(bound, Match()) == [RotatedTower(VISION), RotatedTower(LLM)]
    with pytest.raises(PlanError, match="the projector is not rotated itself"):
        Rotation().plan(bound, Match(modality=("projector", "llm")))


def test_two_rotations_of_one_tower_are_refused(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl"))
    twice = [RotatedTower(LLM), RotatedTower(LLM, Rotation(online=True))]
    with pytest.raises(RecipeError, match="two rotations for llm"):
        RotatedReader(bound.folder, bound, twice)
    with pytest.raises(RecipeError, match="two rotations for llm"):
        online_rotations(bound, twice)


def test_a_block_that_does_not_divide_is_refused(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl"))
    rotation = RotatedTower(LLM, Rotation(online=True, online_block=512))
    with pytest.raises(ModelError, match="blocks of 512 do not divide the 256 inputs") as caught:
        online_rotations(bound, [rotation])
    assert "online_block of 256" in str(caught.value)
    with pytest.raises(ModelError, match="blocks of 512"):
        RotatedReader(bound.folder, bound, [rotation])


def test_a_tower_without_a_described_stream_can_only_be_rotated_inside(tiny: Callable[..., Path]):
    bound = dataclasses.replace(bind(tiny("qwen2_vl")), streams=())
    with pytest.raises(ModelError, match="no residual stream of its vision tower") as caught:
        RotatedReader(bound.folder, bound, [RotatedTower(VISION)])
    assert "residual: false" in str(caught.value)
    RotatedReader(bound.folder, bound, CASES["vision values"])


def test_a_shift_without_a_bias_to_take_it_is_refused(tiny: Callable[..., Path]):
    bound = bind(tiny("qwen2_vl"))
    shapes = {n: s for n, s in bound.shapes.items() if n != "model.visual.blocks.1.mlp.fc1.bias"}
    odd = dataclasses.replace(bound, shapes=shapes)
    with pytest.raises(ModelError, match=r"blocks.1.norm2 has a shift, and .*fc1 has no bias"):
        RotatedReader(bound.folder, odd, [RotatedTower(VISION)])


def test_norms_of_one_plus_a_weight_are_folded_whole(tiny: Callable[..., Path]) -> None:
    """In float64: what is left of a norm multiplies by one, and its readers take 1 + w, not w.

    A rotation leaves the products of a layer's rows with one another. Layers that are left alone
    read the norm of linear attention, too.
    """
    folder = tiny("qwen3_5")
    bound, source = bind(folder), ShardReader(folder)
    rotated = RotatedReader(folder, bound, [RotatedTower(Modality.LLM, Rotation(values=False))])
    edges = [edge for edge in bound.edges if edge.from_one]
    assert [len(edge.others) for edge in edges] == [2, 0, 0, 0, 0]
    for edge in edges:
        norm = source.read(f"{edge.source}.weight").double()
        assert torch.equal(rotated.read(f"{edge.source}.weight"), torch.zeros(len(norm)))
        for name in edge.readers:
            weight = source.read(f"{name}.weight").double() * (1 + norm)
            turned = rotated.read(f"{name}.weight").double()
            scale = (weight @ weight.mT).abs().max().item()
            torch.testing.assert_close(
                turned @ turned.mT, weight @ weight.mT, rtol=0, atol=1e-6 * scale
            )
            assert (turned - weight).abs().max() > 0.1 * weight.abs().max()
