"""Criteria by which a rule means layers."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, field_validator

from prismquant.errors import shortened, suggest
from prismquant.models.arch import Modality
from prismquant.models.arch_files import known_archs
from prismquant.patterns import Pattern, compile_pattern
from prismquant.recipe.joined_names import joined_names

_LM_HEAD = "lm_head"
_MAX_GLOB = 4000
# Names of one joined list that are told one by one.
_MOST_IDLE = 20
# As many as are kept compiled: with more, each would be compiled anew for every layer.
MAX_EXPRESSIONS = 1000


class Strict(BaseModel):
    """A part of a recipe: frozen, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Matchable(Protocol):
    """Properties of a layer that a rule asks for."""

    @property
    def modality(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def name(self) -> str: ...


class Match(Strict):
    """Criteria of a rule: a layer must meet all that are given; in a list, any entry may hold.

    Attributes:
        modality: ``vision``, ``projector`` or ``llm``.
        role: What the layer does, e.g. ``attn.qkv``; a dotted prefix such as ``attn`` matches all
            below it.
        name: The module path, as a glob or, after ``re:``, a regular expression for the whole path.
    """

    modality: tuple[Modality, ...] = ()
    role: tuple[str, ...] = ()
    name: tuple[str, ...] = ()

    @field_validator("modality", "role", "name", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("role")
    @classmethod
    def _roles_exist(cls, roles: tuple[str, ...]) -> tuple[str, ...]:
        for role in roles:
            if role not in known_roles():
                raise ValueError(f"no layer has the role {role!r}; {suggest(role, known_roles())}")
        return roles

    @field_validator("name")
    @classmethod
    def _patterns_compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if pattern.startswith("re:"):
                _pattern(pattern)
            elif len(pattern) > _MAX_GLOB:
                raise ValueError(f"a pattern of {len(pattern)} characters is too long")
        return patterns

    def matches(self, *, modality: str, role: str, name: str) -> bool:
        """Whether a layer with these properties is meant.

        Raises:
            PrismQuantError: A regular expression takes too long.
        """
        return (
            (not self.modality or modality in self.modality)
            and self.means_role(role)
            and (not self.name or any(_has_name(name, entry) for entry in self.name))
        )

    def means_role(self, role: str) -> bool:
        """Whether layers of a role are meant, as far as that goes by the role alone."""
        return not self.role or any(_has_role(role, entry) for entry in self.role)

    def means(self, layer: Matchable) -> bool:
        """Whether a layer is meant."""
        return self.matches(modality=layer.modality, role=layer.role, name=layer.name)

    def idle_entries(self, layers: Iterable[Matchable]) -> Iterator[str]:
        """Roles and names of lists that mean none of these layers; all there is, if none does."""
        meant = [layer for layer in layers if self.means(layer)]
        for modality in () if meant else self.modality:
            yield f"modality {modality.value!r}"
        for role in self.role:
            if not any(_has_role(layer.role, role) for layer in meant):
                yield f"role {role!r}"
        many: list[str] = []
        for name in self.name:
            if joined := joined_names(name):
                many += joined.idle(layer.name for layer in meant)
            elif not any(_has_name(layer.name, name) for layer in meant):
                yield f"name {shortened(name)}"
        for name in many[:_MOST_IDLE]:
            yield f"name {shortened(name)}"
        if len(many) > _MOST_IDLE:
            yield f"each of {len(many) - _MOST_IDLE} more such names"


@functools.cache
def known_roles() -> frozenset[str]:
    """Roles of layers in any known architecture, and what they begin with."""
    roles = {_LM_HEAD}
    for arch in known_archs().values():
        for tower in arch.towers:
            roles |= {site.role for site in (*tower.entry_sites, *tower.sites)}
    parts = [role.split(".") for role in roles]
    return frozenset(".".join(part[:n]) for part in parts for n in range(1, len(part) + 1))


def _has_role(role: str, entry: str) -> bool:
    return role == entry or role.startswith(f"{entry}.")


def _has_name(name: str, entry: str) -> bool:
    if entry.startswith("re:"):
        return _pattern(entry).fullmatch(name)
    return fnmatch.fnmatchcase(name, entry)


@functools.lru_cache(maxsize=4096)
def _pattern(entry: str) -> Pattern:
    return compile_pattern(entry.removeprefix("re:"))
