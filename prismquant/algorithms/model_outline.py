"""Outline of a model, and of what a recipe means of it, as transforms need them to plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class OutlineLayer(Protocol):
    """A layer of a model."""

    @property
    def name(self) -> str:
        """Its module path."""

    @property
    def modality(self) -> str:
        """The part of the model that it belongs to."""

    @property
    def role(self) -> str:
        """Its role, e.g. ``attn.qkv``."""

    @property
    def tied(self) -> bool:
        """Whether it shares its weight with another."""


class OutlineEdge(Protocol):
    """A smooth edge of a model."""

    @property
    def consumers(self) -> Sequence[str]:
        """Names of the layers that read it."""


class ModelOutline(Protocol):
    """A model's layers and smooth edges."""

    @property
    def sites(self) -> Sequence[OutlineLayer]:
        """All layers, in calibration order."""

    @property
    def edges(self) -> Sequence[OutlineEdge]:
        """All smooth edges."""

    def site(self, name: str) -> OutlineLayer:
        """The layer of a module path."""


class Scope(Protocol):
    """The part of a model that a recipe means."""

    @property
    def modality(self) -> Sequence[str]:
        """Towers that it is about; empty: all."""

    def means(self, layer: OutlineLayer, /) -> bool:
        """Whether it means a layer."""
