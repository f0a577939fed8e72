"""Architectures as data: towers, sites and edges.

One TOML file in ``archs/`` describes one model family. It says which modules can be quantized
(sites), in which order they run, what shares an input, what must share a scheme because servers
fuse it, which float rescalings leave the function unchanged (edges), and how checkpoints name their
tensors (layouts). There is no code per model: a new family is a new file.

:mod:`prismquant.models.arch_files` reads the files.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from prismquant.errors import ModelError
from prismquant.models.reader_names import FusedLayer, GgufNames, GptqNames, VllmNames
from prismquant.models.remote_arch import ConfigMap, ProcessorMap

if TYPE_CHECKING:
    from collections.abc import Container, Mapping


class Modality(StrEnum):
    """Part of the model that a layer belongs to."""

    VISION = "vision"
    PROJECTOR = "projector"
    LLM = "llm"


class SiteKind(StrEnum):
    """Rule by which a site's weight becomes a matrix."""

    LINEAR = "linear"
    # A convolution whose kernel equals its stride reads disjoint patches: a reshaped matrix.
    PATCH_CONV = "patch_conv"


class Parallel(StrEnum):
    """Side of a layer that servers cut when they split a model over devices."""

    # the rows of W: outputs
    COLUMN = "column"
    # the columns of W: inputs
    ROW = "row"


class Cached(StrEnum):
    """Part of a language model's cache that a layer's outputs become."""

    KEYS = "keys"
    VALUES = "values"


class EdgeKind(StrEnum):
    """Rescaling that an edge allows without changing the float function."""

    # what a norm multiplies by (and its bias) times s, consumer columns divided by s
    NORM = "norm"
    # producer rows (and bias) times s, consumer columns divided by s; only products in between
    LINEAR = "linear"
    # value rows times s, output projection columns divided by s; grouped heads share values
    VALUE = "value"


@dataclass(frozen=True)
class Site:
    """One quantizable layer, relative to the module that a step runs.

    Attributes:
        role: What the layer does, e.g. ``attn.qkv.q``; recipes match it exactly or by dotted
            prefix.
        path: Module path relative to the step's module; ``*`` for the number of an expert.
        kind: Linear layer or patch convolution.
        stage: Order inside the step; sites of one stage are calibrated in one pass.
        input: Label of the tensor it reads; sites of a step with equal labels read the same tensor.
        fuse: Sites of a step with the same label become one matrix in servers: they share a scheme.
        parallel: Which of its sides servers cut; None where each device holds the whole layer.
        closes_stream: Whether its outputs are added to the residual stream.
        elementwise: Whether only elementwise functions act between it and the layers of its module.
        online_rotation: Whether its input is what an online rotation multiplies.
        cache: What its outputs become in the cache of keys and values.
        in_blocks_with: Path of a module, relative as ``path``: only blocks that have this module
            have the site. None: all have it.
    """

    role: str
    path: str
    kind: SiteKind
    stage: int
    input: str
    fuse: str | None = None
    parallel: Parallel | None = None
    closes_stream: bool = False
    elementwise: bool = False
    online_rotation: bool = False
    cache: Cached | None = None
    in_blocks_with: str | None = None

    def is_in(self, block: str, paths: Container[str]) -> bool:
        """Whether a block has it.

        Args:
            block: Path of the block.
            paths: Of all modules of the model.
        """
        return self.in_blocks_with is None or f"{block}.{self.in_blocks_with}" in paths


@dataclass(frozen=True)
class Edge:
    """Smooth edge: a producer and its consumers, between which scale can move.

    Paths are relative to the step's module, or absolute where an :class:`ArchSpec` holds the edge.
    In a block that lacks some of its sites the edge ends in the others; without its producer, or
    without consumers, it is not there.

    Attributes:
        kind: Form of the producer.
        norm: The norm that produces, for kind ``norm``.
        producer: The linear that produces, for the other kinds.
        consumers: All that read its output, sites and layers that are left alone; the list is
            complete.
        part: ``v`` when the producer is a fused query-key-value layer, of which the last rows
            count; ``up`` when it is gate and up in one, of which the last half counts.
        inner: Whether the norm reads something inside of a block, not the residual stream.
        gated: Whether a gate multiplies the values of heads before the consumers read them: scale
            passes, a rotation does not.
    """

    kind: EdgeKind
    norm: str | None
    producer: str | None
    consumers: tuple[str, ...]
    part: str | None = None
    inner: bool = False
    gated: bool = False

    @property
    def source(self) -> str:
        """Path of what produces: the norm or the linear."""
        return self.norm or self.producer or ""


