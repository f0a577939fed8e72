"""Rules about checkpoints: clean ones pass, and every rule catches what it is there for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from check_cases import CASES, TAKEN_BY_THE_LIBRARY, Case
from checkpoint_drafts import MADE, cache, drafted, written
from click.testing import Result
from typer.testing import CliRunner

import prismquant as pq
from prismquant.check import RULES, Report, Severity, TargetReader, check, open_checkpoint
from prismquant.check.findings import Problem, Rule, findings_of, folded
from prismquant.check.vllm_view import scheme_class
from prismquant.cli import app
from prismquant.errors import ArgumentError, ModelError
from prismquant.formats.quantization_args import Args, args_faults
from prismquant.formats.section import SchemeGroup, Targets
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.opening import read_json
from prismquant.recipe.schema import load_recipe
from prismquant.report.checks import finding_lines, findings_table, verdict
from prismquant.shards import INDEX_NAME, ShardReader
from prismquant.storage import write_json

# ----------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def made(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A checkpoint of a family by preset, or by one of the formats above; ``float`` as it is."""
    cache_: dict[tuple[str, str], Path] = {}

    def get(name: str, family: str = "qwen2_vl") -> Path:
        if (name, family) not in cache_:
            cache_[name, family] = build(name, family)
        return cache_[name, family]

    def build(name: str, family: str) -> Path:
        source = tiny(family, dtype=torch.bfloat16)
        folder = tmp_path_factory.mktemp("made") / name
        if name == "float":
            return source
        if name in MADE:
            draft = drafted(source, folder)
            MADE[name](draft)
            return written(draft)
        recipe = load_recipe(name).with_rules({"solver": "rtn"})
        pq.quantize(source, recipe, folder, calibration_file)
        return folder

    return get


@pytest.fixture(scope="module")
def models() -> dict[str, BoundModel]:
    """Models that were bound, by configuration."""
    return {}


