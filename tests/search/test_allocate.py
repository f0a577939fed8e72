"""Mixes within constraints: against brute force, and what is said where none exists."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sensitivities import made

from prismquant.errors import ArgumentError, DataError, PlanError, StorageError
from prismquant.search.allocate import Mix, allocate
from prismquant.search.constraints import parse_constraints
from prismquant.search.sensitivity import (
    FLOAT,
    Choice,
    ChoiceUnit,
    FormatOption,
    Score,
    Sensitivity,
)

if TYPE_CHECKING:
    from pathlib import Path

CACHE_CHOICE = Choice(cache={"format": "fp8", "granularity": "tensor", "rotated": False})
CACHE = ChoiceUnit(
    "kv_cache",
    "llm",
    "llm",
    "kv_cache",
    (),
    (
        FormatOption(FLOAT, 0, cache_bytes=4096),
        FormatOption(
            "kv:fp8", 64, cache_bytes=2048, scores={"answer": Score(3.0), "text": Score(0.0)}
        ),
    ),
)


def find(found: Sensitivity, **asked: Any) -> Mix:
    return allocate(found, parse_constraints(asked))  # type: ignore[arg-type]


def small(seed: int, noise: float = 0.0) -> Sensitivity:
    """Six units of three options."""
    return made(seed, blocks=1, formats=("int3-g128", "int8-channel"), noise=noise)


def every_mix(found: Sensitivity) -> list[tuple[tuple[FormatOption, ...], float, int]]:
    """All mixes with loss and bytes, added up plainly."""
    mixes = itertools.product(*(unit.options for unit in found.units))
    return [
        (
            mix,
            sum(
                found.weights.get(kind, 0) * score.loss
                for option in mix
                for kind, score in option.scores.items()
            ),
            found.fixed_bytes + sum(option.stored_bytes for option in mix),
        )
        for mix in mixes
    ]


def parameters(found: Sensitivity) -> int:
    return found.fixed_weights + sum(layer.weights for u in found.units for layer in u.layers)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), bits=st.floats(2, 17), noise=st.sampled_from([0.0, 100.0]))
def test_the_loss_is_the_least_of_all_mixes_of_the_size(
    seed: int, bits: float, noise: float
) -> None:
    """Noise makes losses negative, which counts as it stands."""
    found = small(seed, noise)
    most = bits * parameters(found) / 8
    fitting = [loss for _, loss, size in every_mix(found) if size <= most]
    if not fitting:
        with pytest.raises(PlanError, match="the least size is"):
            find(found, bits=bits)
        return
    mix = find(found, bits=bits)
    assert mix.stored_bytes <= most
    assert mix.loss == pytest.approx(min(fitting), rel=1e-9)
    assert mix.gap <= 1e-6 * (1 + abs(mix.loss))
    assert mix == find(found, bits=bits)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1.05))
def test_the_fewest_bytes_within_a_loss_and_the_best_of_these(seed: int, share: float) -> None:
    found = small(seed)
    mixes = every_mix(found)
    # A sum that is the limit itself depends on its order.
    most = share * max(loss for _, loss, _ in mixes) * (1 + 1e-9)
    mix = find(found, max_loss=most)
    size, loss = min((size, loss) for _, loss, size in mixes if loss <= most)
    assert (mix.stored_bytes, mix.gap, mix.minimised) == (size, 0, "bytes")
    assert mix.loss == pytest.approx(loss)
    assert mix.loss <= most


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_several_constraints_at_once(seed: int, data: st.DataObject) -> None:
    found = small(seed)
    bits, cap, floor = (data.draw(st.floats(2, 16)) for _ in range(3))
    units = {
        name: [n for n, unit in enumerate(found.units) if unit.modality == name]
        for name in ("vision", "llm")
    }
    weights = {
        name: sum(layer.weights for n in own for layer in found.units[n].layers)
        for name, own in units.items()
    }

    def taken(mix: tuple[FormatOption, ...], name: str) -> float:
        return 8 * sum(mix[n].stored_bytes for n in units[name]) / weights[name]

    fitting = [
        loss
        for mix, loss, size in every_mix(found)
        if size <= bits * parameters(found) / 8
        and taken(mix, "vision") <= cap
        and taken(mix, "llm") >= floor
    ]
    asked = {"bits": bits, "cap": {"vision": cap}, "floor": {"llm": floor}}
    if fitting:
        assert find(found, **asked).loss == pytest.approx(min(fitting), rel=1e-9)
    else:
        with pytest.raises(PlanError, match="no mix of the formats on offer keeps to"):
            find(found, **asked)


def test_what_cannot_be_met_says_the_least_that_can() -> None:
    found = made(0)
    with pytest.raises(PlanError) as caught:
        find(found, size=1000)
    (line,) = caught.value.findings
    options = [min(o.stored_bytes for o in unit.options) for unit in found.units]
    least = found.fixed_bytes + sum(options)
    assert f"the least size is {least:,} bytes" in line
    assert "100,000 bytes (97.7 KiB) in tensors of no unit" in line
    assert "in 3 units as int2-g64" in line
    mix = find(found, size=least)
    assert mix.stored_bytes == least
    # The bits that are told can be had, and no fewer at the digits shown.
    bits = float(line.partition(", held")[0].split()[-4])
    assert find(found, bits=bits).stored_bytes == least
    with pytest.raises(PlanError):
        find(found, bits=bits - 0.0002)


def test_constraints_at_odds_say_what_each_would_have_to_be() -> None:
    with pytest.raises(PlanError) as caught:
        find(made(0), bits=3, floor="vision=8")
    told = "\n".join(caught.value.findings)
    assert "beside the rest, the least size is" in told
    assert "beside the rest, the most size of vision is" in told


def test_a_unit_that_is_left_out_holds_a_cap() -> None:
    found = made(0)
    alone = tuple(
        replace(unit, options=unit.options[:1]) if unit.modality == "vision" else unit
        for unit in found.units
    )
    found = replace(found, units=alone)
    assert find(found, bits=12).formats["vision.0.mlp.up"] == FLOAT
    with pytest.raises(PlanError, match=r"the least size of vision is .* as float"):
        find(found, cap="vision=8")


def test_the_cache_takes_fewer_bytes_only_where_it_must() -> None:
    found = made(0)
    found = replace(
        found, units=(*found.units, CACHE), formats=found.formats | {"kv:fp8": CACHE_CHOICE}
    )
    assert find(found, bits=6).formats["kv_cache"] == FLOAT
    mix = find(found, bits=6, cache_bytes="2KiB")
    assert mix.formats["kv_cache"] == "kv:fp8"
    assert mix.cache_bytes == 2048
    with pytest.raises(PlanError, match="the least size of keys and values of a token is 2,048"):
        find(found, cache_bytes=2047)


def test_an_option_without_any_score_is_not_on_offer() -> None:
    options = tuple(replace(option, scores={}) for option in CACHE.options)
    found = made(0)
    found = replace(
        found,
        units=(*found.units, replace(CACHE, options=options)),
        formats=found.formats | {"kv:fp8": CACHE_CHOICE},
    )
    mix = find(found, bits=6)
    assert mix.formats["kv_cache"] == FLOAT
    assert mix.loss == find(made(0), bits=6).loss
    told = f"kv_cache: not offered as kv:fp8: the analysis, by the method {found.method}, has no"
    assert any(note.startswith(told) for note in mix.notes)
    with pytest.raises(PlanError, match="no option has scores") as caught:
        find(replace(found, units=found.units[-1:]), bits=6)
    assert "another --method" in str(caught.value.remedy)


def test_a_cache_that_was_not_analyzed_cannot_be_bounded() -> None:
    with pytest.raises(PlanError, match="has no format of the key-value cache"):
        find(made(0), bits=6, cache_bytes="2KiB")


def test_a_bound_that_nothing_holds_ends_its_line() -> None:
    with pytest.raises(PlanError) as caught:
        find(made(0), max_loss=-1)
    assert caught.value.findings[0] == "the least loss is 0"


def test_a_class_of_tokens_is_weighed_once() -> None:
    with pytest.raises(ArgumentError, match="answer is given twice"):
        parse_constraints({"weight": "answer=1,answer=2"})


def test_a_misspelt_modality_is_told_plainly() -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_constraints({"cap": "visoin=8"})
    assert caught.value.remedy == "did you mean 'vision'? known: llm, projector, vision"


def test_classes_of_tokens_are_weighed_as_asked() -> None:
    found = made(3)
    for weight, kind in (("answer=1", "answer"), ("text=2", "text")):
        mix = find(found, bits=4, weight=weight)
        assert mix.loss == pytest.approx(mix.losses[kind] * float(weight[-1]))  # type: ignore[index]
    own = find(found, bits=4)
    assert own.loss == pytest.approx(own.losses["answer"] + 0.2 * own.losses["text"])
    with pytest.raises(PlanError, match="no option has scores of video tokens"):
        find(found, bits=4, weight="video=1")
    note = "the analysis has seen no video tokens, so their weight counts nothing"
    assert find(found, bits=4, weight="video=1,text=1").notes == (note,)


def test_a_missing_score_is_told() -> None:
    found = made(0)
    unit = found.units[2]
    bare = replace(unit.options[1], scores={"answer": Score(1.0)})
    unit = replace(unit, options=(unit.options[0], bare, *unit.options[2:]))
    found = replace(found, units=(*found.units[:2], unit, *found.units[3:]))
    with pytest.raises(PlanError, match="int2-g64 has no score of text tokens"):
        find(found, bits=4)
    assert find(found, bits=4, weight="answer=1")


def test_a_reader_is_not_offered_what_it_refuses() -> None:
    found = made(0)
    refusing = tuple(
        replace(
            unit,
            options=tuple(
                replace(o, refused={"vllm": "no scheme"} if o.format == "int4-g128" else {})
                for o in unit.options
            ),
        )
        for unit in found.units
    )
    found = replace(found, units=refusing)
    free, bound = find(found, bits=4.6), find(found, bits=4.6, reader="vllm")
    assert "int4-g128" in free.formats.values()
    assert "int4-g128" not in bound.formats.values()
    assert bound.loss > free.loss
    assert any("not offered as int4-g128: no scheme" in note for note in bound.notes)
    assert not free.notes


def test_layers_that_devices_cannot_share_are_not_offered() -> None:
    """Row-parallel layers are cut along their inputs: groups of 128 must divide each part."""
    found = made(5)
    mix = find(found, bits=4.6, tensor_parallel=4)
    for unit in found.units:
        (layer,) = unit.layers
        parts = 4 if layer.parallel == "row" else 1
        if mix.formats[unit.name] in ("int3-g128", "int4-g128"):
            assert layer.in_features // parts % 128 == 0
    assert any("on each of 4 devices" in note for note in mix.notes)


# Latency


def table(found: Sensitivity, path: Path, **more: Any) -> Path:
    times = {FLOAT: 4.0, "int8-channel": 2.0, "fp8-channel": 1.5, "int4-g128": 1.0}
    shapes = {(la.out_features, la.in_features) for unit in found.units for la in unit.layers}
    layers = [
        {"out": out, "in": width, "format": name, "ms": times.get(name, 3.0) * out * width / 1e6}
        for out, width in sorted(shapes)
        for name in (FLOAT, *found.formats)
    ]
    path.write_text(json.dumps({"layers": layers} | more))
    return path


def test_latency_is_bound_by_a_table(tmp_path: Path) -> None:
    found = made(2)
    path = table(found, tmp_path / "t.json")
    free = find(found, latency=path, latency_ms=1000, bits=9)
    assert free.latency_ms is not None
    most = free.latency_ms * 0.8
    mix = find(found, latency=path, latency_ms=most, bits=9)
    assert mix.latency_ms is not None
    assert mix.latency_ms <= most
    assert mix.loss > free.loss
    with pytest.raises(PlanError, match="the least milliseconds is"):
        find(found, latency=path, latency_ms=0.001)


def test_an_entry_of_a_unit_comes_before_those_of_its_layers(tmp_path: Path) -> None:
    found = made(2)
    own = [{"unit": "llm.0.mlp.up", "format": "int4-g128", "ms": 100.0}]
    path = table(found, tmp_path / "t.json", units=own)
    mix = find(found, latency=path, latency_ms=90, bits=4.6)
    assert mix.formats["llm.0.mlp.up"] != "int4-g128"


def test_fused_layers_are_looked_up_as_one(tmp_path: Path) -> None:
    found = made(2, formats=("int4-g128",))
    first = found.units[0].layers[0]
    halves = tuple(
        replace(first, name=name, out_features=first.out_features // 2, fused=True)
        for name in ("vision.0.a", "vision.0.b")
    )
    fused = replace(found.units[0], layers=halves)
    path = table(found, tmp_path / "t.json")
    whole = find(found, latency=path, latency_ms=1000, bits=9)
    found = replace(found, units=(fused, *found.units[1:]))
    mix = find(found, latency=path, latency_ms=1000, bits=9)
    assert mix.latency_ms == whole.latency_ms


def test_times_that_are_missing_are_named(tmp_path: Path) -> None:
    found = made(2)
    path = table(made(2, formats=("int4-g128",)), tmp_path / "t.json")
    with pytest.raises(DataError, match=r"lacks times:\n  - vision.*int2-g64"):
        find(found, latency=path, latency_ms=9)


def test_units_that_there_are_not_are_named(tmp_path: Path) -> None:
    found = made(2)
    own = [{"unit": name, "format": FLOAT, "ms": 1.0} for name in ("llm.0.mlp.upp", "zzz")]
    path = table(found, tmp_path / "t.json", units=own)
    with pytest.raises(DataError, match="units that the model does not have") as caught:
        find(found, latency=path, latency_ms=1000)
    assert list(caught.value.findings) == [
        "'llm.0.mlp.upp': did you mean 'llm.0.mlp.up'?",
        "'zzz': no such unit",
    ]


def test_times_of_another_model_are_told(tmp_path: Path) -> None:
    """One table may be of many models, of which each has some of its shapes and formats."""
    found = made(2)
    path = table(found, tmp_path / "t.json")
    content = json.loads(path.read_text())
    content["layers"] += [
        {"out": 7, "in": width, "format": name, "ms": 1.0}
        for width in range(1, 21)
        for name in (FLOAT, "int9")
    ]
    content["units"] = [{"unit": "llm.0.mlp.up", "format": "int5", "ms": 1.0}]
    path.write_text(json.dumps(content))
    mix = find(found, latency=path, latency_ms=1000)
    shapes = ", ".join(f"7 x {width}" for width in range(1, 9))
    assert mix.notes == (
        f"{path} has times of formats that were not analyzed: int9, int5; they are not used",
        f"{path} has times of shapes that no layer has: {shapes} and 12 more; they are not used",
    )
    clean = find(found, latency=table(found, tmp_path / "own.json"), latency_ms=1000)
    assert not clean.notes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"layers": [{"out": 1, "in": 1, "format": "x"}]}', "layers.0.ms"),
        ('{"layers": [{"out": 1, "in": 1, "format": "x", "ms": -1}]}', "layers.0.ms"),
        ('{"layers": [{"out": 1, "in": 1, "format": "x", "ms": 1e308}]}', "layers.0.ms"),
        ('{"layers": [{"out": 0, "in": 1, "format": "x", "ms": 1}]}', "layers.0.out"),
        ('{"units": [], "unit": []}', "unit"),
        ('{"version": 2}', "version 2 is not 1"),
        ('{"units": [%s, %s]}' % (('{"unit": "a", "format": "x", "ms": 1}',) * 2), "twice"),
        ("[]", "no table of latencies"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError, match=told):
        find(made(0), latency=tmp_path / "t.json", latency_ms=9)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing"):
        find(made(0), latency=tmp_path / "t.json", latency_ms=9)


# Words


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"bits": 0}, "no number of bits"),
        ({"bits": "4.6GB"}, "'4.6GB' is not a number"),
        ({"bits": True}, "not a number"),
        ({"bits": 4, "size": 1}, "both given"),
        ({"size": "big"}, "no size"),
        ({"max_loss": "nan"}, "not a number"),
        ({"max_loss": float("inf")}, "not a number"),
        ({"cap": "visoin=8"}, "there is no 'visoin'"),
        ({"cap": "vision"}, "vision has no value"),
        ({"cap": ["vision=8", "vision=4"]}, "given twice"),
        ({"cap": "vision=8bits"}, "vision=8bits is neither a size nor bits per weight"),
        ({"cap": {"vision": None}}, "vision has no value"),
        ({"cap": " , "}, "no modality is named"),
        ({"floor": {}}, "no modality is named"),
        ({"floor": "llm=-1"}, "llm=-1 is neither a size nor bits per weight"),
        ({"weight": "answr=1"}, "no class of tokens 'answr'"),
        ({"weight": "answer=-1"}, "no weight: neither 0 nor from"),
        ({"weight": "answer=0"}, "a weight above 0"),
        ({"reader": "vlm"}, "no reader 'vlm'"),
        ({"tensor_parallel": 0}, "whole number from 1"),
        ({"latency_ms": 3}, "go together"),
        ({"cap": "llm=4", "floor": "llm=8"}, "llm is to take 8 bits at least and 4 bits at most"),
        ({"cap": "llm=1GB", "floor": "llm=2GB"}, "raise the cap or lower the floor"),
        ({"bit": 4}, "no constraint 'bit'"),
    ],
)
def test_words_that_mean_nothing(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        parse_constraints(asked)  # type: ignore[arg-type]


def test_amounts_are_bits_or_bytes() -> None:
    found = parse_constraints({"cap": "vision=8,llm=2GB", "floor": {"llm": 4.5}, "size": "3.2GB"})
    assert (found.caps["vision"].bits, found.caps["llm"].bytes) == (8.0, 2_000_000_000)
    assert (found.floors["llm"].bits, found.total and found.total.bytes) == (4.5, 3_200_000_000)
    assert found.describe() == [
        "total at most 3,200,000,000 bytes",
        "vision at most 8 bits",
        "llm at most 2,000,000,000 bytes",
        "llm at least 4.5 bits",
    ]
