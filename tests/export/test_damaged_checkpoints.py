"""Checkpoints that mean nothing are refused by load, eval and export, and named by check."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_drafts import MADE, drafted, written
from mutations import mutations
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prismquant.api import export
from prismquant.check import check
from prismquant.check import open_checkpoint as opening_for_rules
from prismquant.errors import FormatError, NumericsError, PrismQuantError
from prismquant.export.compressed_tensors import stored
from prismquant.export.compressed_tensors.stored import open_checkpoint
from prismquant.export.load_quantized import load_model
from prismquant.formats.bit_streams import pack_bits
from prismquant.formats.section import CONFIG_KEY
from prismquant.formats.section_grammar import read_section
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.models.load import empty_model
from prismquant.opening import read_json
from prismquant.shards import ShardReader
from prismquant.storage import write_json

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
PROJECTION = "model.layers.0.self_attn.q_proj"


def copied(name: str, folder: Path) -> Path:
    """A checkpoint of llm-compressor whose ``ignore`` every reader understands."""
    shutil.copytree(GOLDEN / name, folder)
    config = read_json(folder / "config.json")
    if any(entry.startswith("visual.") for entry in config[CONFIG_KEY]["ignore"]):
        config[CONFIG_KEY]["ignore"].append("re:.*visual.*")
        write_json(folder / "config.json", config)
    return folder


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Edit the tensors of a checkpoint of one shard."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def set_first(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    """Give the first element of a tensor another value."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[name].clone()
        flat = tensor.to(torch.float64).flatten()
        flat[0] = value
        tensors[name] = flat.reshape(tensor.shape).to(tensor.dtype)

    return edit


def outcome(action: Callable[[], Any]) -> PrismQuantError | None:
    """The error that an action ends with; any other but our own ends the test."""
    try:
        action()
    except PrismQuantError as error:
        return error
    return None


# ---------------------------------------------------------------------------------- configurations


