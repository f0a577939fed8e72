"""Which modalities statistics have seen: counted, told, and refused where that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

import prismquant as pq
from prismquant.engine.setup import Silent
from prismquant.errors import NumericsError, PlanError
from prismquant.models.processor import load_processor
from prismquant.opening import read_json
from prismquant.recipe.schema import load_recipe
from prismquant.report.plans import token_lines
from prismquant.report.run_files import RunFiles
from prismquant.run.directory import RunDirectory
from prismquant.shards import ShardReader
from prismquant.statistics.tokens import Tokens
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Heard(Silent):
    """Keeps what it is told before the first stage of the work."""

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.begun = self.late = False

    def remark(self, line: str) -> None:
        """Keep it."""
        self.late = self.late or self.begun
        self.remarks.append(line)

    def begin(self, steps: int) -> None:
        """The work begins."""
        self.begun = True


UNSEEN: dict[str, tuple[Any, list[str]]] = {
    "static": ("w8a8-static", ["static ranges of 14 layers", "Hessians of 14 layers"]),
    "hessian": ("w4a16", ["Hessians of 14 layers"]),
    "cache": (
        {"rules": [{"weights": "int8-channel", "solver": "rtn"}], "kv_cache": "fp8"},
        ["scales of the key-value cache"],
    ),
    "edges": (
        {
            "rules": [{"match": {"modality": "llm"}, "weights": "int8-channel", "solver": "rtn"}],
            "transforms": [{"name": "smoothquant", "options": {"search": False}}],
        },
        ["scales of 9 edges"],
    ),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_what_no_vision_token_reaches_is_told_before_the_work_and_refused_if_asked(
    kind: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """On the screen, in the plan on disk and in the result; --strict makes it an error."""
    recipe = load_recipe(UNSEEN[kind][0]).with_calibration(samples=2)
    text = tiny_vlm.samples(tmp_path / "text", kinds=("text",), count=2)
    given = tiny("qwen2_vl"), recipe, tmp_path / "out", text
    with pytest.raises(PlanError, match="no calibration sample shows a picture or a clip") as error:
        pq.quantize(*given, strict=True)
    assert "--strict" in str(error.value.remedy)
    assert not (tmp_path / "out").exists()
    heard = Heard()
    result = pq.quantize(*given, reporter=heard)
    (line,) = heard.remarks
    assert not heard.late
    assert [part for part in UNSEEN[kind][1] if part not in line] == [], line
    assert line in result.plan.remarks
    assert line in read_json(tmp_path / "out" / "prismquant" / "plan.json")["remarks"]
    assert pq.quantize(*given, resume=True).record == result.record


@pytest.mark.parametrize("shown", ["image", "video"])
def test_one_picture_or_clip_is_enough(
    shown: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Tokens of both kinds come from the same tower."""
    data = tiny_vlm.samples(tmp_path / "data", kinds=("text", shown), count=2)
    recipe = load_recipe("w8a8-static").with_rules({"weight_range": "minmax", "solver": "rtn"})
    heard = Heard()
    pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "out", data, reporter=heard, strict=True)
    assert heard.remarks == []


