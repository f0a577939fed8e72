"""Attributes of outputs that a model's own code reads, and that transformers forgot.

A release of transformers may read an attribute of what a part of a model puts out that the part's
class of outputs lacks: the model then cannot be run at all. What stands there is None wherever the
attribute is known, as no unit depends on it, so None it is here, too.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from prismquant.models.arch import ArchSpec


def supply_outputs(model: nn.Module, arch: ArchSpec) -> None:
    """Let parts of a model put out what their reader looks for; in place.

    Args:
        model: Of the class of the architecture.
        arch: Says which parts, and which attributes.

    Raises:
        AttributeError: The model has no such part.
    """
    for path, names in arch.forgotten_outputs.items():
        model.get_submodule(path).register_forward_hook(functools.partial(_supply, names))


def _supply(names: tuple[str, ...], _: nn.Module, __: Any, output: Any) -> None:
    for name in names:
        if not hasattr(output, name):
            setattr(output, name, None)
