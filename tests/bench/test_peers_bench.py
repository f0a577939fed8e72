"""The bench of other tools: rows that are kept, and the best of each side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench.methods import Cells
from bench.peers.__main__ import formats, named_recipe, planned
from bench.peers.rows import Row, averaged, best_rows, cells
from bench.peers.worker import conversations, language_matrices, with_experts_together
from prismquant.demo.main_job import CHECKPOINT
from prismquant.models.bind import bind
from prismquant.recipe.schema import load_recipe

FIGURES = {"kl_error": None, "kl_image": 0.1, "top1": 0.9, "exact_match": 0.8}


def row(tool: str, method: str, kl: float, setting: str = "w4a16") -> Row:
    figures = {"kl": kl, **FIGURES, "seconds": 2.0, "cpu_seconds": 1.0}
    return Row("plain", setting, tool, method, figures, versions={"torch": "2"})


def test_the_automatic_recipe_is_set_beside_the_best_of_other_tools() -> None:
    rows = [
        row("prismquant", "auto-w4a16", 0.02),
        row("prismquant", "w4a16", 0.01),
        row("one", "gptq", 0.08),
        row("two", "awq", 0.05),
        Row("plain", "w4a16", "three", "gptq", why="not run"),
        row("one", "gptq", 0.08, setting="w8a8"),
    ]
    assert best_rows(rows) == [
        ["model", "setting", "rounding", "preset", "automatic", "one", "two", "three", "ratio"],
        ["plain", "w4a16", "", "0.01000", "0.02000", "0.08000 gptq", "0.05000 awq", "", "0.40"],
    ]


def test_a_recipe_that_leaves_a_choice_has_the_formats_of_its_setting() -> None:
    bound = bind(CHECKPOINT)
    auto, fixed = (planned(load_recipe(name), bound) for name in ("auto-w4a16", "w4a16"))
    assert formats(auto) == formats(fixed)


def test_rows_are_kept_whole(tmp_path: Path) -> None:
    file, facts = tmp_path / "rows.jsonl", {"samples": 3}
    done = row("one", "gptq", 0.25)
    Cells(file, facts).add(("plain", "w4a16", "one", "gptq"), asdict(done))
    assert Row(**Cells(file, facts).done["plain", "w4a16", "one", "gptq"]) == done
    assert not Cells(file, {"samples": 4}).done
    Cells(None, facts).add(("a",), asdict(done))  # in memory alone


def test_several_calibration_sets_give_their_mean_and_their_spread() -> None:
    mean = averaged([row("one", "gptq", 0.25), row("one", "gptq", 0.75)])
    assert cells(mean)[4] == "0.50000 ± 0.35355"


def test_a_setting_of_two_bits_leaves_the_layers_alone_that_other_tools_leave() -> None:
    two, three = (planned(named_recipe(name), bind(CHECKPOINT)) for name in ("w2a16", "w3a16"))
    assert [row.site for row in two.quantized] == [row.site for row in three.quantized]
    assert {(row.config.weights.bits, row.config.weights.group_size) for row in two.quantized} == {
        (2, 64)
    }


def test_groups_are_of_the_size_asked_for_whatever_is_chosen() -> None:
    auto, fixed = (
        planned(named_recipe(name, 32), bind(CHECKPOINT)) for name in ("auto-w4a16", "w4a16")
    )
    assert formats(auto) == formats(fixed)
    assert formats(fixed)[0].group_size == 32
    assert named_recipe("w8a8", 32) == load_recipe("w8a8")  # one scale a row


@pytest.mark.parametrize("kind", ["text", "image"])
def test_samples_have_a_picture_each_or_none(kind: str, tmp_path: Path) -> None:
    picture = {"type": "image", "image": "a.png"}
    lines = {
        "text": [{"role": "user", "content": "one"}],
        "image": [{"role": "user", "content": [picture, {"type": "text", "text": "two"}]}],
    }
    files = {name: tmp_path / name for name in ("same", "mixed")}
    files["same"].write_text(2 * (json.dumps({"messages": lines[kind]}) + "\n"))
    files["mixed"].write_text("".join(json.dumps({"messages": m}) + "\n" for m in lines.values()))
    found = conversations(files["same"], 5)
    assert len(found) == 2
    if kind == "image":
        assert found[0][0]["content"][0]["image"] == str(tmp_path / "a.png")
    with pytest.raises(ValueError, match="some samples have a picture and some have none"):
        conversations(files["mixed"], 5)


class Fused(torch.nn.Module):
    """Two experts, 4 wide and 3 inside, as transformers holds them."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.gate_up_proj = torch.nn.Parameter(torch.randn(2, 6, 4, generator=draw))
        self.down_proj = torch.nn.Parameter(torch.randn(2, 4, 3, generator=draw))


def test_experts_that_a_tool_took_apart_are_put_together() -> None:
    model = torch.nn.ModuleDict({"experts": Fused(), "other": torch.nn.Linear(4, 4)})
    whole = dict(model.named_parameters())
    apart = {name: value for name, value in whole.items() if name.startswith("other")}
    for number in range(2):
        gate, up = whole["experts.gate_up_proj"][number].chunk(2)
        apart[f"experts.{number}.gate_proj.weight"] = gate
        apart[f"experts.{number}.up_proj.weight"] = up
        apart[f"experts.{number}.down_proj.weight"] = whole["experts.down_proj"][number]
    together = with_experts_together(apart, model)
    assert together.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in together.items())
    assert with_experts_together(whole, model) == whole
    assert [tuple(one.shape) for one in language_matrices(model)] == [(6, 4)] * 2 + [(4, 3)] * 2
