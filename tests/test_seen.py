"""Which modalities statistics have seen: counted, told, and refused where that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm

import prismquant as pq
from prismquant.errors import PlanError
from prismquant.pipeline.job import Silent
from prismquant.recipe.schema import load_recipe
from prismquant.storage import read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Heard(Silent):
    """Keeps what it is told before the first stage of the work."""

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.begun = False

    def remark(self, line: str) -> None:
        """Keep it."""
        assert not self.begun
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
