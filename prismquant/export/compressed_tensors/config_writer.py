"""Writes the ``quantization_config`` of a plan, and our own section beside it.

The rules that readers (vLLM, transformers with the compressed-tensors library) enforce, and that
are kept here:

- ``quantization_config`` sits at the top level of ``config.json``; inside a group only known keys
  are allowed, and every group says its own ``format``.
- Targets and ignores are explicit module paths, disjoint, never overlapping patterns: the readers
  order overlapping patterns differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from prismquant.errors import FormatError
from prismquant.export.compressed_tensors.kv_section import kv_cache_scheme
from prismquant.export.compressed_tensors.layer_edits import transform_name
from prismquant.export.compressed_tensors.plain_config import untied_config, without_sections
from prismquant.export.compressed_tensors.private_section import INPUT, OUTPUT
from prismquant.formats.packed import is_declarable
from prismquant.formats.quantization_args import args_of
from prismquant.formats.section import CONFIG_KEY, METHOD, PRIVATE_KEY, ROTATED_AT
from prismquant.formats.spec import NumberSpec
from prismquant.models.arch import SiteKind
from prismquant.models.bound import BoundModel, BoundSite
from prismquant.models.rotated_towers import untied
from prismquant.numerics.hadamard import power_of_two_block
from prismquant.opening import read_json
from prismquant.plan.bit_layout import DENSE
from prismquant.plan.kv_plan import KVPlan
from prismquant.plan.plan import Plan

# The version of the configuration's grammar that is written; older readers know it too.
CONFIG_VERSION = "0.17.0"
_KEY_ROTATION = "key_rotation"

_Key = tuple[NumberSpec | None, NumberSpec | None, NumberSpec | None, str]


def written_config(plan: Plan, bound: BoundModel) -> dict[str, Any]:
    """The ``config.json`` of a plan's checkpoint.

    It is the source's, with a ``quantization_config`` and our own section. Where one part of it
    describes the model, transformers loads that part by itself and looks into no other: it has the
    section as well, with module paths.
    """
    part = bound.arch.config_part
    # A section of the source is of weights that are in floating point here, or was left behind.
    config = without_sections(read_json(bound.folder / "config.json"), part)
    tied = bound.tied and not untied(bound, plan.towers)
    if bound.config.tie_word_embeddings and not tied:
        config = untied_config(config, part)
    if section := quantization_config(plan, bound, partial(_called, bound)):
        config[CONFIG_KEY] = section
    if part in config and (section := quantization_config(plan, bound, str)):
        config[part] |= {CONFIG_KEY: section}
    return config | _private_section(plan, bound)


def quantization_config(
    plan: Plan, bound: BoundModel, called: Callable[[str], str]
) -> dict[str, Any] | None:
    """The ``quantization_config`` of a plan; None where there is nothing to say.

    A rotation at run time, or a quantized key-value cache, is declared even where no layer is
    stored quantized.

    Args:
        plan: What is stored.
        bound: The model.
        called: From a layer's module path to what the configuration calls it.
    """
    schemes: dict[_Key, list[str]] = {}
    for row in plan.quantized:
        if row.layout != DENSE:
            sides = [spec if spec and is_declarable(spec) else None for spec in row.config.sides]
            key = (row.config.weights, sides[0], sides[1], row.layout)
            names = schemes.setdefault(key, [])
            names += [called(row.site.name), *_looked_up(bound, row.site.name)]
    transforms = _transform_config(plan, bound)
    kv_cache = plan.kv_cache.spec if plan.kv_cache else None
    if not schemes and not transforms and kv_cache is None:
        return None
    groups = {
        f"group_{number}": {
            "targets": sorted(set(names)),
            "format": layout,
            "weights": args_of(weights),
            "input_activations": args_of(activations),
            "output_activations": args_of(outputs),
        }
        for number, ((weights, activations, outputs, layout), names) in enumerate(schemes.items())
    }
    layouts = {group["format"] for group in groups.values()} or {DENSE}
    quantized = {name for names in schemes.values() for name in names}
    linears = {one for name in _linears(bound) for one in (called(name), *_looked_up(bound, name))}
    return {
        "quant_method": METHOD,
        "version": CONFIG_VERSION,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": sorted((linears | _carried(bound)) - quantized),
        "kv_cache_scheme": kv_cache_scheme(kv_cache),
        "sparsity_config": {},
        "transform_config": transforms,
        "config_groups": groups,
    }


def _called(bound: BoundModel, module_name: str) -> str:
    """Name or pattern by which a configuration calls a layer."""
    name = bound.names.in_config(module_name)
    return name if bound.arch.vllm is None else bound.arch.vllm.target(name)


def _looked_up(bound: BoundModel, module_name: str) -> tuple[str, ...]:
    """Names by which vLLM looks a layer up beside its own."""
    return () if bound.arch.vllm is None else bound.arch.vllm.looked_up(module_name)


def _linears(bound: BoundModel) -> list[str]:
    sites = [site.name for site in bound.sites if site.kind is SiteKind.LINEAR]
    # A bare parameter that is left alone is no module, which readers could ignore.
    alone = [x.name for x in bound.left_alone if f"{x.name}.weight" in bound.shapes]
    return [*sites, *alone]


def _carried(bound: BoundModel) -> set[str]:
    """Layers that only some readers have, such as those that draft tokens; by names on disk."""
    matrices = (name for name, shape in bound.carried.items() if len(shape) > 1)
    return {name.removesuffix(".weight") for name in matrices if name.endswith(".weight")}


def _transform_config(plan: Plan, bound: BoundModel) -> dict[str, Any]:
    """Rotations at run time, as the ``hadamard`` transforms of compressed-tensors.

    Unlike those of schemes, targets of transforms are compared with a reader's own module paths,
    which begin differently in each: hence patterns for the end of the path.
    """
    blocks: dict[int, list[str]] = {}
    for row in plan.rows:
        if row.online is not None:
            target = _path_ending(bound, row.site)
            blocks.setdefault(row.online.block, []).append(target)
    keys = _key_rotation(plan.kv_cache)
    if not blocks and not keys:
        return {}
    return {
        "config_groups": keys
        | {
            transform_name(block): {
                "type": "hadamard",
                "head_dim": block,
                "randomize": False,
                "requires_grad": False,
                "apply": [
                    {"targets": sorted(names), "location": "input", "inverse": False, "ignore": []}
                ],
            }
            for block, names in blocks.items()
        }
    }


def _path_ending(bound: BoundModel, site: BoundSite) -> str:
    """A pattern for one layer that holds whatever a reader puts before the tower's blocks."""
    parts = site.name.split(".")
    blocks = next(
        tower.blocks
        for tower in bound.arch.towers
        if tower.blocks and f"{tower.blocks}." in site.name
    )
    ending = ".".join(parts[blocks.count(".") :])
    alike = [other.name for other in bound.sites if f".{other.name}".endswith(f".{ending}")]
    if len(alike) > 1:
        raise FormatError(
            f"{alike} end alike: the configuration cannot tell their rotations apart",
            where=site.name,
            remedy="rotate only one of the two towers online",
        )
    return f"re:(.*[.])?{re.escape(ending)}$"


