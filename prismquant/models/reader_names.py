"""Names that readers of checkpoints have for the parts of a model: vLLM, llama.cpp, GPTQ readers.

An architecture file holds them beside the family that they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prismquant.models.strict_table import StrictTable


@dataclass(frozen=True)
class FusedLayer:
    """The layer that servers make of several sites with one fuse label.

    Attributes:
        name: Its name, beside which its parts would lie.
        kind: Name of its class in vLLM, among which targets such as ``Linear`` are looked for.
    """

    name: str
    kind: str


@dataclass(frozen=True)
class VllmNames:
    """Names in vLLM, as it makes them of those of a checkpoint.

    Attributes:
        prefixes: ``(on disk or in transformers, in vLLM)``, tried in order, each once.
        head: What it compares with a configuration's targets for the language model's head, if not
            the renamed path.
    """

    prefixes: tuple[tuple[str, str], ...]
    head: str | None = None


@dataclass(frozen=True)
class GgufNames:
    """Names that llama.cpp has for a family and its tensors, as members of the gguf package.

    Attributes:
        architecture: Member of ``MODEL_ARCH``.
        projector: Member of ``VisionProjectorType``.
        tensors: Module path, with ``*`` for the number of a block -> members of ``MODEL_TENSOR``,
            of which a layer's rows are cut into as many; ``NAME:2`` where the number is not in the
            path.
    """

    architecture: str
    projector: str
    tensors: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class GptqNames:
    """Paths of layers in readers of GPTQ checkpoints, which differ in how they begin.

    Attributes:
        prefixes: Beginning of a path -> regular expression of what stands there in any reader; the
            first that fits counts.
    """

    prefixes: tuple[tuple[str, str], ...] = ()


def read_fused(table: StrictTable | None) -> dict[str, FusedLayer]:
    """Fuse label -> the layer that servers make of its sites."""
    result: dict[str, FusedLayer] = {}
    for label, item in table.children() if table else ():
        result[label] = FusedLayer(item.text("name"), item.text("class"))
        item.finish()
    return result


def read_vllm(table: StrictTable | None) -> VllmNames | None:
    """The names of vLLM; None where it does not have the family."""
    if table is None:
        return None
    names = VllmNames(table.pairs("prefixes"), table.maybe_text("head"))
    table.finish()
    return names


def read_gguf(table: StrictTable | None) -> GgufNames | None:
    """The names of llama.cpp; None where it does not have the family."""
    if table is None:
        return None
    names = GgufNames(
        architecture=table.text("architecture"),
        projector=table.text("projector"),
        tensors=table.lists("tensors"),
    )
    table.finish()
    return names


def read_gptq(table: StrictTable | None) -> GptqNames:
    """The paths of readers of GPTQ layers; those of transformers where nothing is said."""
    if table is None:
        return GptqNames()
    names = GptqNames(table.pairs("prefixes"))
    table.finish()
    return names
