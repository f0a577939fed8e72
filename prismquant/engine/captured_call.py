"""A forward pass of a model that ends where a module in question is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from prismquant.engine.stand_ins import (
    Captured,
    no_embedding,
    numbers_unknown,
    replaced_forwards,
)
from prismquant.engine.token_tables import token_tables
from prismquant.errors import ModelError, PrismQuantError, brief
from prismquant.memory import memory_error
from prismquant.models.arch import ArchSpec, Modality
from prismquant.models.bound import BoundModel


def captured_call(
    model: nn.Module,
    arch: ArchSpec,
    inputs: dict[str, Any],
    stand_ins: dict[str, Callable[..., Any]],
    root: nn.Module | None = None,
) -> Captured:
    """Run a model, or one of its modules, until a stand-in ends the pass.

    Args:
        model: The model.
        arch: Its architecture.
        inputs: Keyword arguments.
        stand_ins: Forwards by module path; one raises :class:`Captured`.
        root: The module to run; None: the model.

    Raises:
        ModelError: The model's own code fails, or comes to its end.
    """
    tables = token_tables(model, arch)
    absent = {name: table for name, table in tables.items() if table.weight.is_meta}
    # In the vision tower's turn, text embeddings are computed first and then not used.
    stand_ins = {name: no_embedding(t.weight) for name, t in absent.items()} | stand_ins
    try:
        with replaced_forwards(model, stand_ins), numbers_unknown([*absent.values()]):
            if root is None:
                model(**inputs, use_cache=False)
            else:
                root(**inputs)
    except Captured as captured:
        # Its frames would hold this pass, and what waits for it, until the next collection.
        return captured.with_traceback(None)
    except Exception as error:
        if isinstance(error, PrismQuantError | OSError) or memory_error(error) is not None:
            raise
        raise ModelError(
            f"the model's own code fails between its steps: {brief(error)}",
            where=arch.name,
            remedy="restore config.json and the processor's files from the original checkpoint",
        ) from error
    raise ModelError(
        "the model's forward pass ended without running the expected step",
        where=arch.name,
        remedy="the architecture file names a module that this model does not call",
    )


def llm_root(arch: ArchSpec) -> str:
    """Module path of the language model."""
    return next(tower.root for tower in arch.towers if tower.modality is Modality.LLM)


def llm_blocks(bound: BoundModel) -> list[str]:
    """Module paths of the language model's blocks, in their order."""
    return [s.name for s in bound.steps if s.kind == "block" and s.modality is Modality.LLM]