def test_a_recipe_without_data_sees_nothing_and_is_told_nothing(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    heard = Heard()
    recipe = load_recipe("w8a8").with_rules({"solver": "rtn"})
    pq.quantize(tiny("qwen2_vl"), recipe, tmp_path, reporter=heard, strict=True)
    assert heard.remarks == []


def counted(folder: Path, data: Path) -> dict[str, Tokens]:
    """What passes each part of the model, by what the processor makes of each sample alone."""
    patches, merged, tokens = Tokens(), Tokens(), Tokens()
    for inputs in tiny_vlm.encode(load_processor(folder), data):
        for kind in ("image", "video"):
            if (grid := inputs.get(f"{kind}_grid_thw")) is not None:
                sizes = inputs.get(f"{kind}_merge_sizes", torch.full((len(grid),), 2))
                patches += Tokens(**{kind: int(grid.prod(1).sum())})
                merged += Tokens(**{kind: int((grid.prod(1) // sizes**2).sum())})
        ids = inputs["input_ids"]
        image, video = (int((ids == token).sum()) for token in (5, 6))
        tokens += Tokens(ids.numel() - image - video, image, video)
    return {"vision": patches, "projector": merged, "llm": tokens}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "video_llama_3"])
def test_every_statistic_says_how_many_tokens_of_each_modality_it_has_seen(
    family: str, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """In batches of unequal lengths; towers, projector and language model each see their own."""
    folder = tiny(family)
    rules = [
        {"weights": "int8-channel", "activations": "int8-tensor", "weight_range": "minmax"},
        {"match": {"role": "patch_embed"}, "activations": "none"},
    ]
    smooth = {"name": "smoothquant", "options": {"search": False}}
    recipe = load_recipe(
        {
            "rules": rules,
            "transforms": [smooth],
            "kv_cache": "int8",
            "calibration": {"batch_size": 4},
        }
    )
    result = pq.quantize(folder, recipe, tmp_path, calibration_file)
    expected = counted(folder, calibration_file)
    modality = {row.site.name: str(row.site.modality) for row in result.plan.rows}
    for step in result.record.steps:
        for layer in step.layers:
            seen = {"hessian"} | ({"input_range"} if "patch_embed" not in layer.name else set())
            assert layer.tokens.keys() == seen
            assert set(layer.tokens.values()) == {expected[modality[layer.name]]}, layer.name
        for edge in step.edges:
            assert edge.tokens == expected[modality[edge.readers[0]]]
        if step.kv_cache:
            assert step.kv_cache.tokens == expected["llm"]
    lines = token_lines(RunFiles.read(result.folder))
    assert len(lines) == 3
    assert lines[2] == f"statistics of the language model have seen {expected['llm'].describe()}"
    assert RunDirectory(tmp_path).load() == result.record


def test_outputs_and_vision_tokens_that_count_nothing_are_told_apart(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    rule = {"match": {"role": "mlp.down", "modality": "llm"}, "weights": "int8-channel"}
    rule |= {"outputs": "int8-tensor", "vision_weight": 0, "weight_range": "minmax"}
    folder = tiny("qwen2_vl")
    result = pq.quantize(folder, {"rules": [rule]}, tmp_path, calibration_file)
    tokens = counted(folder, calibration_file)["llm"]
    layers = [layer for step in result.record.steps for layer in step.layers]
    assert len(layers) == 2
    for layer in layers:
        assert layer.tokens == {"output_range": tokens, "hessian": Tokens(tokens.text)}
    lines = token_lines(RunFiles.read(result.folder))
    assert [line.partition("(")[2].partition(")")[0] for line in lines] == [
        "output_range",
        "hessian",
    ]


# What stays in floating point


@pytest.fixture
def damaged(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with NaN in its head and infinities in the norms of its vision tower."""
    source, folder = tiny("qwen2_vl"), tmp_path / "damaged"
    reader = ShardReader(source)
    tensors = {name: reader.read(name) for name in reader.names}
    tensors["lm_head.weight"][3, 5:7] = float("nan")
    for name, tensor in tensors.items():
        if name.endswith("norm1.bias"):
            tensor[0] = float("-inf")
    tensors["model.embed_tokens.weight"][7, 1] = float("inf")
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    write_tensors(folder / "model.safetensors", tensors)
    return folder


DAMAGED = {
    "visual.blocks.0.norm1.bias": "0 NaN and 1 infinite of 128 values",
    "visual.blocks.1.norm1.bias": "0 NaN and 1 infinite of 128 values",
    "lm_head.weight": "2 NaN and 0 infinite of 16384 values",
    "model.embed_tokens.weight": "0 NaN and 1 infinite of 16384 values",
}


def test_nan_in_tensors_that_stay_as_they_are_is_named(damaged: Path, tmp_path: Path) -> None:
    """On the screen when it is met, in the record, and in the result: of many layers at once."""
    heard = Heard()
    rules = {"rules": [{"match": {"role": "mlp"}, "weights": "int8-channel", "solver": "rtn"}]}
    result = pq.quantize(damaged, rules, tmp_path / "out", reporter=heard)
    assert result.record.damaged == DAMAGED
    assert RunDirectory(tmp_path / "out").load() == result.record
    assert heard.late
    assert len(heard.remarks) == 3
    assert sum(name in line for name, line in zip(DAMAGED, heard.remarks, strict=False)) == 3
    assert len(result.notes) == 3
    assert "blocks.*.norm1.bias holds 0 NaN and 1 infinite of 128 values" in result.notes[0]
    with pytest.raises(NumericsError, match=r"norm1\.bias holds 0 NaN and 1 infinite"):
        pq.quantize(damaged, rules, tmp_path / "strict", strict=True)
    with pytest.raises(NumericsError, match=r"lm_head\.weight holds 2 NaN"):
        pq.quantize(damaged, rules, tmp_path / "out", strict=True, resume=True)
