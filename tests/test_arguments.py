"""Arguments: the Python functions take the words of the command line, and refuse the same."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prismquant as pq
from prismquant import api
from prismquant.arguments import (
    as_arithmetic,
    as_bytes,
    as_choice,
    as_count,
    as_device,
    as_dtype,
    as_flag,
    as_path,
    as_source,
)
from prismquant.errors import ArgumentError, PrismQuantError
from prismquant.export.load_quantized import load

if TYPE_CHECKING:
    from collections.abc import Callable

RTN = {"rules": [{"match": {"role": ["attn", "mlp"]}, "weights": "int8-channel", "solver": "rtn"}]}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4GiB", 4 << 30),
        ("4G", 4 << 30),
        ("4 gb", 4 * 10**9),
        ("500 MB", 500 * 10**6),
        ("1.5GiB", 3 << 29),
        (".5KiB", 512),
        (" 7b ", 7),
    ],
)
def test_sizes_are_those_of_memory(text: Any, count: int) -> None:
    assert as_bytes(text, "memory_budget") == count


@pytest.mark.parametrize(
    "value",
    [
        "",
        "GiB",
        "0",
        0,
        -1,
        "-1",
        "1..2",
        ".",
        "9" * 400,
        "9" * 30,
        2**61,
        1.5,
        True,
        None,
        "4GiBs",
    ],
)
def test_what_is_no_size_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        as_bytes(value, "memory_budget")
    assert caught.value.where == "memory_budget (--memory-budget)"
    assert len(str(caught.value)) < 200


@given(st.text(max_size=12) | st.integers() | st.floats() | st.none() | st.booleans())
def test_any_value_is_a_size_or_refused(value: Any) -> None:
    try:
        assert 1 <= as_bytes(value, "x") <= 1 << 60
    except ArgumentError:
        return
    assert not isinstance(value, float | bool | None)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_dtypes_by_name_or_themselves(value: Any, dtype: torch.dtype) -> None:
    assert as_dtype(value) is dtype
    assert as_arithmetic(value) is dtype
    assert as_arithmetic("mixed") == "mixed"


@pytest.mark.parametrize("value", ["nonsense", "int8", torch.int8, torch.float64, 32, ["float32"]])
def test_what_is_no_dtype_is_refused(value: Any) -> None:
    for read in (as_dtype, as_arithmetic):
        with pytest.raises(ArgumentError, match="there is no dtype") as caught:
            read(value)
        assert "float32" in str(caught.value.remedy)


@pytest.mark.parametrize("value", ["cpu", torch.device("cpu"), "cpu:0"])
def test_devices_by_name_or_themselves(value: Any) -> None:
    assert as_device(value).type == "cpu"


@pytest.mark.parametrize("value", ["meta", torch.device("meta"), "nonsense", "", "cuda:99"])
def test_devices_that_compute_nothing_are_refused(value: Any) -> None:
    with pytest.raises(PrismQuantError, match=r"cannot be used: \w") as caught:
        as_device(value)
    assert caught.value.remedy == "use --device cpu"


def test_what_is_no_device_is_refused() -> None:
    for value in (0, None, ["cpu"]):
        with pytest.raises(ArgumentError, match="is not a device"):
            as_device(value)


@pytest.mark.parametrize("value", ["a", "a/b", "~", " ", "ä" * 127, Path("a")])
def test_paths_as_text_or_paths(value: Any) -> None:
    assert as_path(value, "out") == Path(value)
    assert as_source(value, "data") == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a\0b",
        "x" * 256,
        "ä" * 128,
        "a/" + "x" * 300 + "/b",
        "\ud800",
        b"a",
        "-",
        None,
        3,
        ["a"],
        True,
    ],
)
def test_what_no_file_is_called_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        as_path(value, "out")
    assert caught.value.where == "out (--out)"
    assert len(str(caught.value)) < 250


def test_counts_flags_and_choices() -> None:
    assert as_count(3, "samples") == 3
    assert as_count(torch.tensor(3), "samples") == 3
    for value in (0, -1, True, 1.0, "3", None, 10**30, math.nan):
        with pytest.raises(ArgumentError, match="is not a whole number from 1 to 1000000"):
            as_count(value, "samples")
    assert as_flag(True, "resume") is True
    for value in (1, "yes", None):
        with pytest.raises(ArgumentError, match="neither true nor false"):
            as_flag(value, "resume")
    with pytest.raises(ArgumentError, match="there is no solver 'gtpq'") as caught:
        as_choice("gtpq", "solver", ["rtn", "gptq"])
    assert caught.value.remedy == "did you mean 'gptq'? known: gptq, rtn"


# The functions


GOOD: dict[str, Any] = {
    "model": "nowhere",
    "recipe": "w4a16",
    "out": "out",
    "calibration": None,
    "format": "dense",
    "folder": "nowhere",
    "data": "nowhere.jsonl",
}
# What each argument must refuse, whichever function takes it.
BAD: dict[str, list[Any]] = {
    "model": [None, ["m"], ""],
    "arch": [3, ""],
    "folder": [None, 3, ""],
    "recipe": [None, 3],
    "out": [None, "", "x" * 300],
    "calibration": [3, ""],
    "data": [None, 3],
    "reference": [3, ""],
    "format": ["gtpq", None],
    "samples": [0, True, "3", 10**9],
    "limit": [0, True, "3"],
    "batch_size": [0, True, 10**9],
    "solver": ["gtpq", 3],
    "kv_cache": ["fp9", 3],
    "fallback": ["yes"],
    "on_failure": ["go on"],
    "tensor_parallel": [0, 10**9],
    "device": [0, "meta"],
    "dtype": ["nonsense", 3],
    "memory_budget": ["9..9", 0, True],
    "max_pixels": [0, True, "3", 2**31],
    "max_frames": [0, 1.5],
    "max_length": [-1, "3"],
    "seq_length": [-1, "3"],
    "resume": ["yes", 1],
    "strict": ["yes"],
    "trust_remote_code": ["yes", 1],
    "weights_only": [1],
    "generated": ["yes"],
    "packed": ["yes", 1],
    "options": [{"dtype": "int8"}],
}
# What is made by PrismQuant itself.
OURS = {"reporter", "progress", "ranks"}
FUNCTIONS = [api.inspect, api.quantize, load, api.export, api.measure]
CASES = [
    pytest.param(function, name, value, id=f"{function.__name__}-{name}-{value!r:.20}")
    for function in FUNCTIONS
    for name in inspect.signature(function).parameters
    if name not in OURS
    for value in BAD.get(name, [])
]


@pytest.mark.parametrize(("function", "name", "value"), CASES)
def test_every_argument_refuses_what_it_is_not(
    function: Callable[..., Any],
    name: str,
    value: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is opened: the model is not even there."""
    monkeypatch.chdir(tmp_path)
    needed = {
        key
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    with pytest.raises(PrismQuantError) as caught:
        function(**{key: GOOD[key] for key in needed} | {name: value})
    assert "nowhere" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_argument_has_such_a_case() -> None:
    for function in FUNCTIONS:
        assert set(inspect.signature(function).parameters) <= BAD.keys() | OURS


def test_the_words_of_the_command_line_are_taken(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """In Python as in the shell, down to the arithmetic that the record names."""
    model, out = str(tiny("qwen2_vl")), str(tmp_path / "out")
    result = pq.quantize(
        model,
        RTN | {"name": "mine"},
        out,
        str(calibration_file),
        samples=2,
        batch_size=1,
        solver="rtn",
        kv_cache="fp8",
        fallback=True,
        on_failure="rtn",
        tensor_parallel=2,
        device="cpu",
        dtype="bfloat16",
        memory_budget="64GiB",
    )
    assert result.record.identity.arithmetic == "cpu torch.bfloat16"
    assert result.record.memory["budget_bytes"] == 64 << 30
    assert sum(result.record.samples.values()) == 2
    assert "the recipe needs no calibration data" not in " ".join(result.plan.remarks)
    recipe = pq.load_recipe(tmp_path / "out" / "prismquant" / "recipe.yaml")
    assert recipe.name == "mine-rtn"
    assert (recipe.tensor_parallel, recipe.calibration.batch_size) == (2, 1)
    assert [row.fallback or row.on_failure for row in recipe.rules[1:3]] == ["nearest", "rtn"]
    loaded, _ = pq.load(out, dtype="float32")
    assert loaded.dtype is torch.float32
    changes = {"kv_cache": "fp8", "fallback": True, "on_failure": "rtn", "tensor_parallel": 2}
    assert pq.inspect(model, RTN, **changes).total_bytes == result.plan.total_bytes


def test_data_that_no_layer_needs_are_not_claimed(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    result = pq.quantize(tiny("qwen2_vl"), RTN, tmp_path / "out", calibration_file)
    assert result.record.calibration == ""
    assert any("needs no calibration data" in remark for remark in result.plan.remarks)


def test_options_of_data_that_no_layer_needs_are_told(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    given = {"samples": 3, "batch_size": 2, "max_pixels": 9, "max_frames": 2, "max_length": 8}
    result = pq.quantize(tiny("qwen2_vl"), RTN, tmp_path / "out", **given)
    (note,) = result.plan.remarks
    assert note == (
        "the recipe needs no calibration data: --samples, --batch-size, --max-pixels, "
        "--max-frames, --max-length have no effect"
    )
    result = pq.quantize(tiny("qwen2_vl"), RTN, tmp_path / "other", max_frames=2)
    assert result.plan.remarks == (
        "the recipe needs no calibration data: --max-frames has no effect",
    )
