"""Names that readers of checkpoints have for the parts of a model, and how a file says them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        patterns: ``(beginning of a module path, expression of what stands there in any reader)``,
            where vLLM's own path is not what it makes of a plain target.
        parts: ``(part of a module path, what stands there in a name that it looks up)``, where it
            looks a layer up under names of no layer of the model, such as parts of a fused one.
        unquantized: Module paths of parts that it builds in floating point, whatever a
            configuration says of their layers.
    """

    prefixes: tuple[tuple[str, str], ...]
    head: str | None = None
    patterns: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    unquantized: tuple[str, ...] = ()

    def builds_plain(self, module_name: str) -> bool:
        """Whether it builds a layer in floating point, so that no codes can be read into it."""
        return f"{module_name}.".startswith(tuple(f"{path}." for path in self.unquantized))

    def looked_up(self, module_name: str) -> tuple[str, ...]:
        """Names under which it looks a layer up in place of its path; mostly none."""
        found = (module_name.replace(old, new) for old, new in self.parts if old in module_name)
        return tuple(dict.fromkeys(found))

    def target(self, module_name: str) -> str:
        """Path of a layer for a configuration, or a pattern that fits in all readers."""
        for beginning, pattern in self.patterns:
            if module_name.startswith(beginning):
                return f"re:{pattern}{re.escape(module_name.removeprefix(beginning))}$"
        return module_name


@dataclass(frozen=True)
class GgufNames:
    """Names that llama.cpp has for a family and its tensors, as members of the gguf package.

    Attributes:
        architecture: Member of ``MODEL_ARCH``.
        projector: Member of ``VisionProjectorType``; empty: of text alone.
        tensors: Module path, with ``*`` for the number of a block -> members of ``MODEL_TENSOR``,
            of which a layer's rows are cut into as many; ``NAME:2`` where the number is not in the
            path.
        rotary_pairs: Whether neighbouring rows of a query or key are turned together there, where
            transformers turns rows that are half a head apart.
        norms_from_one: Whether norms multiply by their weight there, and here by one more.
    """

    architecture: str
    projector: str
    tensors: Mapping[str, tuple[str, ...]]
    rotary_pairs: bool = False
    norms_from_one: bool = False


@dataclass(frozen=True)
class GptqNames:
    """Paths of layers in readers of GPTQ checkpoints, which differ in how they begin.

    Attributes:
        prefixes: Beginning of a path -> regular expression of what stands there in any reader; the
            first that fits counts.
    """

    prefixes: tuple[tuple[str, str], ...] = ()


def fused_layers(table: StrictTable | None) -> dict[str, FusedLayer]:
    """Fuse label -> the layer that servers make of its sites."""
    result: dict[str, FusedLayer] = {}
    for label, item in table.children() if table else ():
        result[label] = FusedLayer(item.text("name"), item.text("class"))
        item.finish()
    return result


def vllm_names(table: StrictTable | None) -> VllmNames | None:
    """The names of vLLM; None where it does not have the family."""
    if table is None:
        return None
    patterns = tuple(table.strings("patterns").items())
    parts = tuple((old, new) for old, names in table.lists("parts").items() for new in names)
    plain = table.texts("unquantized", ())
    names = VllmNames(table.pairs("prefixes"), table.maybe_text("head"), patterns, parts, plain)
    table.finish()
    return names


def gguf_names(table: StrictTable | None) -> GgufNames | None:
    """The names of llama.cpp; None where it does not have the family."""
    if table is None:
        return None
    words = table.text("architecture"), table.maybe_text("projector") or ""
    flags = table.flag("rotary_pairs"), table.flag("norms_from_one")
    names = GgufNames(*words, table.lists("tensors"), *flags)
    table.finish()
    return names


def gptq_names(table: StrictTable | None) -> GptqNames:
    """The paths of readers of GPTQ layers; those of transformers where nothing is said."""
    if table is None:
        return GptqNames()
    names = GptqNames(table.pairs("prefixes"))
    table.finish()
    return names