@dataclass(frozen=True)
class Tower:
    """Modules of one modality in the order in which they are calibrated.

    Attributes:
        modality: Vision, projector or LLM.
        root: Module whose forward runs the tower.
        entry: Module that runs before the blocks and holds ``entry_sites``.
        blocks: Path of the module list of equal blocks.
        modules: Paths of single modules, for a projector; ``*`` stands for all members of a list.
        experts: Paths of modules in a block that hold experts, relative to it; each expert's
            matrices become layers, as :mod:`prismquant.models.experts` says.
        entry_sites: Sites of the entry, relative to it.
        sites: Sites of every block or module, relative to it.
        edges: Edges of every block or module, relative to it.
        depth: Config key of the number of blocks.
        heads: Config key of the number of attention heads, e.g.
            ``text_config.num_attention_heads``.
        kv_heads: Config key of the number of key and value heads; ``heads`` when absent.
    """

    modality: Modality
    root: str
    entry: str | None = None
    blocks: str | None = None
    modules: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    entry_sites: tuple[Site, ...] = ()
    sites: tuple[Site, ...] = ()
    edges: tuple[Edge, ...] = ()
    depth: str | None = None
    heads: str | None = None
    kv_heads: str | None = None

    def runs(self, module: str) -> bool:
        """Whether a module is one of its blocks or modules."""
        patterns = (f"{self.blocks}.*",) if self.blocks else self.modules
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Stream:
    """The residual stream of a tower: the tensor that its blocks read through norms and add to.

    Paths are absolute; ``*`` stands for one dotted part. Both lists are complete, so that an
    orthogonal matrix applied to all writers and, inverted, to all that reads the norms, leaves the
    function unchanged.

    Attributes:
        modality: Of the tower.
        writers: Linears, convolutions and embeddings whose outputs are added to the stream.
        norms: The norms through which it is read.
    """

    modality: Modality
    writers: tuple[str, ...]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Rule by which tensor names on disk become module paths.

    Attributes:
        name: Short name for messages.
        rewrites: ``(disk prefix, module prefix)`` pairs of whole dotted parts; the longest match
            wins; ``*`` stands for one number. Empty means that names are module paths already.
        config_names_on_disk: Whether servers look layers up by their names on disk, so that a
            quantization configuration holds these; else it holds module paths.
        joined: Prefix on disk of tensors that hold those of several layers, one below the other,
            and the prefixes that each would have alone; ``*`` for the number of a block.
    """

    name: str
    rewrites: tuple[tuple[str, str], ...] = ()
    config_names_on_disk: bool = False
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class ArchSpec:
    """One architecture.

    Attributes:
        name: File name without suffix.
        title: Name for people.
        model_types: Values of ``model_type`` in config.json.
        hf_class: transformers class that runs it.
        towers: In calibration order.
        head: Module path of the output projection; a site with role ``lm_head``.
        embeddings: Module path of the token embedding, to which the head may be tied.
        input_groups: Names of the vision inputs, one group per call of the vision tower, in call
            order.
        vision_token_ids: Config keys of the ids of image and video placeholders.
        audio_inputs: Names of the inputs that hold sounds. Their tower stays in floating point and
            is no unit: passes of the vision tower go without them.
        one_kind: Whether a batch shows pictures or clips, not both: the model's own code cannot
            tell them apart.
        layouts: The first is assumed when a folder has no weights.
        edges: Edges between steps, with absolute paths.
        streams: Residual streams, one for a tower that can be rotated.
        left_alone: Pattern of module or parameter paths -> why they are not quantized.
        tables: Tables beside ``embeddings`` that are looked up by the ids of tokens: only the rows
            of the tokens at hand are read.
        in_some_models: Those of these patterns that match nothing in some models of the family.
        fused: Fuse label -> the layer that servers make of its sites.
        vllm: What vLLM calls its parts; None where vLLM does not have it.
        gguf: What llama.cpp calls its parts; None where llama.cpp does not have it.
        gptq: What readers of GPTQ layers call its parts.
        config_part: Key of the part of the configuration that describes what ``hf_class`` runs,
            where a checkpoint holds several models.
        ignored_tensors: Patterns of tensors on disk that the model's class drops; they are carried
            over into the result as they are.
        experts_stay_stacked: Whether transformers reads experts of the family as stacks alone, and
            makes none of single tensors.
        forgotten_outputs: Module path -> attributes that the model's own code reads of what the
            module puts out, and that transformers gives it not: they are None.
        config_map: Present for remote-code checkpoints that the native class runs.
        processor_map: Likewise.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    hf_class: str
    towers: tuple[Tower, ...]
    head: str
    embeddings: str
    input_groups: tuple[tuple[str, ...], ...]
    vision_token_ids: tuple[str, ...]
    layouts: tuple[Layout, ...]
    one_kind: bool = False
    edges: tuple[Edge, ...] = ()
    streams: tuple[Stream, ...] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    in_some_models: tuple[str, ...] = ()
    fused: Mapping[str, FusedLayer] = field(default_factory=dict)
    vllm: VllmNames | None = None
    gguf: GgufNames | None = None
    gptq: GptqNames = field(default_factory=GptqNames)
    ignored_tensors: tuple[str, ...] = ()
    config_part: str | None = None
    audio_inputs: tuple[str, ...] = ()
    experts_stay_stacked: bool = False
    forgotten_outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    config_map: ConfigMap | None = None
    processor_map: ProcessorMap | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Module paths of experts, ``*`` for the number of a block."""
        return tuple(f"{t.blocks}.*.{path}" for t in self.towers if t.blocks for path in t.experts)

    @property
    def sees(self) -> bool:
        """Whether it is shown pictures or clips; a model of text alone has one tower."""
        return bool(self.input_groups)

    def tower(self, modality: Modality | str) -> Tower:
        """The first tower of a modality.

        Raises:
            ModelError: There is none.
        """
        for tower in self.towers:
            if tower.modality == modality:
                return tower
        raise ModelError(f"{self.title} has no {modality} tower")