@pytest.fixture
def _built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are built once: this takes longer than all that is looked at here."""
    bound: dict[str, BoundModel] = {}
    models: dict[str, nn.Module] = {}

    def key(config: dict[str, Any]) -> str:
        return json.dumps({k: v for k, v in config.items() if k != CONFIG_KEY}, sort_keys=True)

    def bind_once(folder: Path, **options: bool) -> BoundModel:
        said = key(read_json(folder / "config.json"))
        if said not in bound:
            bound[said] = bind(folder, **options)
        return bound[said]

    def build_once(config: Any, arch: Any) -> nn.Module:
        said = key(config.to_dict())
        if said not in models:
            models[said] = empty_model(config, arch)
        return models[said]

    monkeypatch.setattr(opening_for_rules, "bind", bind_once)
    monkeypatch.setattr(stored, "empty_model", build_once)


def mutated(name: str, folder: Path, most: int | None) -> Iterator[str]:
    """Write one changed configuration after the other; yields what was changed."""
    copied(name, folder)
    config = read_json(folder / "config.json")
    config["prismquant"] = {"activations": {}}
    assert check(folder).ok
    sections = mutations({key: config[key] for key in (CONFIG_KEY, "prismquant")}, name, most)
    for what, changed in sections:
        if isinstance(changed, dict):
            rest = {k: v for k, v in config.items() if k not in (CONFIG_KEY, "prismquant")}
            (folder / "config.json").write_text(json.dumps(rest | changed))
            yield what


@pytest.mark.usefixtures("_built_once")
@pytest.mark.parametrize("name", NAMES)
def test_what_opening_refuses_check_calls_an_error(name: str, tmp_path: Path) -> None:
    for what in mutated(name, tmp_path / name, 20):
        refused = outcome(lambda: open_checkpoint(tmp_path / name))
        assert not (refused and check(tmp_path / name).ok), (what, refused)


@pytest.mark.slow
@pytest.mark.usefixtures("_built_once")
@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_changed_load_and_export_work_or_refuse(name: str, tmp_path: Path) -> None:
    folder, out = tmp_path / name, tmp_path / "out"
    for what in mutated(name, folder, None):
        refused = outcome(lambda: load_model(folder))
        assert not (refused and check(folder).ok), (what, refused)
        if not outcome(lambda: export(folder, "dense", out)):
            shutil.rmtree(out)
        assert not out.exists()


@pytest.mark.parametrize("name", ["gptq", "awq", "modelopt-nvfp4"])
@pytest.mark.usefixtures("_built_once")
def test_check_survives_any_configuration_of_other_methods(
    tiny: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    draft = drafted(tiny("qwen2_vl", dtype=torch.bfloat16), tmp_path / name)
    MADE[name](draft)
    folder = written(draft)
    assert check(folder).ok
    for what, changed in mutations(draft.section, name, 30):
        text = json.dumps(draft.config | {CONFIG_KEY: changed})
        (folder / "config.json").write_text(text)
        assert check(folder, "vllm").findings is not None, what
    own = folder / "hf_quant_config.json"
    if own.exists():
        draft.config.pop(CONFIG_KEY)
        write_json(folder / "config.json", draft.config)
        for what, changed in mutations(read_json(own), name, 20):
            own.write_text(json.dumps(changed))
            assert check(folder, "vllm").findings is not None, what


def test_all_that_is_wrong_is_told_at_once_with_what_was_meant() -> None:
    weights = {"num_bits": "4", "grup_size": 128, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "fromat": "pack-quantized"}
    section = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ingore": ["lm_head"],
    }
    with pytest.raises(FormatError) as caught:
        read_section({CONFIG_KEY: section}).require()
    for word in ("num_bits '4'", "'grup_size'", "'fromat'", "all but 'ignore'"):
        assert word in caught.value.what
    remedies = {fault.remedy for fault in read_section({CONFIG_KEY: section}).faults}
    assert {"did you mean 'group_size'?", "did you mean 'format'?"} <= remedies


def test_a_method_that_cannot_be_read_may_be_left_over(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Of merged weights: they are in floating point, and only the section says otherwise."""
    section = {CONFIG_KEY: {"quant_method": "bitsandbytes"}}
    with pytest.raises(FormatError, match="'bitsandbytes' cannot be read") as caught:
        read_section(section).require()
    assert "delete quantization_config" in str(caught.value.remedy)
    folder = Path(shutil.copytree(tiny("qwen2_vl"), tmp_path / "merged"))
    write_json(folder / "config.json", read_json(folder / "config.json") | section)
    load_model(folder)
    report = check(folder)
    assert report.ok
    assert [finding.rule for finding in report.findings] == ["config.method"]


@pytest.mark.parametrize("where", ["ignore", "targets"])
def test_patterns_cannot_run_away(where: str, tmp_path: Path) -> None:
    folder = copied("w4a16", tmp_path / "x")
    config = read_json(folder / "config.json")
    section = config[CONFIG_KEY]
    owner = section if where == "ignore" else section["config_groups"]["group_0"]
    owner[where] = [*owner[where], *(f"re:([^/]|[^/][^/])+[!{sign}]" for sign in "?%&")]
    write_json(folder / "config.json", config)
    assert {finding.rule for finding in check(folder).errors} >= {"config.pattern"}
    assert "takes too long" in str(outcome(lambda: load_model(folder)))


# ----------------------------------------------------------------------------------------- tensors

