"""Additions of a call to a recipe: options of the command line, arguments in Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from prismquant.algorithms.methods import SOLVERS
from prismquant.arguments import MAX_BATCH, MAX_SAMPLES, as_choice, as_count, as_flag
from prismquant.recipe.layer_config import OnFailure
from prismquant.recipe.schema import MAX_DEVICES, Recipe


def adapted(
    recipe: Recipe,
    *,
    kv_cache: str | Mapping[str, Any] | None = None,
    fallback: bool = False,
    on_failure: str | None = None,
    tensor_parallel: int | None = None,
    solver: str | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
) -> Recipe:
    """A recipe with what a call adds to it; None leaves it as it is.

    Args:
        recipe: The recipe.
        kv_cache: A format of keys and values, or ``none``.
        fallback: Where a format cannot hold a layer, take the nearest.
        on_failure: What to do where a solver fails: ``stop``, or ``rtn``.
        tensor_parallel: Devices that will share each layer.
        solver: The method for every layer: ``rtn`` or ``gptq``.
        samples: At most so many calibration samples.
        batch_size: Samples run together.

    Raises:
        ArgumentError: A value is none of those that there are.
        RecipeError: The cache's format is unknown.
    """
    if kv_cache is not None:
        recipe = recipe.with_kv_cache(kv_cache)
    if as_flag(fallback, "fallback"):
        recipe = recipe.with_rules({"fallback": "nearest"})
    if on_failure is not None:
        choice = as_choice(on_failure, "on_failure", get_args(OnFailure))
        recipe = recipe.with_rules({"on_failure": choice})
    if tensor_parallel is not None:
        devices = as_count(tensor_parallel, "tensor_parallel", most=MAX_DEVICES)
        recipe = recipe.with_tensor_parallel(devices)
    if solver is not None:
        method = as_choice(solver, "solver", SOLVERS)
        recipe = recipe.with_rules({"solver": method}, name=f"{recipe.name}-{method}")
    counts = {}
    if samples is not None:
        counts["samples"] = as_count(samples, "samples", most=MAX_SAMPLES)
    if batch_size is not None:
        counts["batch_size"] = as_count(batch_size, "batch_size", most=MAX_BATCH)
    return recipe.with_calibration(**counts) if counts else recipe


def why_unpredicted(before: Recipe, after: Recipe) -> str:
    """The reason why a search's prediction does not hold with what a call adds to the recipe.

    Args:
        before: The recipe.
        after: What :func:`adapted` made of it.

    Returns:
        The reason; empty where the prediction holds or there is none.
    """
    if before.predicted is None:
        return ""
    added = [rule.solver for rule in after.rules[len(before.rules) :] if rule.solver]
    had = sorted({rule.solver for rule in before.rules if rule.solver})
    if added and had != added:
        return f"it is of {', '.join(had)}, and {added[-1]} was asked for"
    if before.kv_cache != after.kv_cache:
        return "it is of the recipe's own key-value cache, and another was asked for"
    return ""
