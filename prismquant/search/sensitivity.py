"""Sensitivity of a model: the loss and the bytes of every format in every unit of choice.

Analysis writes it, and search, reports and recipes read it; nothing else passes between them. A
unit of choice is a set of layers that must share a format, because a reader fuses them. Its scores
are kept apart by the class of token whose prediction they are about, so that other weights need no
new analysis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from prismquant.arguments import EXACT

SENSITIVITY_VERSION = 2
"""Version of the file's layout. Files of version 1 are read, too: they lack losses of layers."""

TokenClass = Literal["answer", "text", "image", "video"]
"""Class of a place whose next token is predicted: of an answer, of other text, or a placeholder."""
TOKEN_CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)

IN_NATS = frozenset({"fisher", "kl_div"})
"""Methods whose losses are KL divergences in nats per token of the class."""

LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e3
"""Bounds of the weight of a class of tokens that counts; one below would drown in rounding."""

FLOAT = "float"
"""Name of the choice to leave a unit alone."""


def is_weight(number: float) -> bool:
    """Whether a class of tokens may have this weight: 0, or one within the bounds."""
    return number == 0 or LEAST_WEIGHT <= number <= MOST_WEIGHT


@dataclass(frozen=True)
class Score:
    """Loss by one class of tokens.

    Attributes:
        loss: Loss that a format adds. Methods ``fisher`` and ``kl_div``: KL divergence in nats per
            token of the class; others: in the method's own unit, of which only the order counts.
        error: Standard error of the loss over samples and draws; None where there is none.
    """

    __pydantic_config__ = EXACT

    loss: float
    error: float | None = None


@dataclass(frozen=True)
class FormatOption:
    """A format that a unit may have, with what it costs.

    Attributes:
        format: Name of the choice, a key of :attr:`Sensitivity.formats`, or :data:`FLOAT`.
        stored_bytes: Bytes of the unit's weights on disk: codes, scales, zero points, padding.
        cache_bytes: Bytes of keys and values for each token in the cache; 0 for units of layers.
        scores: Loss by class of token; classes that the samples lack are left out.
        formats: By layer, where they are not the ones that were asked for because its shape did not
            fit: names of its formats as they will really be, that of the weight and, after a
            slash, that of the input, e.g. ``int4-g32`` or ``fp8-channel/fp8-token``.
        refused: Readers that cannot load the unit in this format, each with the reason.
        layer_losses: Loss of each of the unit's layers, in their order, as the solver gave it: the
            same as ``loss`` of a layer in the record of a run. 0 of layers that stay in floating
            point; empty where nothing was solved.
    """

    __pydantic_config__ = EXACT

    format: str
    stored_bytes: int
    cache_bytes: int = 0
    scores: Mapping[TokenClass, Score] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    layer_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerShape:
    """A layer of a unit.

    Attributes:
        name: Its module path.
        role: What it does, e.g. ``attn.qkv``.
        out_features, in_features: Of its weight as a matrix.
        parallel: Side of the weight that servers cut over devices: ``row`` its inputs, ``column``
            its outputs; None: each device holds the whole layer.
        fused: Whether servers fuse it with others.
    """

    __pydantic_config__ = EXACT

    name: str
    role: str
    out_features: int
    in_features: int
    parallel: Literal["row", "column"] | None = None
    fused: bool = False

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ChoiceUnit:
    """Layers that must share a format, or the key-value cache.

    Attributes:
        name: Unique; the common beginning of its layers' names and what tells them apart.
        modality: ``vision``, ``projector`` or ``llm``.
        step: Module path of the model's unit (a block, the projector, the head) that holds it.
        kind: ``layers``, or ``kv_cache`` for the keys and values of the whole language model.
        layers: Its layers; empty for the key-value cache.
        options: What it may be; the first is to leave it alone, and the only one where its layers
            were left out of the choice.
    """

    __pydantic_config__ = EXACT

    name: str
    modality: str
    step: str
    kind: Literal["layers", "kv_cache"]
    layers: tuple[LayerShape, ...]
    options: tuple[FormatOption, ...]


@dataclass(frozen=True)
class Choice:
    """A format on offer.

    Attributes:
        weights: Fields of the weights' number format; None: of the key-value cache alone.
        activations: Fields of the inputs' number format; None: they stay in floating point.
        cache: Fields of the format of keys and values; None: it is of layers.
        weight_range, activation_range: Fields of the rules by which ranges are chosen, as a recipe
            has them; None: its default.
    """

    __pydantic_config__ = EXACT

    weights: Mapping[str, Any] | None = None
    activations: Mapping[str, Any] | None = None
    cache: Mapping[str, Any] | None = None
    weight_range: Mapping[str, Any] | None = None
    activation_range: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Everything that a search needs of a model.

    Attributes:
        version: :data:`SENSITIVITY_VERSION`.
        written_by: Version of PrismQuant.
        model: Folder or name of the model.
        architecture: Name of its architecture.
        identity: What decided the scores: fingerprints of model, samples, formats, versions.
        method: Name of the analysis method.
        options: Its options, and those of the analysis.
        solver: Name of the solver whose codes were scored.
        solver_options: Its options.
        calibration: Samples, by kind; their source; tokens by class; tokens of a window of running
            text, where that was asked for.
        weights: Weight of each class of token in the sum of scores.
        formats: Formats on offer, by name.
        units: Units of choice, in the order in which the model runs them. Every layer that a recipe
            could quantize is in one, so that a recipe can be written that leaves the others alone.
        fixed_bytes: Bytes on disk of all tensors that no unit holds: embeddings, norms, biases.
        fixed_weights: How many numbers these tensors hold.
        notes: Things that a user should know: fallbacks, samples without a class.
    """

    __pydantic_config__ = EXACT

    version: int
    written_by: str
    model: str
    architecture: str
    identity: Mapping[str, str]
    method: str
    options: Mapping[str, Any]
    solver: str
    solver_options: Mapping[str, Any]
    calibration: Mapping[str, Any]
    weights: Mapping[TokenClass, float]
    formats: Mapping[str, Choice]
    units: tuple[ChoiceUnit, ...]
    fixed_bytes: int
    fixed_weights: int
    notes: tuple[str, ...] = ()
