"""A model bound to its description: sites, steps, edges and streams with paths and shapes.

:func:`~prismquant.models.bind.bind` makes these values; all that plans, runs, writes or checks a
model reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prismquant.errors import ModelError, suggest
from prismquant.models.arch import ArchSpec, Cached, EdgeKind, Modality, Parallel, SiteKind
from prismquant.models.config import config_value
from prismquant.models.names import NameMap
from prismquant.shards import ShardReader, TensorView
from prismquant.sources.quantized_source import FloatReader, QuantizedSource

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class ExpertPlace:
    """Place of an expert in a block.

    Attributes:
        module: Path of the module that holds all experts of the block.
        number: Its number among them.
        dealt: Whether the block gives all experts together a row for each expert and token.
    """

    module: str
    number: int
    dealt: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class BoundSite:
    """A site of one concrete layer.

    Attributes:
        name: Module path.
        disk_name: Prefix of its tensors on disk.
        role: Its role, e.g. ``mlp.down``.
        modality: Its tower's modality.
        kind: Linear layer or patch convolution.
        step: Index of its step.
        stage: Order inside the step.
        input_key: Equal for sites that read the same tensor; unique over the model.
        fuse_key: Equal for sites that servers fuse; unique over the model; None when not fused.
        out_features, in_features: Shape of its weight as a matrix.
        weight_shape: Shape of its weight; five-dimensional for a 3-D convolution.
        has_bias: Whether it has a bias.
        dtype: Of its weight on disk; without shards, the config's.
        tied: Whether its weight is the token embedding.
        parallel: Which of its sides servers cut; None where each device holds the whole layer.
        elementwise: Whether only elementwise functions act between it and the layers of its module.
        online_rotation: Whether its input is what an online rotation multiplies.
        cache: What its outputs become in the cache of keys and values.
        expert: The expert that it is part of, which sees the tokens that are sent to it; None: it
            sees all.
    """

    name: str
    disk_name: str
    role: str
    modality: Modality
    kind: SiteKind
    step: int
    stage: int
    input_key: str
    fuse_key: str | None
    out_features: int
    in_features: int
    weight_shape: tuple[int, ...]
    has_bias: bool
    dtype: torch.dtype
    tied: bool = False
    parallel: Parallel | None = None
    elementwise: bool = False
    online_rotation: bool = False
    cache: Cached | None = None
    expert: ExpertPlace | None = None

    @property
    def scheme_key(self) -> str | None:
        """Equal for layers to which servers give one scheme: fused ones, all experts of a block."""
        return self.fuse_key if self.expert is None else self.expert.module


@dataclass(frozen=True)
class BoundStep:
    """One unit of calibration: a module that is run, and its sites.

    Attributes:
        index: Position in calibration order.
        modality: Its tower's modality.
        name: Module path.
        sites: Its sites, in stage order.
        kind: ``entry``, ``block``, ``projector`` or ``head``.
    """

    index: int
    modality: Modality
    name: str
    sites: tuple[BoundSite, ...]
    kind: str


@dataclass(frozen=True)
class BoundEdge:
    """Smooth edge of one concrete block, with module paths.

    Attributes:
        kind: Which rescaling it allows.
        norm: The norm that produces, or None.
        producer: The linear that produces, or None.
        consumers: All sites that read its output.
        others: Layers that are left alone and read it, too: scale arrives there as well.
        size: Channels that can be scaled: of the norm, or output rows of the linear.
        first_row: First row of the producer's weight that counts: two thirds down a fused
            query-key-value.
        tile: Times that the channels repeat in a consumer's input: 4 behind a concatenating merger.
        heads, kv_heads: Attention heads, for kind ``value``; otherwise 0.
        step: Index of the step of the consumers.
        from_one: Whether the norm multiplies by one plus its weight.
        inner: Whether the norm reads something inside of a block, not the residual stream.
        gated: Whether a gate lies between values and consumers, which no rotation passes.
    """

    kind: EdgeKind
    norm: str | None
    producer: str | None
    consumers: tuple[str, ...]
    size: int
    first_row: int
    tile: int
    heads: int
    kv_heads: int
    step: int
    others: tuple[str, ...] = ()
    from_one: bool = False
    inner: bool = False
    gated: bool = False

    @property
    def source(self) -> str:
        """Path of what produces: the norm or the linear."""
        return self.norm or self.producer or ""

    @property
    def readers(self) -> tuple[str, ...]:
        """Paths of all layers that read its output."""
        return (*self.consumers, *self.others)


@dataclass(frozen=True)
class BoundStream:
    """The residual stream of one tower, with module paths.

    Attributes:
        modality: Of the tower.
        width: Its channels.
        writers: Linears and convolutions whose output rows are its channels.
        embeddings: Tables whose rows are vectors of the stream.
        norms: Norms through which it is read; each is the producer of an edge, and each is as
            wide as the stream or as several concatenated vectors of it.
        centred: Whether a norm subtracts the mean over channels, as LayerNorm does.
    """

    modality: Modality
    width: int
    writers: tuple[str, ...]
    embeddings: tuple[str, ...]
    norms: tuple[str, ...]
    centred: bool


@dataclass(frozen=True)
class LeftAlone:
    """A parameter of two or more dimensions that is never quantized.

    Attributes:
        name: Path of its module, or of itself where it is not called ``weight``.
        reason: Why, in words.
        is_linear: Whether its module is a linear layer, which a reader could take for quantized.
    """

    name: str
    reason: str
    is_linear: bool


@dataclass(frozen=True)
class BoundModel:
    """An architecture bound to a folder.

    Attributes:
        arch: The architecture.
        folder: The checkpoint.
        config: Native transformers config.
        names: Disk names and module paths.
        steps: In calibration order.
        sites: All sites, in calibration order.
        edges: All edges.
        streams: Residual streams of the towers that have a description of theirs.
        left_alone: Parameters that are never quantized, in the order of the model.
        dtype: Most frequent floating dtype on disk, or the config's; each site has its own.
        shapes: Module tensor name -> shape, for every parameter and stored buffer.
        tied: Whether the head's weight is the token embedding.
        has_weights: Whether the folder has readable shards.
        source: How the checkpoint is quantized already; None: its weights are in floating point.
        views: Layers' weights that lie within larger stored tensors, by the names that they have
            alone.
        notes: What the folder says that was passed over, in sentences.
        carried: Name on disk -> shape, of stored tensors that the model's class drops, such as
            layers that draft tokens; they are carried over as they are.
    """

    arch: ArchSpec
    folder: Path
    config: Any
    names: NameMap
    steps: tuple[BoundStep, ...]
    sites: tuple[BoundSite, ...]
    edges: tuple[BoundEdge, ...]
    streams: tuple[BoundStream, ...]
    left_alone: tuple[LeftAlone, ...]
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    tied: bool
    has_weights: bool
    source: QuantizedSource | None = None
    views: Mapping[str, TensorView] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    carried: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    _by_name: dict[str, BoundSite] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._by_name.update({site.name: site for site in self.sites})

    def site(self, name: str) -> BoundSite:
        """The site of a module path.

        Raises:
            ModelError: There is none.
        """
        if name not in self._by_name:
            raise ModelError(
                f"{name!r} is no quantizable layer of {self.arch.title}",
                remedy=suggest(name, self._by_name) if len(self._by_name) < 40 else None,
            )
        return self._by_name[name]

    def shards(self) -> ShardReader:
        """Its tensors in floating point, each layer's weight by a name of its own."""
        if self.source is not None:
            return FloatReader(self.folder, self.source, self.views)
        return ShardReader(self.folder, views=self.views)

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for image and video features."""
        return tuple(int(config_value(self.config, key)) for key in self.arch.vision_token_ids)
