"""Places of a model's tensors in GGUF files, by the names in its architecture file.

Of models that see, the vision tower and the merger make up a file of their own (``mmproj``). There
the patch embedding, a convolution over two frames, is stored as two over one frame.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prismquant.models.reader_names import GgufNames

_PATCHES = "V_ENC_EMBD_PATCH"
_DEEPSTACK = "V_DS"
_VISION = "V_"


@dataclass(frozen=True)
class Part:
    """One tensor of a GGUF file.

    Attributes:
        tensor: Name of a member of ``gguf.MODEL_TENSOR``.
        block: The number in its name, or None.
        suffix: ``weight``, ``bias``, or ``weight.1`` of the second frame's patch embedding.
        index: Which of ``count`` equal pieces of the source's tensor it is: rows, or frames.
        count: Into how many the source's tensor is cut.
    """

    tensor: str
    block: int | None
    suffix: str
    index: int = 0
    count: int = 1


def parts(
    names: GgufNames, name: str, deepstack: tuple[int, ...]
) -> tuple[bool, list[Part]] | None:
    """The places to which a tensor of the model goes.

    Args:
        names: What llama.cpp calls the family's tensors.
        name: The tensor by its module path.
        deepstack: After which blocks of the tower features are taken out.

    Returns:
        Whether it belongs to the vision tower's file, and its parts there; None if llama.cpp has no
        place for it.
    """
    module, _, suffix = name.rpartition(".")
    found = _look_up(names, module)
    if found is None:
        return None
    tensors, block = found
    vision = tensors[0].startswith(_VISION)
    if tensors[0].startswith(_DEEPSTACK) and block is not None:
        block = deepstack[block]
    if tensors[0] == _PATCHES and suffix == "weight":
        frames = enumerate(("weight", "weight.1"))
        return vision, [Part(_PATCHES, block, ending, index, 2) for index, ending in frames]
    count = len(tensors)
    return vision, [Part(own, block, suffix, index, count) for index, own in enumerate(tensors)]


def _look_up(names: GgufNames, module: str) -> tuple[tuple[str, ...], int | None] | None:
    """The tensors that a module's are called after, and the number of the block."""
    for path, tensors in names.tensors.items():
        if match := re.fullmatch(re.escape(path).replace(r"\*", r"(\d+)"), module):
            first, _, number = tensors[0].partition(":")
            if number:
                return (first,), int(number)
            return tensors, int(match[1]) if match.groups() else None
    return None
