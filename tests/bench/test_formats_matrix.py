"""The command that fills docs/format-matrix.md: what it covers, and that it sees a fault."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import tiny_vlm
import torch

from bench import formats_matrix
from bench.matrix import readers, table
from bench.matrix.cases import PARTNERS, cases, input_formats
from bench.matrix.cells import Cell, compared, foretold, refused, shortened
from prismquant.errors import FormatError
from prismquant.formats.kv_formats import KV_PRESETS
from prismquant.formats.spec import PRESETS
from prismquant.shards import ShardReader
from prismquant.storage import write_tensors

if TYPE_CHECKING:
    from pathlib import Path


def test_every_format_has_a_case() -> None:
    """All weights alone, all inputs beside some weight, all caches; names are unique."""
    made = cases()
    names = [case.name for case in made]
    assert {name for name, number in PRESETS.items() if not number.dynamic} <= set(names)
    assert set(input_formats()) <= set(PARTNERS)
    assert {name.partition("cache ")[2] for name in names} - {""} == set(KV_PRESETS)
    for several in (names, [case.folder for case in made]):
        assert len(set(several)) == len(several)
    for case in made:
        assert all(rule.solver in (None, "rtn") for rule in case.recipe().rules)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, width in formats_matrix.WIDTHS.items():
        monkeypatch.setattr(tiny_vlm, name, width)


@pytest.mark.usefixtures("wide")
def test_the_command_fills_cells_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Readers that run here; one format that is packed, one with inputs that only we know."""
    given = ["--families", "qwen2_vl", "--cases", "int4-g32", "fp8-e5m2-channel + *"]
    out = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["x", *given, "--work", str(tmp_path), "--out", str(out)])
    assert formats_matrix.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    cells = found["cells"]["qwen2_vl"]
    plain, private = cells["int4-g32"], cells["fp8-e5m2-channel + fp8-e5m2-token"]
    for column in ("bytes", "load", "transformers", "dense", "gguf"):
        assert plain[column]["verdict"] == "ran", (column, plain[column])
    assert {plain[c]["apart"] for c in ("bytes", "load", "dense", "gguf")} == {0}
    assert plain["modelopt"]["verdict"] == "refused"
    assert private["load"] == plain["load"]
    assert private["transformers"]["verdict"] == "foretold"
    assert not found["differing"]
    text = out.read_text()
    assert "| `int4-g32` | = | = |" in text
    assert "no algorithm of ModelOpt" in text


@pytest.mark.usefixtures("wide")
def test_one_wrong_code_is_seen(tmp_path: Path) -> None:
    import prismquant as pq

    data = tiny_vlm.samples(tmp_path / "data", count=1)
    folder = tiny_vlm.build("qwen2_vl", tmp_path / "source", dtype=torch.bfloat16, llm_blocks=1)
    source = readers.Source("qwen2_vl", folder, data)
    case = next(case for case in cases() if case.name == "int8-channel + int8-token")
    out = tmp_path / "out"
    plan = pq.quantize(folder, case.recipe(), out).plan
    assert readers.own(source, plan, out)[0] == Cell(
        "ran", "weights and logits, the simulation's", 0.0
    )
    assert readers.sizes(plan, out).verdict == "ran"
    shards = ShardReader(out)
    name = f"{plan.quantized[0].site.disk_name}.weight"
    file = shards.info(name).file
    tensors = {n: shards.read(n) for n in shards.names if shards.info(n).file == file}
    tensors[name][0, 0] = -tensors[name][0, 0] if tensors[name][0, 0] else 1
    write_tensors(out / file, tensors)
    assert readers.own(source, plan, out)[0].verdict == "differs"
    scale = name.replace("weight", "weight_scale")
    tensors[scale] = tensors[scale].float()
    write_tensors(out / file, tensors)
    assert readers.sizes(plan, out).verdict == "differs"


