"""Recipes in other tools' words: nothing is lost unseen, and reading them again gives the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny_text
from documented_recipes import EXAMPLES
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from read_again import configs, read_back, scaled_edges

from prismquant.errors import RecipeError
from prismquant.models.bind import bind
from prismquant.recipe.exporters import export_recipe as written_scope_of
from prismquant.recipe.exporters.export_recipe import WRITERS, export_recipe
from prismquant.recipe.importers.import_recipe import import_recipe
from prismquant.recipe.importers.modelopt_presets import PRESETS
from prismquant.recipe.importers.scheme_presets import SCHEMES
from prismquant.recipe.presets import NAMED
from prismquant.recipe.schema import Recipe, load_recipe, parse_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prismquant.models.bound import BoundModel
    from prismquant.recipe.exporters.foreign_recipe import ForeignRecipe


class Models(dict[str, "BoundModel"]):
    """Models by family; their words would fill pages of a failed test."""

    def __repr__(self) -> str:
        return "models"


@pytest.fixture(scope="module")
def models(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Small models of four families, bound."""
    llama = tiny_text.build("llama", tmp_path_factory.mktemp("llama"))
    families = ("qwen2_vl", "qwen3_vl", "video_llama_3")
    return Models({name: bind(tiny(name)) for name in families} | {"llama": bind(llama)})


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at few blocks of models of unknown depth: those here have two."""
    monkeypatch.setattr(written_scope_of, "ANY_DEPTH", 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


def first_of(recipe: Recipe) -> Recipe:
    return recipe.chosen(recipe.choose[0].name) if recipe.choose else recipe


def check_nothing_is_lost(recipe: Recipe, exported: ForeignRecipe) -> None:
    """Every word of a recipe stands in one of the lists."""
    places = {
        one.place.removesuffix(" (default)")
        for part in (exported.written, exported.changed, exported.dropped)
        for one in part
    }

    def stands(place: str) -> bool:
        return any(one == place or one.startswith(f"{place}.") for one in places)

    for index, rule in enumerate(recipe.rules):
        for field in rule.model_fields_set:
            place = f"rules[{index}].{field}"
            assert stands(place), (place, places)
            keys = getattr(rule, field) if field.endswith("options") else ()
            for key in keys if place not in places else ():
                assert stands(f"{place}.{key}"), (place, key, places)
    for index, _ in enumerate(recipe.transforms):
        assert stands(f"transforms[{index}]"), (index, places)
    for name in recipe.calibration.model_fields_set:
        assert stands(f"calibration.{name}"), name
    if recipe.kv_cache is not None:
        assert stands("kv_cache")


def check_same_where_nothing_is_told(
    recipe: Recipe, exported: ForeignRecipe, models: Models, folder: Path
) -> None:
    """Where nothing of the layers is changed or dropped, reading gives the same for each layer."""
    told = [one for one in (*exported.changed, *exported.dropped) if one.place.startswith("rules")]
    if told:
        return
    back = read_back(exported, folder)
    for name, model in models.items():
        assert configs(back, model) == configs(recipe, model), name


_REFUSALS = ("nothing of the recipe", "parts of names", "the recipe quantizes no layer")


def written(recipe: Recipe, dialect: str, *reasons: str) -> ForeignRecipe | None:
    """The recipe in a dialect's words; None where it is refused for one of some reasons."""
    try:
        return export_recipe(recipe, dialect)
    except RecipeError as error:
        if not any(reason in str(error) for reason in (*reasons, *_REFUSALS)):
            raise
        return None


# Every preset


@pytest.mark.parametrize("dialect", WRITERS)
@pytest.mark.parametrize("preset", NAMED)
def test_every_preset_is_written_and_read_again_or_refused_with_reasons(
    preset: str, dialect: str, models: Models, folder: Path
) -> None:
    recipe = load_recipe(preset)
    exported = written(recipe, dialect)
    if exported is None:
        assert dialect in ("mquant", "mi-optimize")
        assert "fp" in preset or "mx" in preset
        return
    check_nothing_is_lost(recipe, exported)
    check_same_where_nothing_is_told(first_of(recipe), exported, models, folder)
    back = read_back(exported, folder)
    assert any(any(configs(back, model).values()) for model in models.values())


