"""Number formats: their names, what is refused, and what they cost."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismquant.errors import FormatError
from prismquant.formats.spec import PRESETS, NumberSpec, spec
from prismquant.numerics.grids import FloatGrid, IntGrid
from prismquant.numerics.kinds import FLOAT_KINDS, Granularity

CODED = [name for name in PRESETS if PRESETS[name].scale != "float"]


@st.composite
def specs(draw: st.DrawFn) -> NumberSpec:
    if draw(st.integers(0, 4)) == 0:
        return spec(draw(st.sampled_from([*CODED, "mxint8-ceil-dyn", "mxfp6-e3m2-floor"])))
    granularity = draw(st.sampled_from(Granularity))
    kind = draw(st.sampled_from(["int", "int", *FLOAT_KINDS]))
    symmetric = kind != "int" or draw(st.booleans())
    dynamic = draw(st.booleans()) or granularity == Granularity.TOKEN
    return NumberSpec(
        bits=draw(st.integers(2, 8)) if kind == "int" else FloatGrid(kind).bits,
        granularity=granularity,
        group_size=draw(st.integers(1, 512)) if granularity.grouped else None,
        symmetric=symmetric,
        narrow=kind == "int" and symmetric and draw(st.booleans()),
        dynamic=dynamic and granularity not in (Granularity.CHANNEL, Granularity.BLOCK),
        kind=kind,
    )


@given(specs())
def test_every_format_is_its_name_and_its_dictionary(number: NumberSpec) -> None:
    assert spec(number.name) == number
    assert NumberSpec.from_dict(json.loads(json.dumps(number.to_dict()))) == number


@given(specs(), specs())
def test_different_formats_are_described_differently(a: NumberSpec, b: NumberSpec) -> None:
    assert (a.describe() == b.describe()) == (a == b)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_named_as_they_are(name: str) -> None:
    assert PRESETS[name].name == name
    assert spec(name) == PRESETS[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("int4-g128", "int4 g128 sym"),
        ("int4-g128-asym", "int4 g128 asym"),
        ("int8-token", "int8 token dyn"),
        ("int8-token-asym", "int8 token asym dyn"),
        ("int8-tensor", "int8 tensor sym"),
        ("int8-channel-narrow", "int8 channel narrow"),
        ("fp8-channel", "fp8 channel"),
        ("fp8-token", "fp8 token dyn"),
        ("fp8-e5m2-tensor", "fp8 e5m2 tensor"),
        ("fp4-g32", "fp4 g32"),
        ("fp4-g32-dyn", "fp4 g32 dyn"),
        ("fp8-b128", "fp8 b128"),
        ("fp6-e2m3-g32", "fp6 e2m3 g32"),
        ("nvfp4", "nvfp4"),
        ("nvfp4-dyn", "nvfp4 dyn"),
        ("mxfp4-ceil-dyn", "mxfp4 ceil dyn"),
        ("mxfp6-e3m2", "mxfp6 e3m2"),
        ("mxint8", "mxint8"),
    ],
)
def test_descriptions_read_like_the_literature(name: str, words: str) -> None:
    assert spec(name).describe() == words


def test_the_usual_formats_are_presets() -> None:
    usual = {"int4-g128", "int8-channel", "int4-channel", "int8-token", "int8-tensor", "int3-g128"}
    assert usual | {"int2-g64", "int4-g128-asym"} <= set(PRESETS)
    floats = {"fp8-channel", "fp8-token", "fp8-tensor", "fp8-e5m2-channel"}
    assert floats | {"fp4-g32", "fp4-channel", "fp4-token"} <= set(PRESETS)
    assert {"fp8-b128", "fp8-g128-dyn", "nvfp4", "nvfp4-dyn", "mxfp4-floor-dyn"} <= set(PRESETS)
    mx = {f"mx{name}" for name in ("fp4", "fp6", "fp6-e3m2", "fp8", "fp8-e5m2", "int8")}
    assert mx | {f"{name}-dyn" for name in mx} <= set(PRESETS)


def test_formats_with_scales_of_eight_bits_are_what_their_standards_say() -> None:
    nv, mx = spec("nvfp4"), spec("mxfp6-floor-dyn")
    assert (nv.kind, nv.group_size, nv.scale, nv.dynamic) == ("e2m1", 16, "e4m3", False)
    assert (mx.kind, mx.group_size, mx.scale, mx.dynamic) == ("e2m3", 32, "e8m0-floor", True)
    assert spec("mxint8").grid == IntGrid(8, narrow=True)
    assert spec("mxfp8-ceil").scale == "e8m0-ceil"


@pytest.mark.parametrize(
    ("name", "calibrated"),
    [("int8-tensor", True), ("int8-token", False), ("nvfp4-dyn", True), ("mxfp4-dyn", False)],
)
def test_only_formats_with_a_static_scale_are_calibrated(name: str, calibrated: bool) -> None:
    assert spec(name).calibrated is calibrated


def test_names_beyond_the_presets_follow_the_same_grammar() -> None:
    assert spec("int5-g96") == NumberSpec(5, Granularity.GROUP, 96)
    assert spec("fp8-e5m2-g96") == NumberSpec(8, Granularity.GROUP, 96, kind="e5m2")
    assert spec("fp4-g64-dyn") == NumberSpec(4, Granularity.GROUP, 64, dynamic=True, kind="e2m1")


@pytest.mark.parametrize(
    "name", ["int4", "int4-g", "fp8", "int4-g128-sym", "INT4-g128", "", "fp6-channel"]
)
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(FormatError, match=re.escape(repr(name))) as caught:
        spec(name)
    assert "int4-g128" in str(caught.value)


def test_a_slip_of_the_pen_is_answered_with_the_name_that_was_meant() -> None:
    with pytest.raises(FormatError, match="did you mean 'int8-channel'"):
        spec("int8-chanel")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"bits": 1, "granularity": "channel"}, "1 bits"),
        ({"bits": 9, "granularity": "channel"}, "9 bits"),
        ({"bits": 4, "granularity": "group"}, "positive group size"),
        ({"bits": 4, "granularity": "group", "group_size": 0}, "positive group size"),
        ({"bits": 4, "granularity": "group", "group_size": 1.5}, "positive group size"),
        ({"bits": 4, "granularity": "channel", "group_size": 32}, "no meaning"),
        ({"bits": 4, "granularity": "row"}, "no granularity 'row'"),
        ({"bits": 8, "granularity": "token"}, "always dynamic"),
        ({"bits": 8, "granularity": "channel", "dynamic": True}, "for weights"),
        ({"bits": 8, "granularity": "channel", "symmetric": "yes"}, "symmetric must be"),
        ({"bits": 4, "granularity": "channel", "symmetric": False, "narrow": True}, "narrow"),
        ({"bits": 4, "granularity": "channel", "groupsize": 32}, "no field 'groupsize'"),
        ({"bits": 8, "granularity": "channel", "kind": "float"}, "no kind of number 'float'"),
        ({"bits": 4, "granularity": "channel", "kind": "e4m3"}, "8 bits, not 4"),
        ({"bits": True, "granularity": "channel", "kind": "e2m1"}, "4 bits, not True"),
        ({"granularity": "channel", "kind": "e4m3", "symmetric": False}, "asymmetric"),
        ({"granularity": "channel", "kind": "e5m2", "narrow": True}, "narrow"),
        ({"granularity": "channel", "kind": "e5m2", "dynamic": True}, "for weights"),
        ({"granularity": "token", "kind": "e4m3"}, "always dynamic"),
        ({"granularity": "block", "kind": "e4m3"}, "positive group size"),
        (
            {"granularity": "block", "group_size": 128, "kind": "e4m3", "dynamic": True},
            "block granularity is for weights",
        ),
        ({"bits": 4, "granularity": "channel", "scale": "e8m1"}, "did you mean 'e8m0'"),
        ({"kind": "e2m1", "granularity": "channel", "scale": "e8m0"}, "for groups of 32"),
        (
            {"kind": "e2m1", "granularity": "group", "group_size": 32, "scale": "e4m3"},
            "for groups of 16, not g32",
        ),
        (
            {"kind": "e4m3", "granularity": "group", "group_size": 16, "scale": "e4m3"},
            "for E2M1 numbers",
        ),
        (
            {"bits": 8, "granularity": "group", "group_size": 32, "scale": "e8m0"},
            "integers of 8 bits, narrow",
        ),
        ({"granularity": "channel"}, "needs 'bits'"),
        ({"bits": 4}, "needs 'granularity'"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(FormatError, match=told):
        NumberSpec.from_dict(fields)


def test_the_granularity_may_be_given_as_its_name() -> None:
    number = NumberSpec(4, "group", 128)  # type: ignore[arg-type]
    assert number.granularity is Granularity.GROUP
    assert number == spec("int4-g128")
    assert number.grid == IntGrid(4)


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_the_kind_says_the_bits_and_the_grid(kind: str) -> None:
    number = NumberSpec.from_dict({"kind": kind, "granularity": "channel"})
    assert number.grid == FloatGrid(kind)  # type: ignore[arg-type]
    assert number.bits == FloatGrid(kind).bits  # type: ignore[arg-type]
    assert spec("int8-channel").to_dict()["kind"] == "int"


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4-g128", 4 + 16 / 128),
        ("int4-g128-asym", 4 + 20 / 128),
        ("int4-channel", 4 + 16 / 4096),
        ("int8-tensor", 8.0),
        ("fp8-channel", 8 + 16 / 4096),
        ("fp4-g32", 4.5),
        ("nvfp4", 4.5),
        ("mxfp4", 4.25),
        ("mxfp6", 6.25),
        ("mxint8", 8.25),
        ("fp8-b128", 8 + 16 / 128**2),
    ],
)
def test_effective_bits_count_scales_and_zero_points(name: str, bits: float) -> None:
    assert spec(name).effective_bits(4096) == pytest.approx(bits)


def test_effective_bits_refuse_a_group_that_does_not_divide() -> None:
    with pytest.raises(FormatError, match="128 does not divide 100"):
        spec("int4-g128").effective_bits(100)


def test_scale_shapes_follow_the_granularity() -> None:
    assert spec("int8-tensor").scale_shape(6, 256) == (1,)
    assert spec("int8-channel").scale_shape(6, 256) == (6, 1)
    assert spec("int4-g64").scale_shape(6, 256) == (6, 4)
    assert spec("nvfp4").scale_shape(6, 256) == (6, 16)
    assert spec("fp8-b128").scale_shape(300, 256) == (3, 2)
    assert spec("fp8-b128").block_structure == (128, 128)
    assert spec("int4-g64").block_structure is None
    with pytest.raises(FormatError, match="128 does not divide 300"):
        spec("fp8-b128").scale_shape(256, 300)
    with pytest.raises(FormatError, match="no tokens"):
        spec("int8-token").scale_shape(6, 256)