SCALE, SHAPE = f"{PROJECTION}.weight_scale", f"{PROJECTION}.weight_shape"
NORM = "model.norm.weight"
Edit = Callable[[dict[str, Tensor]], Any]
SEEN: list[tuple[str, str, Edit]] = [
    *(
        (name, f"scale {value}", set_first(SCALE, value))
        for name in ("w4a16", "w8a8", "fp8", "fp8-block", "w4a16-asym")
        for value in (math.nan, math.inf, 0.0)
    ),
    *((name, "negative scale", set_first(SCALE, -1.0)) for name in ("fp8", "w4a16-asym")),
    ("nvfp4", "scale NaN", set_first(SCALE, math.nan)),
    ("mxfp4", "scale 255", set_first(SCALE, 255)),
    ("nvfp4", "global scale 0", set_first(f"{PROJECTION}.weight_global_scale", 0.0)),
    ("w8a8-static", "input scale 0", set_first(f"{PROJECTION}.input_scale", 0.0)),
    ("w8a8-static", "input scale inf", set_first(f"{PROJECTION}.input_scale", math.inf)),
    ("fp8", "input scale negative", set_first(f"{PROJECTION}.input_scale", -1.0)),
    ("fp8-kv", "cache scale", set_first("model.layers.0.self_attn.k_scale", -0.1)),
    ("w4a16", "wrong weight_shape", set_first(SHAPE, 63)),
    ("w4a16", "missing scale", lambda t: t.pop(SCALE)),
    ("w4a16", "extra weight", lambda t: t.update({f"{PROJECTION}.weight": torch.ones(64, 64)})),
    ("w4a16", "index", lambda t: t.update({f"{PROJECTION}.weight_g_idx": torch.zeros(64).int()})),
    ("w4a16", "NaN norm", set_first(NORM, math.nan)),
    ("w4a16", "infinite bias", set_first(f"{PROJECTION}.bias", math.inf)),
    ("w4a16", "integer norm", lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)})),
    ("w4a16", "missing norm", lambda t: t.pop(NORM)),
    ("w4a16", "wide norm", lambda t: t.update({NORM: torch.ones(65)})),
]
# Values of large tensors, which only whoever loads them sees.
UNSEEN: list[tuple[str, str, Edit]] = [
    ("w4a16", "NaN head", set_first("lm_head.weight", math.nan)),
    ("w4a16", "infinite embedding", set_first("model.embed_tokens.weight", math.inf)),
    ("w4a8", "a code of 9 in 4 bits", set_first(f"{PROJECTION}.weight", 9)),
    ("fp8", "a code that is NaN", set_first(f"{PROJECTION}.weight", math.nan)),
]