# Any recipe

WEIGHTS = (
    *("int4-g128", "int4-channel", "int4-channel-narrow", "int8-channel", "int8-channel-narrow"),
    *("int3-g64-asym", "int8-tensor", "int6-channel-asym", "fp8-channel", "fp8-b128", "fp8-tensor"),
    *("fp8-e5m2-channel", "fp4-g16", "nvfp4", "mxfp4", "mxfp4-ceil", "mxfp8-ceil", "mxfp6"),
    *("mxfp6-e3m2", "mxint8", "mxint8-ceil"),
)
INPUTS = (
    *("none", "int8-token", "int8-token-narrow", "int8-token-asym", "int8-tensor", "fp8-token"),
    *("int8-tensor-narrow", "int8-g64-dyn", "int8-g64-narrow-dyn", "fp8-tensor", "fp8-g128-dyn"),
    *("nvfp4-dyn", "mxfp8-ceil-dyn", "mxfp4-dyn", "mxint8-dyn"),
)
NAMES = ("*.layers.0.*", "*mlp*", r"re:.*\.1\..*", "*.q_proj", "lm_head", "*visual*", "*nowhere*")
ROLES = ("attn", "mlp", "attn.qkv", "mlp.down", "lm_head", "patch_embed", "projector")
RANGES = (
    "minmax",
    "mse",
    "percentile",
    {"kind": "mse", "max_shrink": 0.5, "steps": 10, "norm": 2.0, "signed_scale": False},
    {"kind": "mse", "max_shrink": 0.8, "steps": 80, "norm": 2.4, "signed_scale": False},
    {"kind": "mse", "max_shrink": 0.37, "steps": 23, "norm": 2.0, "signed_scale": False},
)
SOLVERS: tuple[dict[str, Any], ...] = (
    {},
    {"solver": "rtn"},
    {"solver": "rtn", "options": {"scale_weighting": "none"}},
    {"solver": "gptq"},
    {
        "solver": "gptq",
        "options": {
            "damping": 0.02,
            "damping_basis": "mean",
            "order": "activation",
            "scale_weighting": "none",
            "refine_passes": 0,
        },
    },
    {
        "solver": "gptq",
        "options": {
            "damping": 0,
            "order": "original",
            "scale_weighting": "none",
            "refine_passes": 0,
            "block_size": 64,
        },
    },
    {"correction": "auto"},
    {"tuner": "autoround", "tuner_options": {"iterations": 3}},
    {"vision_weight": 0.5},
    {"on_failure": "rtn", "fallback": "nearest"},
)
MATCHES = st.fixed_dictionaries(
    {},
    optional={
        "modality": st.lists(
            st.sampled_from(("vision", "projector", "llm")), min_size=1, max_size=3, unique=True
        ),
        "role": st.lists(st.sampled_from(ROLES), min_size=1, max_size=2, unique=True),
        "name": st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True),
    },
)
TRANSFORMS: tuple[dict[str, Any], ...] = (
    {"name": "smoothquant"},
    {"name": "smoothquant", "match": {"modality": "llm", "role": ["attn.qkv"]}},
    {"name": "smoothquant", "options": {"alpha": 0.7}},
    {"name": "awq"},
    {"name": "awq", "match": {"role": "mlp"}, "options": {"grid": 10, "duo": False}},
    {"name": "rotation", "match": {"modality": "llm"}},
    {"name": "rotation", "options": {"online": True, "signs": False}},
    {"name": "rotation", "match": {"modality": "vision"}, "options": {"kind": "random"}},
    {"name": "split", "match": {"role": "mlp.down"}},
)


