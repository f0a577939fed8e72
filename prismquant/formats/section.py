"""The ``quantization_config`` of a checkpoint as values: groups, ignores, cache, transforms.

Whoever looks at a configuration (loading, evaluating, exporting, checking) looks at what
:func:`~prismquant.formats.section_grammar.read_section` makes of it. What is
wrong is a :class:`Fault`, under the name of the rule of ``prismquant check`` that tells it;
:meth:`Section.require` raises them all together for readers that cannot go on. So nothing that is
refused is ever called fine.

Which group a layer belongs to is answered more than once, because transformers and vLLM match
targets in different orders and against different names.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prismquant.errors import FormatError, PrismQuantError, grouped, shortened
from prismquant.formats.packed import (
    FLOAT_QUANTIZED,
    INT_QUANTIZED,
    MXFP4_PACK_QUANTIZED,
    MXFP6_PACK_QUANTIZED,
    MXFP8_QUANTIZED,
    NAIVE_QUANTIZED,
    NVFP4_PACK_QUANTIZED,
    PACK_QUANTIZED,
)
from prismquant.formats.quantization_args import Args

if TYPE_CHECKING:
    from prismquant.patterns import Pattern

CONFIG_KEY = "quantization_config"
METHOD = "compressed-tensors"
# Of our own section, beside it, and of tensors that PrismQuant alone reads.
PRIVATE_KEY = "prismquant"
SIGNS, SPLIT_INDEX, SPLIT_WEIGHT = "input_signs", "split_index", "split_weight"

PACK, INT, FLOAT, NAIVE = PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED, NAIVE_QUANTIZED
NVFP4, MXFP4 = NVFP4_PACK_QUANTIZED, MXFP4_PACK_QUANTIZED
MXFP6, MXFP8 = MXFP6_PACK_QUANTIZED, MXFP8_QUANTIZED
DENSE, MIXED = "dense", "mixed-precision"
# Formats of which a reader takes it that inputs are quantized too.
WITH_INPUTS = (NAIVE, INT, FLOAT, NVFP4)
# Locations at which queries and keys are rotated.
ROTATED_AT = ("q_attn", "k_cache")

LINEAR = "Linear"
# What real configurations have: some ten patterns.
MOST_PATTERNS = 2_000
# For all patterns of a configuration on all layers of a model; honest ones take milliseconds.
_MOST_SECONDS = 3.0
# What a target is, the most exact first.
NAME, PATTERN, CLASS = 1, 2, 3

_MOST_SHOWN = 10


# ----------------------------------------------------------------------------------------- targets


class Matcher:
    """Compares names with targets: each pair once, all together in a limited time."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], bool] = {}
        self._spent = 0.0

    def matches(self, name: str, target: str) -> bool:
        """True if a module path is the one named, or fits a ``re:`` pattern from its start.

        What is no regular expression fits nothing: that it is none, reading the section tells.

        Raises:
            FormatError: The patterns of the configuration take too long.
        """
        if not target.startswith("re:"):
            return name == target
        if (found := self._found.get((name, target))) is None:
            found = self._found[name, target] = self._tried(name, target[3:])
        return found

    def _tried(self, name: str, expression: str) -> bool:
        pattern = _compiled(expression)
        if pattern is None:
            return False
        begun = time.process_time()
        try:
            if self._spent > _MOST_SECONDS:
                raise PrismQuantError("all patterns together take too long")
            return pattern.match(name)
        except PrismQuantError as error:
            self._spent = math.inf
            raise FormatError(
                error.what,
                where="quantization_config",
                remedy="name layers by their paths, or by patterns without repeats inside repeats",
            ) from error
        finally:
            self._spent += time.process_time() - begun


def is_broken(expression: str) -> bool:
    """True if a text is no regular expression, or one that is too large."""
    return _compiled(expression) is None


@functools.lru_cache(maxsize=MOST_PATTERNS)
def _compiled(expression: str) -> Pattern | None:
    from prismquant.patterns import compile_pattern

    try:
        return compile_pattern(expression)
    except ValueError:
        return None


@dataclass(frozen=True)
class Targets:
    """Layers as a configuration names them: module paths, ``re:`` patterns, names of classes."""

    entries: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The entries that are names, not patterns."""
        return frozenset(entry for entry in self.entries if not entry.startswith("re:"))

    @functools.cached_property
    def patterns(self) -> tuple[str, ...]:
        """The entries that are patterns, with their ``re:``."""
        return tuple(entry for entry in self.entries if entry.startswith("re:"))

    def meets(self, name: str, matcher: Matcher) -> bool:
        """True if a layer is meant by its name, rather than by its class."""
        return name in self.names or any(matcher.matches(name, p) for p in self.patterns)

    def hit(self, names: Collection[str], matcher: Matcher) -> int | None:
        """The exactness with which the linear layer of these names is meant; None: it is not."""
        if not self.names.isdisjoint(names):
            return NAME
        if any(matcher.matches(name, p) for p in self.patterns for name in names):
            return PATTERN
        return CLASS if LINEAR in self.names else None


# ------------------------------------------------------------------------------------------ values


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a configuration.

    Attributes:
        rule: The rule of ``prismquant check`` that tells it.
        what: What is wrong, with the value.
        where: Which key, group or transform.
        remedy: What to do about it.
    """

    rule: str
    what: str
    where: str
    remedy: str = ""