@pytest.fixture(autouse=True)
def bound_once(models: dict[str, BoundModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a model to bind it takes longer than all rules together."""

    def remembered(folder: Path, **options: bool) -> BoundModel:
        config = read_json(folder / "config.json")
        config.pop("quantization_config", None)
        key = json.dumps(config, sort_keys=True)
        if key not in models:
            models[key] = bind(folder, **options)
        return models[key]

    monkeypatch.setattr(open_checkpoint, "bind", remembered)


def rules_of(report: Report) -> set[str]:
    return {finding.rule for finding in report.findings}


# --------------------------------------------------------------------------------------- clean ones


@pytest.mark.parametrize(
    "family",
    [
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen2_vl", "qwen2_5_vl")),
        "qwen3_vl",
    ],
)
@pytest.mark.parametrize("preset", ["w4a16", "w8a8-all", "w8a8-static", "fp8"])
@pytest.mark.parametrize("target", [None, *TargetReader])
def test_what_we_write_for_servers_has_no_error_and_no_warning(
    made: Callable[[str, str], Path], preset: str, family: str, target: TargetReader | None
) -> None:
    report = check(made(preset, family), target)
    loud = [f for f in report.findings if f.severity is not Severity.NOTE]
    assert report.ok
    assert not loud
    assert report.layers >= 14


def test_a_family_that_vllm_does_not_have_is_refused_for_vllm_only(
    made: Callable[[str, str], Path],
) -> None:
    folder = made("w4a16", "video_llama_3")
    assert check(folder).ok
    assert check(folder, "transformers").ok
    assert {f.rule for f in check(folder, "vllm").errors} == {"model.vllm"}


@pytest.mark.parametrize("name", MADE)
def test_layouts_made_by_their_definition_have_no_error(
    made: Callable[..., Path], name: str
) -> None:
    """What they are warned of lies in the format or in the model's shapes, not in how it is stored.

    The scales of ``w5a16`` are wider than the model's dtype; two key-value heads of 32 do not fill
    a block of 128.
    """
    report = check(made(name))
    assert report.ok, report.errors
    warned = {f.rule for f in report.findings if f.severity is Severity.WARNING}
    expected = {
        "mxfp6": {"vllm.scheme"},
        "fp8-block": {"shapes.block"},
        "w5a16": {"tensors.scale-rounded", "vllm.odd-bits"},
    }
    fallback = {"modelopt.transformers"} if name.startswith("modelopt") else set()
    assert warned == expected.get(name, fallback)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_quantized_head_is_found_by_vllm_under_its_own_name(
    tiny: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Its classes of Qwen3-VL call it ``lm_head``; of the others it lies in the language model."""
    rule = {"match": {"modality": "llm"}, "weights": "int8-channel", "solver": "rtn"}
    pq.quantize(tiny(family, dtype=torch.bfloat16), {"rules": [rule]}, tmp_path / "out")
    assert check(tmp_path / "out", "transformers").ok
    assert ("names.vllm" in rules_of(check(tmp_path / "out", "vllm"))) == (family == "qwen2_vl")


def test_a_float_checkpoint_is_told_to_be_one(made: Callable[..., Path]) -> None:
    report = check(made("float"))
    assert report.ok
    assert rules_of(report) == {"config.none"}
    assert report.layers == 0


def test_a_calibrated_cache_is_fine_by_tensor_and_by_head(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    for strategy in ("tensor", "attn_head"):
        draft = drafted(made("w4a16"), tmp_path / strategy)
        cache(draft, strategy)
        rules = {f.rule for f in check(written(draft)).findings if f.rule.startswith("kv")}
        assert rules == {"kv.passed-over"}


def test_a_model_that_is_not_known_still_has_its_grammar_checked(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    draft = drafted(made("w4a16"), tmp_path / "x")
    draft.config["model_type"] = "something_vl"
    draft.group["weights"]["extra"] = 1
    report = check(written(draft))
    assert rules_of(report) == {"model.unknown", "config.unknown-key"}


FILE_RULES = {
    *("files.shards", "files.index", "files.unindexed", "files.doubled", "files.total-size"),
    *("files.leftovers", "files.companions", "gguf.unread"),
}


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{number}-{case.rule}" for number, case in enumerate(CASES)]
)
def test_every_rule_tells_what_it_is_there_for(
    made: Callable[[str, str], Path], tmp_path: Path, case: Case
) -> None:
    draft = drafted(made(case.base, case.family), tmp_path / "x")
    case.edit(draft)
    report = check(written(draft), case.target)
    rule = next(rule for rule in RULES if rule.name == case.rule)
    told = [finding for finding in report.findings if finding.rule == case.rule]
    assert told, sorted(rules_of(report))
    assert all(
        finding.severity is rule.severity for finding in told if case.target or not rule.readers
    )
    assert all(finding.what and finding.where and finding.remedy for finding in told)
    assert report.ok == (not report.errors)


# Rules of what the library itself refuses when it parses a configuration.
PARSED = {
    *("config.unknown-key", "config.group-key", "config.arguments", "config.actorder"),
    *("kv.arguments", "config.type"),
}


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.rule in PARSED or case.rule == "config.top-key"],
    ids=lambda case: case.rule,
)
def test_the_compressed_tensors_library_parses_what_the_rules_allow(
    made: Callable[[str, str], Path], tmp_path: Path, case: Case
) -> None:
    import compressed_tensors_library  # noqa: F401
    from compressed_tensors.quantization import QuantizationConfig

    draft = drafted(made(case.base, case.family), tmp_path / "x")
    QuantizationConfig.model_validate(draft.config.get("quantization_config"))
    case.edit(draft)
    if case.rule == "config.top-key" or case.edit in TAKEN_BY_THE_LIBRARY:
        QuantizationConfig.model_validate(draft.section)
        return
    with pytest.raises(ValueError, match="validation error"):
        QuantizationConfig.model_validate(draft.section)


def test_every_rule_has_a_case() -> None:
    assert {rule.name for rule in RULES} == {case.rule for case in CASES} | FILE_RULES


def test_what_is_wrong_with_files_is_told(made: Callable[..., Path], tmp_path: Path) -> None:
    def told(change: Callable[[Path], Any]) -> set[str]:
        folder = tmp_path / "x"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made("w4a16"), folder)
        change(folder)
        return rules_of(check(folder))

    def cut(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:-10])

    def claim(folder: Path, **fields: Any) -> None:
        index = read_json(folder / INDEX_NAME)
        write_json(folder / INDEX_NAME, index | fields)

    def entry(folder: Path, name: str | None) -> None:
        index = read_json(folder / INDEX_NAME)
        first = min(index["weight_map"])
        if name is None:
            del index["weight_map"][first]
        else:
            index["weight_map"][name] = index["weight_map"][first]
        write_json(folder / INDEX_NAME, index)

    def double(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        shutil.copy(path, folder / "model-again.safetensors")

    def unfinished(folder: Path) -> None:
        record = read_json(folder / "prismquant" / "record.json")
        write_json(folder / "prismquant" / "record.json", record | {"finished": False})

    assert "files.shards" in told(cut)
    assert "files.shards" in told(lambda f: sorted(f.glob("*.safetensors"))[0].unlink())
    assert "files.shards" in told(lambda f: (f / INDEX_NAME).write_text("{"))
    assert "files.shards" in told(lambda f: claim(f, weight_map=[]))
    assert "files.shards" in told(lambda f: [p.unlink() for p in f.glob("model*")])
    assert "files.index" in told(lambda f: entry(f, "model.ghost"))
    assert "files.unindexed" in told(lambda f: entry(f, None))
    assert "files.doubled" in told(double)
    assert "files.total-size" in told(lambda f: claim(f, metadata={"total_size": 1}))
    assert "files.leftovers" in told(lambda f: (f / f".a.{'0' * 16}.prismquant-tmp").touch())
    assert "files.leftovers" in told(unfinished)
    assert "files.companions" in told(lambda f: [p.unlink() for p in f.glob("tokenizer*")])
    assert "files.companions" in told(lambda f: [p.unlink() for p in f.glob("*processor*")])


# ------------------------------------------------------------------------------------- other parts


def test_a_folder_without_a_config_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        check(tmp_path / "none")
    with pytest.raises(ModelError, match=r"config\.json is missing") as caught:
        check(tmp_path)
    assert "--resume" in str(caught.value.remedy)


def test_gguf_files_have_no_rules_and_no_config(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    report = check(tmp_path)
    assert report.ok
    assert report.method == "gguf"
    assert rules_of(report) == {"gguf.unread"}


def test_lines_name_the_rule_and_leave_notes_out(made: Callable[..., Path], tmp_path: Path) -> None:
    draft = drafted(made("w4a16"), tmp_path / "x")
    del draft.tensors["model.norm.weight"]
    report = check(written(draft))
    (line,) = finding_lines(report)
    assert line.startswith("error: the model's tensors are missing: model.norm.weight; ")
    assert line.endswith("[tensors.plain]")
    assert report.count(Severity.NOTE)


def test_no_weight_is_read(made: Callable[..., Path], tmp_path: Path) -> None:
    """Shards that are headers and holes are as good as whole ones."""
    folder = tmp_path / "x"
    shutil.copytree(made("w8a8-static"), folder)
    before = check(folder).to_dict()["findings"]
    small = {
        name
        for name, info in headers(folder).items()
        if len(info.shape) < 2 or name.endswith("_scale")
    }
    for path in folder.glob("*.safetensors"):
        hollow(path, small)
    assert check(folder).to_dict()["findings"] == before


def headers(folder: Path) -> dict[str, Any]:
    reader = ShardReader(folder)
    return {name: reader.info(name) for name in reader.names}


def hollow(path: Path, keep: set[str]) -> None:
    """Overwrite the data of large tensors with ones."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name not in keep and name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            data[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(bytes(data))


def test_what_only_some_reader_refuses_is_a_warning_for_nobody_in_particular() -> None:
    rule = Rule("a.b", Severity.ERROR, "says", lambda c: [Problem("x")], (TargetReader.VLLM,))
    assert findings_of(rule, [Problem("x")], None)[0].severity is Severity.WARNING
    assert findings_of(rule, [Problem("x")], TargetReader.VLLM)[0].severity is Severity.ERROR
    assert rule.concerns(None)
    assert not rule.concerns(TargetReader.TRANSFORMERS)


def test_places_are_folded() -> None:
    assert folded(("a",)) == "a"
    assert folded(("a", "b", "c")) == "a and 2 more"


def test_rules_have_names_and_say_something() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]+[.][a-z0-9-]+", name) for name in names)
    assert all(rule.says for rule in RULES)


def test_the_documentation_lists_every_rule_with_its_severity() -> None:
    text = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip("` "): cells[1].strip()
        for line in text.splitlines()
        if line.startswith("| `") and (cells := line.strip("|").split("|"))
    }
    assert rows == {rule.name: str(rule.severity) for rule in RULES}


def test_the_table_has_a_row_a_finding_and_survives_brackets(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    draft = drafted(made("w4a16"), tmp_path / "x")
    draft.section["ignore"].append("re:.*[/red]x[bold]")
    report = check(written(draft))
    table = findings_table(report)
    assert table is not None
    assert table.row_count == len(report.findings)
    assert "[/red]" in report.findings[0].where[0]
    assert f"{report.count(Severity.WARNING)} warning" in verdict(report)


def test_the_report_is_json(made: Callable[..., Path]) -> None:
    content = json.loads(json.dumps(check(made("w8a8-all"), "vllm").to_dict()))
    assert content["ok"] is True
    assert content["for"] == "vllm"
    assert content["quantized_layers"] == 24
    assert {finding["rule"] for finding in content["findings"]} == {
        "shapes.tensor-parallel",
        "vllm.int8-blackwell",
    }


def test_the_command_exits_with_one_where_there_is_an_error(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    fine = run(["check", str(made("w8a8-all")), "--for", "vllm"])
    assert fine.exit_code == 0
    assert "2 notes" in fine.stdout
    unknown = run(["check", str(made("w8a8-all")), "--for", "nobody"]).exception
    assert isinstance(unknown, ArgumentError)
    draft = drafted(made("w4a16"), tmp_path / "x")
    del draft.tensors["model.norm.weight"]
    broken = written(draft)
    shown = run(["check", str(broken)])
    assert shown.exit_code == 1
    assert "model.norm.weight" in shown.stdout
    told = run(["check", str(broken), "--json"])
    assert told.exit_code == 1
    assert json.loads(told.stdout)["ok"] is False


def run(arguments: list[str]) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("weights", "inputs", "layout", "expected"),
    [
        (("int", 4, "group", 128), None, "pack-quantized", "WNA16"),
        (("int", 4, "channel", None), ("int", 8, "token"), "pack-quantized", "WNA8Int"),
        (("int", 4, "channel", None), ("int", 4, "token"), "pack-quantized", "WNA4Int"),
        (("int", 4, "channel", None), ("int", 8, "token"), "int-quantized", "W4A8Int"),
        (("int", 4, "channel", None), ("int", 8, "tensor"), "pack-quantized", None),
        (("int", 8, "channel", None), ("int", 8, "token"), "int-quantized", "W8A8Int8"),
        (("int", 8, "tensor", None), ("int", 8, "tensor"), "int-quantized", "W8A8Int8"),
        (("int", 8, "group", 128), ("int", 8, "token"), "int-quantized", None),
        (("int", 6, "channel", None), ("int", 8, "token"), "int-quantized", None),
        (("float", 8, "channel", None), ("float", 8, "token"), "float-quantized", "W8A8Fp8"),
        (("float", 8, "group", 128), ("float", 8, "token"), "float-quantized", None),
        (("float", 8, "channel", None), None, "naive-quantized", "W8A16Fp8"),
        (("float", 4, "tensor_group", 16), None, "nvfp4-pack-quantized", "W4A4Fp4"),
        (("float", 4, "group", 32), None, "mxfp4-pack-quantized", "W4A4Mxfp4"),
        (("float", 4, "group", 32), ("float", 8, "token"), "mxfp4-pack-quantized", "W4A8Mxfp4"),
        (("float", 6, "group", 32), None, "mxfp6-pack-quantized", None),
        (("int", 4, "group", 128), ("float", 8, "token"), "pack-quantized", "W4A8Fp8"),
    ],
)
def test_schemes_of_vllm(
    weights: tuple[str, int, str, int | None],
    inputs: tuple[str, int, str] | None,
    layout: str,
    expected: str | None,
) -> None:
    """What vLLM's own code chose when it was run on checkpoints with these configurations."""
    kind, bits, strategy, size = weights
    given = Args(bits, kind, True, strategy, size)
    read = (
        Args(inputs[1], inputs[0], True, inputs[2], dynamic=inputs[2] == "token")
        if inputs
        else None
    )
    group = SchemeGroup("g", Targets(("Linear",)), layout, True, given, read, None, True)
    assert scheme_class(group) == (f"CompressedTensors{expected}" if expected else None)


def test_arguments_that_infer_their_strategy_are_no_fault() -> None:
    assert not args_faults({"num_bits": 4, "group_size": 128}, "weights")
    assert not args_faults({"num_bits": 4, "group_size": -1}, "weights")
    assert not args_faults({}, "weights")
    assert not args_faults(None, "weights")
    assert args_faults("int4", "weights") == ["is a text, not an object"]