@st.composite
def rules(draw: st.DrawFn, weights: tuple[str, ...], inputs: tuple[str, ...]) -> dict[str, Any]:
    """A rule of any kind."""
    rule: dict[str, Any] = {"match": draw(MATCHES), "optional": True}
    if draw(st.booleans()):
        rule["weights"] = draw(st.sampled_from(weights))
    elif draw(st.booleans()):
        rule["skip"] = draw(st.booleans())
    if draw(st.booleans()):
        rule["activations"] = draw(st.sampled_from(inputs))
    if draw(st.booleans()):
        rule["weight_range"] = draw(st.sampled_from(RANGES))
    rule |= draw(st.sampled_from(SOLVERS))
    return rule


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """A recipe of any kind, whose rules may not go together."""
    first = {"weights": draw(st.sampled_from(WEIGHTS)), "match": draw(MATCHES), "optional": True}
    body: dict[str, Any] = {
        "rules": [first, *draw(st.lists(rules(WEIGHTS, INPUTS), max_size=3))],
        "transforms": draw(st.lists(st.sampled_from(TRANSFORMS), max_size=2)),
    }
    if draw(st.booleans()):
        body["kv_cache"] = draw(st.sampled_from(("fp8", "int8", "fp8-head", "int4-head-rotated")))
    if draw(st.booleans()):
        body["calibration"] = {"samples": 16, "seed": 7, "quantized_inputs": draw(st.booleans())}
    try:
        return parse_recipe(body, source="drawn")
    except RecipeError:
        assume(False)
        raise


@pytest.mark.parametrize("dialect", WRITERS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes())
def test_no_word_of_any_recipe_is_lost(
    dialect: str, recipe: Recipe, models: Models, folder: Path
) -> None:
    # The rules of a layer may not go together.
    exported = written(recipe, dialect, "set by rules")
    if exported is None:
        return
    check_nothing_is_lost(recipe, exported)
    check_same_where_nothing_is_told(recipe, exported, models, folder)
    read_back(exported, folder)


# Recipes of what both can say

SAYABLE: dict[str, dict[str, Any]] = {
    "llm-compressor": {
        "weights": (
            *("int4-g128", "int8-channel", "int3-g64-asym", "fp8-channel", "fp8-b128"),
            *("fp8-tensor", "nvfp4", "mxfp4", "mxfp8", "mxfp6", "int8-tensor", "fp4-g16"),
        ),
        "inputs": (
            *("none", "int8-token", "int8-tensor", "int8-token-asym", "fp8-token"),
            *("int8-g64-dyn", "fp8-g128-dyn", "nvfp4-dyn", "mxfp8-ceil-dyn", "mxfp4-dyn"),
        ),
        "ranges": ("minmax", *RANGES[3:]),
        "orders": ("activation", "original"),
        "names": NAMES,
        "solvers": ("rtn", "gptq"),
    },
    "modelopt": {
        "weights": (
            *("int4-g128-narrow", "int8-channel-narrow", "fp8-channel", "fp8-b128"),
            *("fp8-tensor", "nvfp4", "mxfp4-ceil", "mxfp6-e3m2-ceil", "mxint8-ceil"),
        ),
        "inputs": (
            *("none", "int8-token-narrow", "int8-tensor-narrow", "fp8-token"),
            *("nvfp4-dyn", "mxfp8-ceil-dyn", "mxint8-ceil-dyn"),
        ),
        "ranges": ("minmax",),
        "orders": ("original",),
        "names": NAMES,
        "solvers": ("rtn", "gptq"),
    },
}


