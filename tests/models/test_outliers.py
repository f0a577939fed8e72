"""Outliers change activations, and nothing else: outputs are equal bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny_vlm
import torch

from prismquant.errors import ModelError, NumericsError
from prismquant.models.arch import EdgeKind
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.outliers import add_outliers
from prismquant.models.processor import load_processor
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@torch.no_grad()
def _run(folder: Path, calibration: Path, dtype: torch.dtype):
    """Logits of all samples, and the peaks of every site's input channels."""
    model = load_float(folder, dtype)
    peaks: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def record(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            peak = args[0].flatten(0, -2).abs().amax(0).float()
            peaks[name] = torch.maximum(peaks.get(name, peak), peak)

        return record

    for site in bind(folder).sites:
        if site.kind == "linear":
            model.get_submodule(site.name).register_forward_pre_hook(hook(site.name))
    logits = []
    for sample in tiny_vlm.encode(load_processor(folder), calibration):
        ready = {k: v.to(dtype) if v.is_floating_point() else v for k, v in sample.items()}
        logits.append(model(**ready).logits)
    return logits, peaks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_the_function_is_equal_bit_for_bit(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, family: str, dtype
):
    source = tiny(family, dtype=dtype)
    out = tmp_path / "out"
    chosen = add_outliers(source, out, factor=64, channels=3, seed=5)
    before, peaks_before = _run(source, calibration_file, dtype)
    after, peaks_after = _run(out, calibration_file, dtype)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    # every reader of a touched edge sees exactly the chosen channels grow, and no others
    readers = {name: edge for edge in bind(source).edges for name in edge.consumers}
    for name, edge in readers.items():
        factor = torch.ones(edge.size)
        if edge.source in chosen:
            factor[list(chosen[edge.source])] = 64
        if edge.kind is EdgeKind.VALUE:
            continue
        assert torch.equal(peaks_after[name], peaks_before[name] * factor.repeat(edge.tile)), name


def test_norms_and_gated_products_of_all_parts_are_touched(
    tiny_folder: Path, tmp_path: Path, family: str
):
    bound = bind(tiny_folder)
    chosen = add_outliers(tiny_folder, tmp_path)
    expected = {edge.source for edge in bound.edges if edge.kind is not EdgeKind.VALUE}
    assert chosen.keys() == expected
    assert all(len(channels) == 2 for channels in chosen.values()), family


@pytest.mark.parametrize("modality", ["vision", "projector", "llm"])
def test_one_modality_can_be_chosen(tiny: Callable[..., Path], tmp_path: Path, modality: str):
    source = tiny("qwen2_5_vl")
    chosen = add_outliers(source, tmp_path, modality=modality)
    bound = bind(source)
    edges = {edge.source: edge for edge in bound.edges}
    assert {bound.steps[edges[name].step].modality for name in chosen} == {modality}
    old, new = ShardReader(source), ShardReader(tmp_path)
    changed = {n for n in old.names if not torch.equal(old.read(n), new.read(n))}
    prefix = {"vision": "visual.blocks", "projector": "visual.merger", "llm": ("model", "lm_head")}
    assert changed
    assert all(name.startswith(prefix[modality]) for name in changed)


def test_a_tied_head_and_its_norm_are_not_touched(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, family: str
):
    source = tiny(family, tie=True)
    chosen = add_outliers(source, tmp_path, modality="llm")
    assert "model.language_model.norm" not in chosen
    before, _ = _run(source, calibration_file, torch.float32)
    after, _ = _run(tmp_path, calibration_file, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_other_files_and_names_on_disk_stay(tiny: Callable[..., Path], tmp_path: Path):
    source = tiny("video_llama_3", layout="remote")
    add_outliers(source, tmp_path)
    assert ShardReader(tmp_path).names == ShardReader(source).names
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    old = ShardReader(source)
    assert all(ShardReader(tmp_path).info(n).dtype == old.info(n).dtype for n in old.names)


def test_channels_are_seeded_and_mostly_the_same_in_all_blocks(
    tiny: Callable[..., Path], tmp_path: Path
):
    source = tiny("qwen2_vl", llm_blocks=12)
    first = add_outliers(source, tmp_path / "a", seed=3, channels=4, modality="llm")
    again = add_outliers(source, tmp_path / "b", seed=3, channels=4, modality="llm")
    other = add_outliers(source, tmp_path / "c", seed=4, channels=4, modality="llm")
    assert first == again
    assert first != other
    blocks = [set(c) for name, c in first.items() if name.endswith("layernorm")]
    common = max(blocks, key=lambda block: sum(block == b for b in blocks))
    shared = [len(block & common) for block in blocks]
    assert sum(shared) >= 2.5 * len(blocks)
    assert min(shared) < 4  # but not all are equal


@pytest.mark.parametrize("factor", [3.0, 1.0, 0.5, 0.0, -2.0, float("inf"), float("nan")])
def test_only_powers_of_two_are_accepted(tiny: Callable[..., Path], tmp_path: Path, factor: float):
    with pytest.raises(ModelError, match="not a power of two above one"):
        add_outliers(tiny("qwen2_vl"), tmp_path, factor=factor)
    assert not list(tmp_path.iterdir())


def test_arguments_out_of_range_are_refused(tiny: Callable[..., Path], tmp_path: Path):
    source = tiny("qwen2_vl")
    with pytest.raises(ModelError, match="0 outlier channels"):
        add_outliers(source, tmp_path, channels=0)
    with pytest.raises(ModelError, match="500 outlier channels do not fit 128"):
        add_outliers(source, tmp_path, channels=500)
    with pytest.raises(ModelError, match="modality 'audio'"):
        add_outliers(source, tmp_path, modality="audio")
    with pytest.raises(ModelError, match="overwrite its source"):
        add_outliers(source, source)


def test_a_dtype_that_cannot_hold_the_values_is_an_error(tiny: Callable[..., Path], tmp_path: Path):
    with pytest.raises(NumericsError, match=r"torch.float16 cannot hold .* exactly"):
        add_outliers(tiny("qwen2_vl", dtype=torch.float16), tmp_path, factor=2.0**16)