@pytest.mark.parametrize(
    ("name", "what", "edit", "seen"),
    [*((*case, True) for case in SEEN), *((*case, False) for case in UNSEEN)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_tensors_are_refused_by_all(
    name: str, what: str, edit: Edit, seen: bool, tmp_path: Path
) -> None:
    folder = change(copied(name, tmp_path / "x"), edit)
    with pytest.raises((FormatError, NumericsError)) as caught:
        load_model(folder)
    assert (
        PROJECTION in str(caught.value)
        or "model." in str(caught.value)
        or "lm_head" in str(caught.value)
    )
    for format_ in ("dense", "compressed-tensors"):
        assert outcome(lambda format_=format_: export(folder, format_, tmp_path / "out")), what
        assert not (tmp_path / "out").exists()
    assert check(folder).ok is not seen


@pytest.mark.parametrize("name", ["w4a16", "w8a8"])
def test_scales_of_symmetric_integers_may_be_negative(name: str, tmp_path: Path) -> None:
    def turn(tensors: dict[str, Tensor]) -> None:
        tensors[SCALE] = -tensors[SCALE]

    folder = change(copied(name, tmp_path / "x"), turn)
    module = "model.language_model.layers.0.self_attn.q_proj"
    before = load_model(GOLDEN / name).get_parameter(f"{module}.weight")
    assert torch.equal(load_model(folder).get_parameter(f"{module}.weight"), -before)
    assert check(folder).ok


def test_a_zero_point_must_be_one_of_the_format(tmp_path: Path) -> None:
    """Zeros beside a symmetric input are passed over, as some writers store them."""
    name = f"{PROJECTION}.input_zero_point"

    def add(value: int) -> Callable[[dict[str, Tensor]], None]:
        return lambda t: t.update({name: torch.tensor([value], dtype=torch.int8)})

    fine = change(copied("w8a8-static", tmp_path / "fine"), add(0))
    load_model(fine)
    assert check(fine).ok
    assert not check(fine, "vllm").ok
    wrong = change(copied("w8a8-static", tmp_path / "wrong"), add(3))
    with pytest.raises(FormatError, match=r"is \[3\], outside \[0, 0\]"):
        load_model(wrong)
    assert not check(wrong).ok


# -------------------------------------------------------------- groups of columns of their own


@pytest.fixture(scope="module")
def reordered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint with ``actorder: group``, and what its layers stand for, by module path."""
    folder = copied("w4a16", tmp_path_factory.mktemp("reordered") / "x")
    config = read_json(folder / "config.json")
    config[CONFIG_KEY]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    write_json(folder / "config.json", config)
    draw, wanted = torch.Generator().manual_seed(0), {}

    def fill(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".weight_packed")]:
            prefix = name.removesuffix(".weight_packed")
            rows, columns = tensors[f"{prefix}.weight_shape"].tolist()
            codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=draw)
            index = (torch.randperm(columns, generator=draw) // 32).to(torch.int32)
            tensors[name] = pack_bits(codes, 4)
            tensors[f"{prefix}.weight_g_idx"] = index
            scale = tensors[f"{prefix}.weight_scale"].float()
            module = prefix.replace("model.layers", "model.language_model.layers")
            wanted[module] = codes.float() * scale[:, index.long()]

    change(folder, fill)
    return folder, wanted


def test_an_index_of_groups_is_read(
    reordered: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Each column has the scale of its own group."""
    folder, wanted = reordered
    export(folder, "dense", tmp_path / "dense", options={"dtype": torch.float32})
    for model in (load_model(folder, dtype=torch.float32), load_model(tmp_path / "dense")):
        for module, weight in wanted.items():
            assert torch.equal(model.get_parameter(f"{module}.weight"), weight), module


def test_an_index_of_groups_is_told_to_readers_that_dropped_it(
    reordered: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, _ = reordered
    assert check(folder).ok
    assert check(folder, "prismquant").ok
    for reader in ("vllm", "transformers"):
        assert "config.actorder" in {f.rule for f in check(folder, reader).errors}


def test_an_index_of_groups_is_exported_or_refused(
    reordered: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, wanted = reordered
    export(folder, "gptq", tmp_path / "gptq")
    reader = ShardReader(tmp_path / "gptq")
    assert read_json(tmp_path / "gptq" / "config.json")[CONFIG_KEY]["desc_act"] is True
    for module, weight in wanted.items():
        index = reader.read(f"{module}.g_idx").long()
        words, scales = reader.read(f"{module}.qweight"), reader.read(f"{module}.scales")
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = (words[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, words.shape[1])
        assert torch.equal((codes.float() - 8) * scales.float()[index], weight.T), module
    for name in ("awq", "gguf"):
        with pytest.raises(FormatError, match="columns that are no neighbours"):
            export(folder, name, tmp_path / name)
    assert not (tmp_path / "awq").exists()


def test_an_index_must_be_declared_and_even(
    reordered: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    uneven = Path(shutil.copytree(reordered[0], tmp_path / "uneven"))
    change(uneven, lambda t: t[f"{PROJECTION}.weight_g_idx"].zero_())
    with pytest.raises(FormatError, match="each of 2 groups 32 columns"):
        load_model(uneven)
    assert "tensors.told-shape" in {f.rule for f in check(uneven).errors}
    lacking = Path(shutil.copytree(reordered[0], tmp_path / "lacking"))
    change(lacking, lambda t: t.pop(f"{PROJECTION}.weight_g_idx"))
    with pytest.raises(FormatError, match="have no weight_g_idx"):
        load_model(lacking)
    assert not check(lacking).ok


# ----------------------------------------------------------------------------------------- folders


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda f: make_pipe(f / "config.json"),
        lambda f: make_pipe(f / "model.safetensors"),
        lambda f: make_pipe(f / "prismquant" / "record.json"),
        lambda f: make_pipe(f / "hf_quant_config.json"),
        lambda f: make_pipe(f / "model.safetensors.index.json"),
        lambda f: (f / "hf_quant_config.json").write_text("[]"),
        lambda f: (f / "config.json").write_text("[" * 100_000),
        lambda f: (f / "config.json").write_text('{"model_type": ["qwen2_vl"]}'),
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": [1]}}'),
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "../../secret.safetensors"}}'
        ),
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
    ],
)
def test_check_survives_any_folder(edit: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = copied("w4a16", tmp_path / "x")
    edit(folder)
    refused = outcome(lambda: check(folder))
    assert refused or check(folder).findings
    if outcome(lambda: load_model(folder)):
        assert refused or not check(folder).ok