def _key_rotation(plan: KVPlan | None) -> dict[str, Any]:
    """The group of ``transform_config`` that tells of rotated queries and keys; none: empty."""
    if plan is None or not plan.spec.rotated:
        return {}
    targets = [_attention_pattern(layer.attention) for layer in plan.layers]
    apply = {"targets": targets, "inverse": False, "ignore": []}
    return {
        _KEY_ROTATION: {
            "type": "hadamard",
            "head_dim": power_of_two_block(plan.layers[0].head_dim),
            "randomize": False,
            "requires_grad": False,
            "apply": [apply | {"location": location} for location in ROTATED_AT],
        }
    }


def _attention_pattern(path: str) -> str:
    """For the language model's attention module at ``<..>.language_model.layers.0.self_attn``.

    Readers put different names before and behind the tower's; the vision tower's blocks may end
    alike.
    """
    tower, *block = path.split(".")[-4:]
    return f"re:(.*[.])?{tower}[.](.*[.])?{'[.]'.join(block)}$"


def _private_section(plan: Plan, bound: BoundModel) -> dict[str, Any]:
    """Our own section, for what the configuration cannot say; empty where there is nothing."""
    found: dict[str, dict[str, Any]] = {}
    for row in plan.quantized:
        for side, spec in ((INPUT, row.config.activations), (OUTPUT, row.config.outputs)):
            if spec is not None and (row.stored_dense or not _says_all(spec)):
                found.setdefault(bound.names.in_config(row.site.name), {})[side] = spec.to_dict()
    return {PRIVATE_KEY: {"activations": found}} if found else {}


def _says_all(spec: NumberSpec) -> bool:
    """True if a reader of the configuration quantizes exactly as we do."""
    rounded_otherwise = spec.dynamic and spec.scale.startswith("e8m0-")
    return is_declarable(spec) and not spec.narrow and not rounded_otherwise
