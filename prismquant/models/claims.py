"""Claims on each parameter of a model: a site, or a reason to leave it alone."""

from __future__ import annotations

import fnmatch
import re

from torch import nn

from prismquant.models.arch import ArchSpec
from prismquant.models.bound import LeftAlone
from prismquant.models.misfits import Misfits, kind_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EMBEDDING = "embedding: a look-up, not a matrix product"


def claim_parameters(
    arch: ArchSpec, model: nn.Module, sites: set[str], misfits: Misfits
) -> tuple[LeftAlone, ...]:
    """Find a place for every parameter of two or more dimensions.

    Vectors (norms, biases, scales) are never quantized and need no place. A parameter that is no
    module's ``weight``, such as the experts of a block in one tensor, is claimed by its own name.

    Args:
        arch: Says what is left alone, by patterns of modules or parameters, and why.
        model: Has all parameters.
        sites: Module paths of all layers that can be quantized.
        misfits: Takes what nothing claims.

    Returns:
        What is left alone, in the order of the model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    table = modules.get(arch.embeddings)
    if not isinstance(table, nn.Embedding):
        misfits.add(
            f"{arch.embeddings}: expected the embeddings of tokens, found {kind_of(table)}",
            f"correct embeddings in {arch.name}.toml",
        )
    result: list[LeftAlone] = []
    any_pattern = re.compile("|".join(map(fnmatch.translate, arch.left_alone)) or r"(?!)")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        called, module = owner if leaf == "weight" else name, modules[owner]
        told = any_pattern.match(name) or any_pattern.match(owner)
        reason = _reason(arch, owner, name) if told else None
        if called in sites and reason is not None:
            misfits.add(
                f"{called}: a site claims it, and left_alone leaves it alone",
                f"keep one of the two in {arch.name}.toml",
            )
        if parameter.dim() < 2 or called in sites or misfits.about(called):
            continue
        if reason is None and isinstance(module, nn.Embedding):
            reason = _EMBEDDING
        if reason is not None:
            result.append(LeftAlone(called, reason, isinstance(module, nn.Linear)))
            continue
        shape = " x ".join(str(size) for size in parameter.shape)
        what = kind_of(module)
        misfits.add(
            f"{called}: {what if called == owner else f'{shape} parameter of {what}'} that no site "
            f"of {arch.name}.toml claims",
            f"use a checkpoint whose layers {arch.name}.toml describes; or add a site for each "
            "unclaimed parameter, or a line under left_alone that says why it stays as it is",
        )
    return tuple(result)


def _reason(arch: ArchSpec, owner: str, name: str) -> str | None:
    """Reason for which an architecture leaves a parameter alone, by a pattern of its name."""
    for pattern, reason in arch.left_alone.items():
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(owner, pattern):
            return reason
    return None