@st.composite
def sayable(draw: st.DrawFn, dialect: str) -> Recipe:
    """A recipe of which a dialect can say every word."""
    known = SAYABLE[dialect]
    solver = draw(st.sampled_from(known["solvers"]))

    def method() -> dict[str, Any]:
        if solver == "rtn":
            return {"solver": "rtn", "options": {"scale_weighting": "none"}}
        damping = 0.02 if dialect == "modelopt" else draw(st.sampled_from((0.02, 0.5)))
        order = draw(st.sampled_from(known["orders"]))
        theirs = {"damping": damping, "damping_basis": "mean", "refine_passes": 0}
        return {"solver": "gptq", "options": theirs | {"order": order, "scale_weighting": "none"}}

    def numbers() -> dict[str, Any]:
        return {
            "weights": draw(st.sampled_from(known["weights"])),
            "activations": draw(st.sampled_from(known["inputs"])),
            "weight_range": draw(st.sampled_from(known["ranges"])),
        }

    drawn = [{"match": draw(MATCHES), "optional": True} | numbers() | method()]
    for _ in range(draw(st.integers(0, 3))):
        rule: dict[str, Any] = {"match": draw(MATCHES), "optional": True}
        more = st.sampled_from(({"skip": True}, numbers() | method(), {"activations": "none"}))
        drawn.append(rule | draw(more))
    theirs = {"layer_sequential": False, "quantized_inputs": False}
    theirs["block_sequential"] = solver == "gptq" and dialect == "llm-compressor"
    return parse_recipe({"rules": drawn, "calibration": theirs}, source="drawn")


@st.composite
def sayable_of_language(draw: st.DrawFn) -> Recipe:
    """A recipe of which MI-optimize can say every word: one setting, and layers left alone."""
    method = draw(st.sampled_from(("rtn", "gptq", "clip")))
    rule: dict[str, Any] = {"match": {"modality": "llm"}, "weight_range": "minmax"}
    if method == "gptq":
        options = {"damping": draw(st.sampled_from((0.02, 0.5))), "damping_basis": "mean"}
        options |= {"order": draw(st.sampled_from(("activation", "original")))}
        options |= {"refine_passes": 0, "scale_weighting": "none", "block_size": 64}
        rule |= {"solver": "gptq", "options": options}
        rule["weights"] = draw(st.sampled_from(("int4-g128-asym", "int3-channel-asym")))
    else:
        weights = ("int4-g128-narrow", "int8-channel-narrow", "int4-channel-asym")
        rule |= {"solver": "rtn", "weights": draw(st.sampled_from(weights))}
    if method == "clip":
        rule |= {"options": {"scale_weighting": "group"}, "weight_range": RANGES[3]}
    if method == "rtn":
        inputs = ("none", "int8-token-narrow", "int8-token-asym", "int8-tensor-narrow")
        rule["activations"] = draw(st.sampled_from((*inputs, "int8-g64-narrow-dyn")))
    calibration = {"samples": 16, "seed": 3, "quantized_inputs": True}
    calibration |= {"layer_sequential": draw(st.booleans()), "block_sequential": False}
    left = draw(st.lists(MATCHES, max_size=2))
    skipped = [{"match": match, "skip": True, "optional": True} for match in left]
    return parse_recipe({"rules": [rule, *skipped], "calibration": calibration}, source="drawn")


@st.composite
def sayable_of_sides(draw: st.DrawFn) -> Recipe:
    """A recipe of which MQuant can say every word: two settings, and layers left alone."""
    asym, order = draw(st.booleans()), draw(st.sampled_from(("activation", "original")))
    size = draw(st.sampled_from(("channel", "g128")))
    token = f"token-{draw(st.sampled_from(('narrow', 'asym')))}"

    def side() -> dict[str, Any]:
        rtn, clip = draw(st.booleans()), draw(st.booleans())
        ending = "-asym" if asym else "" if clip else "-narrow"
        unit = "channel" if rtn else size
        bits = draw(st.sampled_from((3, 4, 8)))
        rule: dict[str, Any] = {"weights": f"int{bits}-{unit}{ending}"}
        rule["weight_range"] = RANGES[4] if clip else "minmax"
        rule["activations"] = draw(st.sampled_from(("none", f"int8-{token}", "int8-tensor")))
        if rtn:
            return rule | {"solver": "rtn", "options": {"scale_weighting": "none"}}
        options = {"damping": 0.02, "damping_basis": "mean", "order": order}
        options |= {"refine_passes": 0, "scale_weighting": "none"}
        return rule | {"solver": "gptq", "options": options}

    parts = draw(st.sampled_from((["vision"], ["projector"], ["vision", "projector"], [])))
    drawn: list[dict[str, Any]] = []
    if parts:
        patch = {"match": {"role": "patch_embed"}, "activations": "none", "optional": True}
        drawn += [{"match": {"modality": parts}} | side(), patch]
    if not parts or draw(st.booleans()):
        drawn.append({"match": {"modality": "llm", "role": ["attn", "mlp"]}} | side())
    left = draw(st.lists(MATCHES, max_size=2))
    drawn += [{"match": match, "skip": True, "optional": True} for match in left]
    calibration = {"samples": 16, "seed": 3, "quantized_inputs": False}
    return parse_recipe({"rules": drawn, "calibration": calibration}, source="drawn")


