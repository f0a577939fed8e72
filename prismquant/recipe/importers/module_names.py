"""Names of modules as other tools' recipes give them, as criteria of a rule.

Tools know three kinds: a class (``Linear``), a regular expression (``re:`` in front), and a name.
Ours are globs and regular expressions of the whole module path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from prismquant.patterns import compile_pattern
from prismquant.recipe.joined_names import BELOW, START

_FLAGS = re.compile(r"\(\?([aimsx]+)\)")
# An expression that begins like this means the same in every release of transformers.
_ANYWHERE = re.compile(r"\^?(\(\?:)?(\.[*+]|model\\?\.)")
_OLD_LAYERS = re.compile(r"^(\^?)model\\?\.layers")
# Whole paths of layers, which have nothing below them.
_LAYER = re.compile(r"\.(\w+_proj|qkv|proj|linear_fc[12]|fc[12])$")

_BELOW = "the module of this name and all below it, wherever it stands; there only a whole path"
_GLOB = "read as a glob, wherever it stands; there only a whole path"
_MODEL = "also with `model.` in front, as newer releases of transformers have it"
_LANGUAGE = "also as `model.language_model.layers`, as newer releases of transformers have it"

LINEAR, CONVOLUTION = "linear", "convolution"
_CLASSES = {
    "Linear": LINEAR,
    "__ALL__": LINEAR,
    "Conv2d": CONVOLUTION,
    "Conv3d": CONVOLUTION,
}


@dataclass(frozen=True)
class NamedModules:
    """Modules that one entry of a list means.

    Attributes:
        entry: As it was written.
        kind: ``class``, ``expression`` or ``name``; ``nothing`` for a class without weights.
        pattern: Regular expression of the whole path, after ``re:``; of a class ``linear`` or
            ``convolution``.
        why: How this differs from the tool's own reading; empty where it does not.
    """

    entry: str
    kind: Literal["class", "expression", "name", "nothing"]
    pattern: str
    why: str = ""


def named_modules(entry: str) -> NamedModules:
    """The modules that an entry means.

    Args:
        entry: A class, a regular expression that is anchored at the beginning alone (``re:`` in
            front), or a name.

    Raises:
        ValueError: It is empty, or no regular expression.
    """
    if not entry:
        raise ValueError("an empty name means nothing")
    if entry.startswith("re:"):
        return _expression(entry)
    if entry in _CLASSES:
        return NamedModules(entry, "class", _CLASSES[entry])
    if entry[0].isupper() and "." not in entry:
        return NamedModules(entry, "nothing", "")
    if any(sign in entry for sign in "*?["):
        globbed = "".join({"*": ".*", "?": "."}.get(sign, re.escape(sign)) for sign in entry)
        return NamedModules(entry, "name", f"{START}{globbed}", _GLOB)
    pattern, moved = _of_any_release(re.escape(entry))
    below = "" if entry == "lm_head" or _LAYER.search(entry) else _BELOW
    return NamedModules(
        entry, "name", f"{START}{pattern}{BELOW}", "; ".join(filter(None, (below, moved)))
    )


def _expression(entry: str) -> NamedModules:
    body = entry.removeprefix("re:")
    compile_pattern(body)
    flags = _FLAGS.match(body)
    rest, moved = _of_any_release(body[flags.end() :] if flags else body)
    if not _ANYWHERE.match(rest):
        rest, moved = f"(?:model\\.)?(?:{rest.removeprefix('^')})", _MODEL
    scoped = f"(?{flags.group(1)}:{rest})" if flags else f"(?:{rest})"
    return NamedModules(entry, "expression", f"re:{scoped}.*", moved)


def _of_any_release(pattern: str) -> tuple[str, str]:
    """A pattern of a path that also means the path of newer releases of transformers."""
    found = _OLD_LAYERS.sub(r"\1model\\.(?:language_model\\.)?layers", pattern)
    return found, _LANGUAGE if found != pattern else ""


def excluding(pattern: str, excluded: list[str]) -> str:
    """A regular expression for what it means, but none of what others mean.

    Args:
        pattern: After ``re:``.
        excluded: The others, each after ``re:``.
    """
    if not excluded:
        return pattern
    others = "|".join(f"(?:{one.removeprefix('re:')})$" for one in excluded)
    return f"re:(?!{others})(?:{pattern.removeprefix('re:')})"