@dataclass(frozen=True)
class SchemeGroup:
    """One entry of ``config_groups``.

    Attributes:
        name: Its key.
        targets: Its layers.
        layout: Its own format, else that of the whole configuration; may be any text.
        own_format: Whether it says its format itself.
        weights, inputs, outputs: What is quantized; None for what is not, or is ill-formed.
        well_formed: Whether nothing in it is ill-formed.
    """

    name: str
    targets: Targets
    layout: str
    own_format: bool
    weights: Args | None
    inputs: Args | None
    outputs: Args | None
    well_formed: bool

    @property
    def scheme(self) -> tuple[Args | None, Args | None, Args | None, str]:
        """All that layers of it have in common; names of groups are not part of it."""
        return (self.weights, self.inputs, self.outputs, self.layout)

    def describe(self) -> str:
        """In a few words."""
        weights = self.weights.describe() if self.weights else "no weights"
        inputs = f", inputs {self.inputs.describe()}" if self.inputs else ""
        outputs = f", outputs {self.outputs.describe()}" if self.outputs else ""
        return f"{weights}{inputs}{outputs} as {self.layout}"


@dataclass(frozen=True)
class Apply:
    """A place where a transform is applied.

    Attributes:
        location: To what of a module, one of :data:`LOCATIONS`.
        targets, ignore: Of which modules.
        inverse: Whether it undoes another one.
    """

    location: str
    targets: Targets
    ignore: Targets
    inverse: bool


@dataclass(frozen=True)
class DeclaredTransform:
    """One entry of ``transform_config``.

    Attributes:
        name: Its key.
        type: One of :data:`TRANSFORM_TYPES`.
        head_dim: Width of its blocks; None: that of the module.
        randomize: Whether its matrix is drawn anew for each module.
        applies: Where it is applied.
    """

    name: str
    type: str
    head_dim: int | None
    randomize: bool
    applies: tuple[Apply, ...]


@dataclass(frozen=True)
class Section:
    """A ``quantization_config``.

    Attributes:
        method: The quantization method, in lower case; empty where there is none.
        groups: Entries of ``config_groups`` that are objects, in order.
        ignore: What is left alone.
        cache: How keys and values are kept, None for in floating point or ill-formed.
        transforms: Well-formed entries of ``transform_config``.
        faults: What is wrong; of other methods than compressed-tensors nothing is looked at.
        matcher: Compares names with its targets.
    """

    method: str = ""
    groups: tuple[SchemeGroup, ...] = ()
    ignore: Targets = field(default_factory=Targets)
    cache: Args | None = None
    transforms: tuple[DeclaredTransform, ...] = ()
    faults: tuple[Fault, ...] = ()
    matcher: Matcher = field(default_factory=Matcher, repr=False, compare=False)

    @functools.cached_property
    def owners(self) -> Mapping[str, SchemeGroup]:
        """Target -> the last group that has it."""
        return {target: group for group in self.groups for target in group.targets}

    def require(self) -> None:
        """Go on only with a configuration that is understood completely.

        Raises:
            FormatError: It is of another method, or lists all that is wrong with it.
        """
        if self.method not in ("", METHOD):
            raise FormatError(
                f"quantization method {shortened(self.method)} cannot be read",
                where=CONFIG_KEY,
                remedy=f"only {METHOD} checkpoints and unquantized ones can be loaded; if the "
                f"weights are in floating point, delete {CONFIG_KEY} from config.json",
            )
        if not self.faults:
            return
        findings = grouped(dict.fromkeys(f"{fault.where}: {fault.what}" for fault in self.faults))
        lines = [f"  - {one}" for one in findings[:_MOST_SHOWN]]
        lines += [f"  - and {len(findings) - _MOST_SHOWN} more"] * (len(findings) > _MOST_SHOWN)
        remedies = {fault.remedy for fault in self.faults}
        raise FormatError(
            "\n".join([f"{CONFIG_KEY} cannot be read:", *lines]),
            where="config.json",
            remedy=remedies.pop() if len(remedies) == 1 else "correct them, or restore the file",
            findings=findings,
        )


# --------------------------------------------------------------------------------------- matching


def group_in_transformers(name: str, section: Section) -> SchemeGroup | None:
    """The group of a linear layer as the compressed-tensors library finds it.

    Exact names come before patterns and those before the class; ties go by the alphabet.
    """
    matcher = section.matcher
    if LINEAR in section.ignore.names or section.ignore.meets(name, matcher):
        return None
    owners = section.owners
    if name in owners:
        return owners[name]
    patterns = sorted(target for target in owners if target.startswith("re:"))
    named = next((target for target in patterns if matcher.matches(name, target)), None)
    return owners.get(named or LINEAR)


def group_in_prismquant(names: Collection[str], section: Section) -> SchemeGroup | None:
    """The group of the linear layer of these names as ``prismquant.load`` finds it.

    Where several groups aim at it, its own name counts more than a pattern, and a pattern more
    than the name of a class; ties go by the order of the groups.
    """
    matcher = section.matcher
    found = [(group.targets.hit(names, matcher), group) for group in section.groups]
    hits = [(hit, place) for place, (hit, _) in enumerate(found) if hit is not None]
    if not hits or section.ignore.hit(names, matcher):
        return None
    return section.groups[min(hits)[1]]


def groups_by_name(name: str, section: Section) -> list[SchemeGroup]:
    """All groups that have a layer among their targets, by its name rather than its class."""
    return [group for group in section.groups if group.targets.meets(name, section.matcher)]