@pytest.mark.parametrize("dialect", WRITERS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_both_can_say_is_the_same_after_a_round_trip(
    dialect: str, data: st.DataObject, models: Models, folder: Path
) -> None:
    own = {"mi-optimize": sayable_of_language(), "mquant": sayable_of_sides()}
    recipe = data.draw(own[dialect] if dialect in own else sayable(dialect))
    exported = written(recipe, dialect)
    if exported is None:
        return
    unmeant = [one for one in exported.dropped if "means no layer of" in one.why]
    assert not exported.changed
    assert len(exported.dropped) == len(unmeant)
    back = read_back(exported, folder)
    for name, model in models.items():
        assert configs(back, model) == configs(recipe, model), name
    if any(configs(recipe, model) for model in models.values()) and exported.written:
        check_calibration(recipe, back, exported)


def check_calibration(recipe: Recipe, back: Recipe, exported: ForeignRecipe) -> None:
    """What stands of the calibration among what is written is the same again."""
    for one in exported.written:
        name = one.place.removeprefix("calibration.")
        if name in recipe.calibration.model_fields_set and one.theirs:
            assert getattr(back.calibration, name) == getattr(recipe.calibration, name), name


# Other tools' own recipes


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_honoured_of_a_documented_recipe_is_kept_on_the_way_back(
    name: str, tiny: Callable[..., Path], folder: Path
) -> None:
    family, content = EXAMPLES[name]
    imported = import_recipe(content)
    model = bind(tiny(family))
    # Arguments of a call, which no recipe of these tools says.
    elsewhere = ("samples", "batch_size") if imported.dialect == "llm-compressor" else ()
    # Without a model the recipe is for all families, of which some fuse what an edge starts at.
    fused = {"transforms[0].match"}
    for exported, spared in (
        (export_recipe(imported, imported.dialect), fused),
        (export_recipe(imported, imported.dialect, model=tiny(family)), set()),
    ):
        back = read_back(exported, folder)
        dropped = {one.place for one in exported.dropped}
        assert dropped <= {f"calibration.{field}" for field in elsewhere} | spared
        changed = [one.place for one in exported.changed if one.place.startswith("rules")]
        # A last group that is cut off is not taken on either way.
        assert all(place.endswith("fallback") for place in changed), changed
        assert configs(back, model) == configs(imported.recipe, model)
        assert scaled_edges(back, model) == scaled_edges(imported.recipe, model)
        assert back.kv_cache == imported.recipe.kv_cache
        for field in imported.recipe.calibration.model_fields_set - {*elsewhere}:
            ours = getattr(imported.recipe.calibration, field)
            assert getattr(back.calibration, field) == ours, field


def foreign() -> dict[str, Any]:
    """Schemes and configurations that tools know by name, as recipes."""
    found: dict[str, Any] = {}
    for name in SCHEMES:
        for modifier in ("QuantizationModifier", "GPTQModifier"):
            body = {"scheme": name, "targets": ["Linear"], "ignore": ["lm_head", "re:.*visual.*"]}
            found[f"{modifier} {name}"] = {"quant_stage": {"quant_modifiers": {modifier: body}}}
    return found | {name: name for name in PRESETS}


FOREIGN = foreign()


@pytest.mark.parametrize("name", FOREIGN)
def test_named_schemes_and_configurations_come_back_as_they_were(
    name: str, models: Models, folder: Path
) -> None:
    try:
        imported = import_recipe(FOREIGN[name])
    except RecipeError:
        # Refused on the way in, with its reasons.
        return
    exported = written(imported.recipe, imported.dialect)
    if exported is None:
        assert name == "NVFP4_EXPERTS_ONLY_CFG"
        return
    # Experts and mixers, which no family here has.
    told = [one for one in exported.dropped if "means no layer of" not in one.why]
    told += exported.changed
    assert not [one for one in told if one.place.startswith(("rules", "kv_cache"))], told
    back = read_back(exported, folder)
    for model in models.values():
        assert configs(back, model) == configs(imported.recipe, model)
        assert scaled_edges(back, model) == scaled_edges(imported.recipe, model)
    assert back.kv_cache == imported.recipe.kv_cache


MOVED: dict[str, dict[str, Any]] = {
    "queries, keys, values": {"modality": "llm", "role": "attn.qkv"},
    "what the tool finds": {"modality": "llm", "role": ["attn.qkv", "mlp.gate", "mlp.up"]},
    "the last layers": {"modality": "llm", "role": "mlp.down"},
    "a vision tower": {"modality": "vision", "role": ["attn.qkv", "mlp.up"]},
    "all MLPs": {"role": "mlp"},
}


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
@pytest.mark.parametrize("name", MOVED)
def test_edges_are_named_by_both_their_ends(
    name: str, method: str, models: Models, folder: Path
) -> None:
    match = MOVED[name]
    transform = {"name": method, "match": match}
    options = {"alpha": 0.7} if method == "smoothquant" else {"grid": 20, "duo": True}
    recipe = load_recipe("w8a8-all").with_transforms(transform | {"options": options})
    for model in (None, *models):
        at = {} if model is None else {"model": models[model].folder}
        exported = export_recipe(recipe, "llm-compressor", **at)
        back = read_back(exported, folder)
        for one in models if model is None else [model]:
            found, wanted = (scaled_edges(this, models[one]) for this in (back, recipe))
            # Of a model that has no such edge it may be left out.
            assert found == wanted or not any(edges for _, edges in wanted), one


def test_edges_that_cannot_be_named_are_told(models: Models) -> None:
    exported = export_recipe("w8a8-static-all", "llm-compressor", models["qwen2_vl"].folder)
    told = {one.value: one.why for one in exported.dropped if one.place == "transforms[0].match"}
    qkv, out = (f"model.visual.blocks.*.attn.{name}" for name in ("qkv", "proj"))
    assert "a part of a fused layer" in told[f"{qkv} -> {out}"]
    assert any("feed several columns" in why for why in told.values())
    assert any("several heads share" in why for why in told.values())


# Bounds of the tools


LANGUAGE = {"modality": "llm", "role": ["attn", "mlp"]}
TOLD_OF_MODELOPT: dict[str, tuple[dict[str, Any], str]] = {
    "smoothquant": ({"weights": "int8-channel", "activations": "int8-token"}, "static int8 inputs"),
    "awq": ({"weights": "int4-g128", "activations": "int8-token"}, "a scale for each token"),
}


@pytest.mark.parametrize("name", TOLD_OF_MODELOPT)
def test_what_modelopt_stumbles_over_is_left_out(name: str) -> None:
    fields, why = TOLD_OF_MODELOPT[name]
    rule = {"match": LANGUAGE, "solver": "rtn"} | fields
    recipe = parse_recipe({"rules": [rule], "transforms": [{"name": name}]}, source="made")
    exported = export_recipe(recipe, "modelopt")
    assert f"'{name}" not in exported.text
    [told] = [one for one in exported.dropped if one.place == "transforms[0]"]
    assert why in told.why
    rule["activations"] = "int8-tensor"
    again = parse_recipe({"rules": [rule], "transforms": [{"name": name}]}, source="made")
    assert f"'{name}" in export_recipe(again, "modelopt").text


def test_inputs_and_numbers_that_a_tool_lacks_become_the_nearest_or_are_left_out() -> None:
    rule = {"match": LANGUAGE, "solver": "rtn", "weights": "int8-channel-narrow"}
    recipe = parse_recipe({"rules": [rule | {"activations": "int8-g64-narrow-dyn"}]}, source="made")
    exported = export_recipe(recipe, "modelopt")
    assert "'block_sizes': {-1: None}" in exported.text
    assert [one.place for one in exported.changed] == ["rules[0].activations"]
    for weights, nearest in (("fp4-g16", "nvfp4"), ("fp8-e5m2-channel", "mxfp8")):
        mixed = {"match": {"role": "mlp.down"}, "weights": weights}
        exported = export_recipe(parse_recipe({"rules": [rule, mixed]}, source="m"), "modelopt")
        [told] = [one for one in exported.dropped if one.place == "rules[1].weights"]
        assert told.nearest == nearest


def test_a_choice_is_written_with_its_first_alternative_and_told(models: Models) -> None:
    exported = export_recipe("auto-w8a8", "llm-compressor", models["llama"].folder)
    assert "SmoothQuantModifier" in exported.text
    [told] = [one for one in exported.dropped if one.place == "choose"]
    assert "this is the first, smoothquant" in told.why
    assert any(one.place == "choose[0].transforms[0]" for one in exported.changed)


def test_a_list_of_names_says_which_mean_nothing() -> None:
    match = {"name": ["*.layers.0.*", "*.nowhere.*"]}
    recipe = parse_recipe({"rules": [{"match": match, "weights": "int8-channel"}]}, source="made")
    [told] = [one for one in export_recipe(recipe, "modelopt").dropped if "match" in one.place]
    assert "*.nowhere.*" in told.value
    assert told.nearest == "--model"


@pytest.mark.parametrize("dialect", WRITERS)
def test_what_the_recipe_says_of_blocks_dampings_and_strengths_is_written(dialect: str) -> None:
    options = {"block_size": 48, "damping": 0.25, "damping_basis": "mean", "refine_passes": 0}
    rule = {"match": LANGUAGE, "weights": "int4-g32", "solver": "gptq", "options": options}
    smoothed = {"name": "smoothquant", "options": {"alpha": 0.35}}
    recipe = parse_recipe({"rules": [rule], "transforms": [smoothed]}, source="made")
    text = export_recipe(recipe, dialect).text
    assert "0.25" in text
    assert ("0.35" in text) == (dialect in ("llm-compressor", "mi-optimize"))
    assert ("48" in text) == (dialect != "mquant")


def test_parts_of_names_are_told_where_the_released_code_misreads_them(models: Models) -> None:
    head = {"match": {"name": "*.layers.0.*", "modality": "llm"}, "skip": True}
    for solver, misread in (("gptq", True), ("rtn", False)):
        rule = {"match": LANGUAGE, "weights": "int4-channel-narrow", "solver": solver}
        recipe = parse_recipe({"rules": [rule, head]}, source="made")
        exported = export_recipe(recipe, "mquant", models["qwen2_vl"].folder)
        assert exported.text.endswith("--skip_names layers.0.\n")
        assert any("reads --skip_names wrongly" in one for one in exported.guessed) == misread


@pytest.mark.parametrize(("family", "breaks"), [("qwen2_vl", True), ("llama", False)])
def test_a_rotated_stream_is_told_of_models_that_see(
    family: str, breaks: bool, tiny: Callable[..., Path]
) -> None:
    """llm-compressor's own mappings rotate the embeddings, and not what a projector adds."""
    rules = [{"match": LANGUAGE, "weights": "int8-channel", "solver": "rtn"}]
    rotation = {"name": "rotation", "match": {"modality": "llm"}}
    recipe = parse_recipe({"version": 1, "rules": rules, "transforms": [rotation]}, source="r")
    found = export_recipe(recipe, "llm-compressor", tiny(family))
    said = [one.why for one in found.changed if one.place.startswith("transforms[0]")]
    assert any("a projector adds" in why for why in said) == breaks