def rows(cases: dict[str, tuple[Cell, ...]]) -> dict[str, dict[str, dict[str, Cell]]]:
    """A matrix of one column: by case the cells of all families."""
    count = len(next(iter(cases.values())))
    return {
        f"family{i}": {name: {"vllm": cells[i]} for name, cells in cases.items()}
        for i in range(count)
    }


def test_families_that_agree_share_a_word() -> None:
    same, close = Cell("ran", "weights", 0.0), Cell("ran", "weights", 2e-7)
    no = Cell("stopped", "no")
    given = {"a": (same, same, same), "b": (same, close, same), "c": (same, same, no)}
    text = table.rendered(rows(given), {"weights": list(given)})
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert lines == ["| `a` | = |", "| `b` | 2e-07 |", "| `c` | =; ✗<sup>1</sup> family2 |"]
    assert text.endswith("1. no\n")
    assert table.totals(rows(given))["vllm"] == {"ran": 8, "stopped": 1}


def test_a_family_that_a_reader_does_not_know_is_told_once() -> None:
    same, no = Cell("ran", "weights", 0.0), Cell("stopped", "no such class")
    given = {"a": (same, no), "b": (Cell("stopped", "no kernel"), no)}
    text = table.rendered(rows(given), {"weights": list(given)})
    assert text.startswith("- No family1 in *vLLM*: ✗<sup>1</sup>.\n")
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        "| `a` | = |",
        "| `b` | ✗<sup>2</sup> |",
    ]


def test_messages_are_short_and_name_no_path() -> None:
    error = FormatError(
        "3 of 3 layers cannot be exported as awq:\n"
        "  - holds integers of 4 bits, not 8: model.language_model.layers.{0-1}.mlp.up_proj, "
        "model.language_model.layers.0.self_attn.q_proj\n"
        "  - in groups: model.x",
        where="/somewhere/of/mine",
    )
    assert refused(error).what == "holds integers of 4 bits, not 8; in groups"
    assert shortened("ValueError: no file /tmp/a/b/c.json here") == "ValueError: no file .. here"
    assert (
        shortened("1 validation error for X\nsection\n  Value error, y") == "section Value error, y"
    )
    assert len(shortened("a" * 500)) == 180


def test_a_remark_of_the_plan_excuses_readers_but_not_refusals() -> None:
    remarks = ("no format declares x: only prismquant.load does it",)
    assert foretold(compared("logits", 1.0), remarks).verdict == "foretold"
    assert foretold(Cell("ran", "logits, all but ties", 0.01), remarks).verdict == "foretold"
    assert foretold(Cell("ran", "logits", 0.0), remarks).verdict == "ran"
    assert foretold(Cell("refused", "y"), remarks).verdict == "refused"
    assert foretold(compared("logits", 1.0), ()).verdict == "differs"
    assert compared("logits", float("nan"), 1.0).verdict == "differs"


@pytest.mark.parametrize("form", ["fp8-tensor", "fp8-channel", "fp8-b128", "nvfp4", "mxfp8"])
def test_the_formula_is_ours(form: str) -> None:
    """A second look at what the matrix compares with: random codes of every layout."""
    from prismquant.export.modelopt_layout import tensors
    from prismquant.formats.quantized_layer import QuantizedTensor
    from prismquant.formats.spec import spec

    number, generator = spec(form), torch.Generator().manual_seed(0)
    rows, columns = 160, 256
    codes = torch.randint(0, 16 if form == "nvfp4" else 0x7F, (rows, columns), generator=generator)
    shape = number.scale_shape(rows, columns)
    if number.scale == "e8m0":
        scale = torch.randint(100, 140, shape, generator=generator).to(torch.uint8)
        scale, divisor = scale.view(torch.float8_e8m0fnu), None
    else:
        divisor = torch.tensor([64.0]) if form == "nvfp4" else None
        scale = torch.rand(shape, generator=generator) + 0.5
        if divisor is not None:
            scale = scale.to(torch.float8_e4m3fn).float() / divisor
    q = QuantizedTensor(codes.to(torch.int8), scale, None, number, divisor)
    assert torch.equal(readers.by_formula(tensors(q, None)), q.dequantize(torch.float32))
