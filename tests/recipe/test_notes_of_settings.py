"""Notes on the settings of other tools say what the recipe says that was made of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given as drawn
from hypothesis import settings, strategies

from prismquant.errors import PrismQuantError
from prismquant.formats.spec import spec
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.importers.modelopt_presets import PRESETS
from prismquant.recipe.importers.scheme_presets import SCHEMES
from prismquant.recipe.layer_config import LayerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prismquant.recipe.importers.imported import Imported

_PAIR = re.compile(r"([\w.\[\]]+): (.*)")
_NEXT = re.compile(r", (?=[\w.\[\]]+(?:: |,|$))")


def said(ours: str) -> Iterator[tuple[str, str]]:
    """Keys and values of a note; words on keys alone are none."""
    rest, _, name = ours.partition(", name: ")
    if name:
        yield "name", name
    parts = [rest] if "{" in rest or "[" in rest else _NEXT.split(rest)
    for part in parts:
        found = _PAIR.fullmatch(part)
        while found:
            key, value = found.groups()
            found = _PAIR.fullmatch(value)
            if not found:
                yield key.rpartition(".")[2], value


def values(body: Any, key: str) -> Iterator[Any]:
    """All values of a key, wherever it stands."""
    if isinstance(body, dict):
        if key in body:
            yield body[key]
        for inner in body.values():
            yield from values(inner, key)
    if isinstance(body, list):
        for inner in body:
            yield from values(inner, key)


def agrees(value: Any, told: str) -> bool:
    """Whether a value of the recipe is what a note says."""
    if told.startswith("["):
        return bool(value == yaml.safe_load(told))
    if isinstance(value, list):
        return any(agrees(one, told) for one in value)
    if isinstance(value, str):
        # Names that one modifier alone ignores are left out of each of its expressions.
        return value == told or (told.startswith("re:") and told.removeprefix("re:") in value)
    if value is None and told == "none":
        return True
    if not isinstance(value, dict):
        meant = yaml.safe_load(told)
        return meant == value or (
            isinstance(value, float)
            and isinstance(meant, int | float)
            and meant == pytest.approx(value, rel=1e-12)
        )
    if told.startswith("{"):
        return {**value, **yaml.safe_load(told)} == value
    if told in (value.get("kind"), value.get("name")):
        return True
    if "granularity" not in value:
        return False
    group = f"g{value['group_size']}"
    if told in (group, value["granularity"]):
        return True
    try:
        return spec(told).to_dict() == value
    except PrismQuantError:
        return False


def contradictions(imported: Imported) -> list[str]:
    """Notes that say another value than the recipe has, or than it has by default."""
    body = imported.recipe.to_dict()
    found = []
    for note in (*imported.honoured, *imported.changed):
        for key, told in said(note.ours):
            # Without rules, every layer is left alone.
            if key == "skip" and not body.get("rules"):
                continue
            written = list(values(body, key)) or [getattr(LayerConfig(), key, None)]
            if not any(agrees(value, told) for value in written):
                found.append(f"{note.place}: {note.value} -> {note.ours}")
    return found


def contradictions_of(content: Any, dialect: str) -> list[str] | None:
    """Contradictions of a content, or None where the dialect refuses it."""
    try:
        return contradictions(import_recipe(content, dialect))
    except PrismQuantError:
        return None


def test_named_configurations() -> None:
    found = {name: contradictions_of(name, "modelopt") for name in PRESETS}
    assert [one for one in found.values() if one] == []
    assert sum(one is None for one in found.values()) < len(found) / 4


ARGUMENTS = {"num_bits": 4, "group_size": 32, "strategy": "group", "actorder": "static"}
MODIFIERS: list[Any] = [
    {"GPTQModifier": {"scheme": "W4A16", "dampening_frac": 0.0123456789, "actorder": None}},
    {"GPTQModifier": {"scheme": "W4A16", "dampening_frac": 0, "block_size": 64, "ignore": ["a"]}},
    {
        "GPTQModifier": {
            "config_groups": {"a": {"targets": ["Linear"], "weights": ARGUMENTS}},
            "actorder": None,
            "observer": {"weights": "mse"},
            "targets": ["b"],
        }
    },
    {"SpinQuantModifier": {"rotations": ["R4"], "transform_type": "hadamard"}},
    {"SpinQuantModifier": {"rotations": ["R3"], "transform_type": "hadamard"}},
    {"SpinQuantModifier": {"rotations": ["R1", "R4"], "transform_block_size": 64}},
    {"SmoothQuantModifier": {"smoothing_strength": 0.123456789}},
    {"SmoothQuantModifier": {"mappings": [[["re:.*q_proj", "k_proj"], "a"]], "ignore": ["b"]}},
    {"AWQModifier": {"duo_scaling": False, "n_grid": 7}},
    {"AWQModifier": {"mappings": [{"smooth_layer": "a", "balance_layers": ["re:.*\\.up_proj"]}]}},
    {"AutoRoundModifier": {"scheme": "W4A16", "iters": 7, "lr": 0.00123, "batch_size": 2}},
    {"QuantizationModifier": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}},
    {"QuantizationModifier": {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}},
]


@drawn(
    steps=strategies.lists(strategies.sampled_from(MODIFIERS), min_size=1, max_size=3),
    samples=strategies.integers(1, 99),
)
@settings(max_examples=100, deadline=None)
def test_modifiers(steps: list[Any], samples: int) -> None:
    stages = {f"stage{number}_stage": {"quant_modifiers": one} for number, one in enumerate(steps)}
    stages["last_stage"] = {"quant_modifiers": {"QuantizationModifier": {"scheme": "W8A8"}}}
    imported = import_recipe({"recipe": stages, "num_calibration_samples": samples})
    assert contradictions(imported) == []


def test_named_schemes() -> None:
    keys = {name: {"scheme": name, "weight_observer": "mse"} for name in SCHEMES}
    found = {
        name: contradictions_of({"QuantizationModifier": one}, "llm-compressor")
        for name, one in keys.items()
    }
    assert [one for one in found.values() if one] == []
    assert [name for name, one in found.items() if one is None] == ["UNQUANTIZED"]


KEYS: dict[str, strategies.SearchStrategy[Any]] = {
    "w_groupsize": strategies.sampled_from([-1, 0, 32]),
    "groupsize": strategies.sampled_from([-1, 0, 64]),
    "a_groupsize": strategies.sampled_from([-1, 32]),
    "w_qtype": strategies.sampled_from(["per_channel", "per_group", "per_tensor"]),
    "a_qtype": strategies.sampled_from(["per_tensor", "per_token", "per_group"]),
    "w_has_zero": strategies.booleans(),
    "quantization_type": strategies.sampled_from(["static", "dynamic"]),
    "percdamp": strategies.sampled_from([0, 0.0123456789]),
    "actorder": strategies.booleans(),
    "alpha": strategies.sampled_from([0.3, 0.123456789]),
    "auto_clip": strategies.booleans(),
    "auto_scale": strategies.booleans(),
    "quant_out": strategies.booleans(),
    "num_calibrate": strategies.integers(1, 9),
}
COUNTS = {key: strategies.integers(10, 19) for key in ("nsamples", "nsample", "num_calibrate")}


@drawn(
    algo=strategies.sampled_from(["rtn", "gptq", "awq", "smoothquant", "zeroquant", "awq+gptq"]),
    inputs=strategies.sampled_from(["float16", "int8"]),
    keys=strategies.fixed_dictionaries({}, optional=KEYS),
    counts=strategies.fixed_dictionaries({}, optional=COUNTS),
)
@settings(max_examples=200, deadline=None)
def test_keys_of_mi_optimize(
    algo: str, inputs: str, keys: dict[str, Any], counts: dict[str, int]
) -> None:
    arguments = {"w_dtype": "int4", "a_dtype": inputs} | keys
    content = {"algo": algo, "kwargs": arguments, "calibrate_config": counts}
    try:
        imported = import_recipe({"quant_config": content})
    except PrismQuantError:
        return
    assert contradictions(imported) == []


FLAGS = (
    *("--llm_static", "--llm_w_rtn", "--llm_w_clip", "--w_asym", "--a_asym", "--act_order"),
    *("--quant_visual_clip", "--rotate", "--rotate_llm", "--online_llm_hadamard", "--llm_split"),
    *("--w_groupsize 64", "--a_groupsize 32", "--percdamp 0", "--percdamp 0.0123456789"),
    *("--visual_static", "--visual_w_bits 8", "--llm_a_bits 16", "--nsamples 12", "--calib_num 5"),
    *("--skip_names a b", "--rotate_mode random", "--a_clip_ratio 0.9", "--seed 3"),
)


@drawn(flags=strategies.lists(strategies.sampled_from(FLAGS), unique=True))
@settings(max_examples=200, deadline=None)
def test_flags_of_mquant(flags: list[str]) -> None:
    try:
        imported = import_recipe(" ".join(["--quant", "--quant_llm", "--llm_w_bits 4", *flags]))
    except PrismQuantError:
        return
    assert contradictions(imported) == []


CACHE = {"num_bits": (4, 3), "axis": None, "calibrator": "histogram"}
ENTRIES: list[Any] = [
    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 128}}},
    {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "calibrator": "histogram"}},
    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "calibrator": "histogram"}},
    {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": CACHE},
    {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8, "calibrator": "max"}},
    {"quantizer_name": "*[kv]_bmm_quantizer", "enable": False},
    {"quantizer_name": "*lm_head*", "enable": False},
]
ALGORITHMS: list[Any] = [
    *("max", "mse", "smoothquant", "awq_lite", "awq_clip", "awq_full", "gptq", None),
    {"method": "gptq", "perc_damp": 0},
    {"method": "mse", "start_multiplier": 0.3, "step_size": 0.07, "fp8_scale_sweep": False},
    {"method": "awq_clip", "min_clip_ratio": 0.3, "shrink_step": 0.1},
    {"method": "smoothquant", "alpha": 0.123456789, "layerwise": True},
]


@drawn(
    entries=strategies.lists(strategies.sampled_from(ENTRIES), min_size=1, max_size=4),
    algorithm=strategies.sampled_from(ALGORITHMS),
)
@settings(max_examples=200, deadline=None)
def test_entries_of_modelopt(entries: list[Any], algorithm: Any) -> None:
    off = {"quantizer_name": "*", "enable": False}
    try:
        imported = import_recipe({"quant_cfg": [off, *entries], "algorithm": algorithm})
    except PrismQuantError:
        return
    assert contradictions(imported) == []
