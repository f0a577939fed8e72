"""What an architecture is: towers, sites and edges, as data.

One TOML file in ``archs/`` describes one model family. It says which modules can be quantized
(sites), in which order they run, what shares an input, what must share a scheme because servers
fuse it, which float rescalings leave the function unchanged (edges), and how checkpoints name their
tensors (layouts). There is no code per model: a new family is a new file.

Loading is strict. An unknown key, a missing key or a reference to a site that does not exist is a
:class:`~prismquant.errors.ModelError` that names the file and the key.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prismquant.errors import ModelError, suggest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_FOLDER = Path(__file__).parent / "archs"
_E = TypeVar("_E", bound=StrEnum)
# What a block adds to the residual stream.
_RESIDUAL_ROLES = ("attn.out", "mlp.down")


class Modality(StrEnum):
    """Which part of the model a layer belongs to."""

    VISION = "vision"
    PROJECTOR = "projector"
    LLM = "llm"


class SiteKind(StrEnum):
    """How a site's weight becomes a matrix."""

    LINEAR = "linear"
    # A convolution whose kernel equals its stride reads disjoint patches: a reshaped matrix.
    PATCH_CONV = "patch_conv"


class EdgeKind(StrEnum):
    """Which rescaling an edge allows without changing the float function."""

    # norm weight (and bias) times s, consumer columns divided by s
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
        path: Module path relative to the step's module.
        kind: Linear layer or patch convolution.
        stage: Order inside the step; sites of one stage are calibrated in one pass.
        input: Label of the tensor it reads; sites of a step with equal labels read the same tensor.
        fuse: Sites of a step with the same label become one matrix in servers: they share a scheme.
    """

    role: str
    path: str
    kind: SiteKind
    stage: int
    input: str
    fuse: str | None = None


@dataclass(frozen=True)
class Edge:
    """Two ends between which scale can move.

    Paths are relative to the step's module, or absolute where an :class:`ArchSpec` holds the edge.

    Attributes:
        kind: What the ends are.
        norm: The norm at the upper end, for kind ``norm``.
        producer: The linear at the upper end, for the other kinds.
        consumers: All linears that read the upper end's output; the list is complete.
        part: ``v`` when the producer is a fused query-key-value layer, of which the last third
            counts.
    """

    kind: EdgeKind
    norm: str | None
    producer: str | None
    consumers: tuple[str, ...]
    part: str | None = None

    @property
    def source(self) -> str:
        """The upper end: the norm or the producer."""
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
    entry_sites: tuple[Site, ...] = ()
    sites: tuple[Site, ...] = ()
    edges: tuple[Edge, ...] = ()
    depth: str | None = None
    heads: str | None = None
    kv_heads: str | None = None


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
    """How tensor names on disk become module paths.

    Attributes:
        name: Short name for messages.
        rewrites: ``(disk prefix, module prefix)`` pairs of whole dotted parts; the longest match
            wins. Empty means that names are module paths already.
    """

    name: str
    rewrites: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Inference:
    """How a missing config value follows from the safetensors headers or from another value.

    Exactly one of three forms: the size of ``tensor`` along ``axis``; the ``count`` of numbered
    members below a path; or the value of key ``divide`` divided by ``by``.
    """

    tensor: str | None = None
    axis: int = 0
    count: str | None = None
    divide: str | None = None
    by: int = 1


@dataclass(frozen=True)
class ConfigSection:
    """One part of a converted config.

    Attributes:
        target: Key in the native config, e.g. ``text_config``.
        source: Key of the sub-dictionary that is read; empty for the top level.
        values: Constants, e.g. the native model type.
        keys: Keys that are copied when present.
        infer: Native key -> how to find it when the source dictionary does not have it.
    """

    target: str
    source: str
    values: Mapping[str, str]
    keys: tuple[str, ...]
    infer: Mapping[str, Inference]


@dataclass(frozen=True)
class ConfigMap:
    """How the config.json of a remote-code checkpoint becomes a native config.

    Attributes:
        hf_class: Native config class.
        keys: Top-level keys that are copied when present.
        require: Top-level key -> the only value that the native class implements.
        unused: Top-level keys of released checkpoints that change nothing here.
        tokens: Native key -> text of the added token whose id it takes.
        sections: Sub-configs.
    """

    hf_class: str
    keys: tuple[str, ...]
    require: Mapping[str, str]
    unused: tuple[str, ...]
    tokens: Mapping[str, str]
    sections: tuple[ConfigSection, ...]


@dataclass(frozen=True)
class ProcessorMap:
    """How a native processor is built for a checkpoint whose own processor is remote code.

    Attributes:
        hf_class, image_class, video_class: Native classes.
        keys: Keys copied from preprocessor_config.json to both image and video processor.
        min_tokens, max_tokens: Keys that hold a size in visual tokens; multiplied by the pixels of
            a token.
        chat_template: Jinja template that writes one placeholder per image or video.
    """

    hf_class: str
    image_class: str
    video_class: str
    keys: tuple[str, ...]
    min_tokens: str
    max_tokens: str
    chat_template: str


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
        layouts: The first is assumed when a folder has no weights.
        edges: Edges between steps, with absolute paths.
        streams: Residual streams, one for a tower that can be rotated.
        left_alone: Path pattern -> why these layers are not quantizable.
        ignored_tensors: Patterns of tensors on disk that the model does not need.
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
    edges: tuple[Edge, ...] = ()
    streams: tuple[Stream, ...] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)
    ignored_tensors: tuple[str, ...] = ()
    config_map: ConfigMap | None = None
    processor_map: ProcessorMap | None = None

    def tower(self, modality: Modality | str) -> Tower:
        """The first tower of a modality.

        Raises:
            ModelError: There is none.
        """
        for tower in self.towers:
            if tower.modality == modality:
                return tower
        raise ModelError(f"{self.title} has no {modality} tower")


@functools.cache
def known_archs() -> Mapping[str, ArchSpec]:
    """All architectures by name, from the package's TOML files.

    Raises:
        ModelError: A file is malformed.
    """
    return {path.stem: load_arch(path) for path in sorted(_FOLDER.glob("*.toml"))}


def load_arch(path: Path) -> ArchSpec:
    """Read one architecture file.

    Args:
        path: A TOML file; its stem is the architecture's name. ``extends`` names a sibling file
            whose keys hold where this one does not set them.

    Raises:
        ModelError: The file is not TOML, has unknown, missing or mistyped keys, or contradicts
            itself.
    """
    data = _read_toml(path)
    parent = data.pop("extends", None)
    if parent is not None:
        data = {**_read_toml(path.with_name(f"{parent}.toml")), **data}
    top = _Table(data, str(path), "")
    arch = ArchSpec(
        name=path.stem,
        title=top.text("title"),
        model_types=top.texts("model_types"),
        hf_class=top.text("hf_class"),
        towers=tuple(_tower(table) for table in top.tables("towers")),
        head=top.text("head"),
        embeddings=top.text("embeddings"),
        input_groups=top.groups("input_groups"),
        vision_token_ids=top.texts("vision_token_ids"),
        layouts=tuple(_layout(table) for table in top.tables("layouts")),
        edges=tuple(_edge(table) for table in top.tables("edges")),
        streams=tuple(_stream(table) for table in top.tables("streams")),
        left_alone=top.strings("left_alone"),
        ignored_tensors=top.texts("ignored_tensors", ()),
        config_map=_config_map(table) if (table := top.table("config")) else None,
        processor_map=_processor_map(table) if (table := top.table("processor")) else None,
    )
    top.finish()
    _check(arch, str(path))
    return arch


class _Table:
    """A TOML table that knows where it is and which of its keys were read."""

    def __init__(self, data: Mapping[str, Any], file: str, path: str) -> None:
        self._data = data
        self._file = file
        self._path = path
        self._read: set[str] = set()

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str):
            raise self._mistyped(key, "a string", value)
        return value

    def maybe_text(self, key: str) -> str | None:
        self._read.add(key)
        return self.text(key) if key in self._data else None

    def number(self, key: str, default: int | None = None) -> int:
        if key not in self._data and default is not None:
            self._read.add(key)
            return default
        value = self._take(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._mistyped(key, "a whole number", value)
        return value

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        if key not in self._data and default is not None:
            self._read.add(key)
            return default
        value = self._take(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._mistyped(key, "a list of strings", value)
        return tuple(value)

    def groups(self, key: str) -> tuple[tuple[str, ...], ...]:
        value = self._take(key)
        ok = isinstance(value, list) and all(
            isinstance(group, list) and all(isinstance(item, str) for item in group)
            for group in value
        )
        if not ok:
            raise self._mistyped(key, "a list of lists of strings", value)
        return tuple(tuple(group) for group in value)

    def strings(self, key: str) -> dict[str, str]:
        table = self.table(key)
        if table is None:
            return {}
        result = {name: table.text(name) for name in table._data}
        table.finish()
        return result

    def table(self, key: str) -> _Table | None:
        self._read.add(key)
        if key not in self._data:
            return None
        value = self._take(key)
        if not isinstance(value, dict):
            raise self._mistyped(key, "a table", value)
        return _Table(value, self._file, f"{self._path}{key}.")

    def tables(self, key: str) -> Iterator[_Table]:
        value = self._data.get(key, [])
        self._read.add(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._mistyped(key, "a list of tables", value)
        return (
            _Table(item, self._file, f"{self._path}{key}[{index}].")
            for index, item in enumerate(value)
        )

    def children(self) -> Iterator[tuple[str, _Table]]:
        """All members, each of which must be a table."""
        for key in self._data:
            table = self.table(key)
            if table is not None:
                yield key, table

    def finish(self) -> None:
        """Refuse keys that nobody asked for."""
        for key in self._data:
            if key not in self._read:
                raise ModelError(
                    f"unknown key {self._path + key!r}",
                    where=self._file,
                    remedy=suggest(key, self._read),
                )

    def wrong(self, message: str) -> ModelError:
        return ModelError(f"{self._path.rstrip('.') or 'file'}: {message}", where=self._file)

    def _take(self, key: str) -> Any:
        self._read.add(key)
        if key not in self._data:
            raise ModelError(
                f"key {self._path + key!r} is missing",
                where=self._file,
                remedy=f"add it; present here: {', '.join(sorted(self._data)) or 'nothing'}",
            )
        return self._data[key]

    def _mistyped(self, key: str, expected: str, value: Any) -> ModelError:
        return ModelError(
            f"key {self._path + key!r} must be {expected}, not {value!r}", where=self._file
        )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"there is no architecture file {path.name}", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"not a TOML file: {error}", where=str(path)) from error


def _member(table: _Table, kind: type[_E], text: str) -> _E:
    try:
        return kind(text)
    except ValueError as error:
        raise table.wrong(f"{text!r} is none of {', '.join(kind)}") from error


def _tower(table: _Table) -> Tower:
    tower = Tower(
        modality=_member(table, Modality, table.text("modality")),
        root=table.text("root"),
        entry=table.maybe_text("entry"),
        blocks=table.maybe_text("blocks"),
        modules=table.texts("modules", ()),
        entry_sites=tuple(_site(item) for item in table.tables("entry_sites")),
        sites=tuple(_site(item) for item in table.tables("sites")),
        edges=tuple(_edge(item) for item in table.tables("edges")),
        depth=table.maybe_text("depth"),
        heads=table.maybe_text("heads"),
        kv_heads=table.maybe_text("kv_heads"),
    )
    table.finish()
    if (tower.blocks is None) == (not tower.modules):
        raise table.wrong("a tower has either blocks or modules")
    if (tower.blocks is None) != (tower.depth is None):
        raise table.wrong("blocks and depth come together")
    if (tower.entry is None) != (not tower.entry_sites):
        raise table.wrong("entry and entry_sites come together")
    return tower


def _site(table: _Table) -> Site:
    site = Site(
        role=table.text("role"),
        path=table.text("path"),
        stage=table.number("stage", 0),
        input=table.text("input"),
        kind=_member(table, SiteKind, table.maybe_text("kind") or "linear"),
        fuse=table.maybe_text("fuse"),
    )
    table.finish()
    return site


def _edge(table: _Table) -> Edge:
    edge = Edge(
        kind=_member(table, EdgeKind, table.text("kind")),
        norm=table.maybe_text("norm"),
        producer=table.maybe_text("producer"),
        consumers=table.texts("consumers"),
        part=table.maybe_text("part"),
    )
    table.finish()
    if (edge.kind is EdgeKind.NORM) != (edge.norm is not None) or (edge.norm and edge.producer):
        raise table.wrong("kind 'norm' has a norm, the other kinds have a producer")
    if not edge.source or not edge.consumers:
        raise table.wrong("an edge needs two ends")
    if edge.part not in (None, "v"):
        raise table.wrong(f"part can only be 'v', not {edge.part!r}")
    return edge


def _stream(table: _Table) -> Stream:
    stream = Stream(
        modality=_member(table, Modality, table.text("modality")),
        writers=table.texts("writers"),
        norms=table.texts("norms"),
    )
    table.finish()
    if not stream.writers or not stream.norms:
        raise table.wrong("a stream has writers and norms")
    return stream


def _layout(table: _Table) -> Layout:
    name, pairs = table.text("name"), table.strings("rewrites")
    table.finish()
    if len(set(pairs.values())) != len(pairs):
        raise table.wrong("two disk prefixes map to one module prefix")
    return Layout(name, tuple(pairs.items()))


def _config_map(table: _Table) -> ConfigMap:
    config = ConfigMap(
        hf_class=table.text("hf_class"),
        keys=table.texts("keys"),
        require=table.strings("require"),
        unused=table.texts("unused", ()),
        tokens=table.strings("tokens"),
        sections=tuple(_section(item) for item in table.tables("sections")),
    )
    table.finish()
    return config


def _section(table: _Table) -> ConfigSection:
    section = ConfigSection(
        target=table.text("target"),
        source=table.maybe_text("source") or "",
        values=table.strings("values"),
        keys=table.texts("keys"),
        infer=_inferences(table.table("infer")),
    )
    table.finish()
    return section


def _inferences(table: _Table | None) -> dict[str, Inference]:
    result: dict[str, Inference] = {}
    if table is None:
        return result
    for key, item in table.children():
        result[key] = Inference(
            tensor=item.maybe_text("tensor"),
            axis=item.number("axis", 0),
            count=item.maybe_text("count"),
            divide=item.maybe_text("divide"),
            by=item.number("by", 1),
        )
        item.finish()
        given = (result[key].tensor, result[key].count, result[key].divide)
        if sum(value is not None for value in given) != 1:
            raise item.wrong("give exactly one of tensor, count and divide")
    return result


def _processor_map(table: _Table) -> ProcessorMap:
    processor = ProcessorMap(
        hf_class=table.text("hf_class"),
        image_class=table.text("image_class"),
        video_class=table.text("video_class"),
        keys=table.texts("keys"),
        min_tokens=table.text("min_tokens"),
        max_tokens=table.text("max_tokens"),
        chat_template=table.text("chat_template"),
    )
    table.finish()
    return processor


def _check(arch: ArchSpec, file: str) -> None:
    """Refuse contradictions that the types cannot show."""
    if not arch.towers or not arch.layouts:
        raise ModelError("an architecture needs towers and layouts", where=file)
    pairs = {pair for layout in arch.layouts for pair in layout.rewrites}
    if len({disk for disk, _ in pairs}) != len(pairs):
        raise ModelError("two layouts read one disk prefix as different modules", where=file)
    for tower in arch.towers:
        paths = [site.path for site in tower.sites]
        if len(set(paths)) != len(paths):
            raise ModelError(f"a site of the {tower.modality} tower is listed twice", where=file)
        inputs = {site.path: site.input for site in tower.sites}
        for edge in tower.edges:
            ends = set(edge.consumers)
            if edge.kind is not EdgeKind.NORM:
                ends.add(edge.source)
            if strange := sorted(ends - inputs.keys()):
                raise ModelError(
                    f"an edge of the {tower.modality} tower names {strange[0]!r}, which is no site",
                    where=file,
                    remedy=suggest(strange[0], paths),
                )
            # A consumer list that leaves out a reader of the same tensor would change the function.
            labels = {inputs[path] for path in edge.consumers}
            readers = {site.path for site in tower.sites if site.input in labels}
            if readers != set(edge.consumers):
                raise ModelError(
                    f"the edge from {edge.source!r} must list all readers: {sorted(readers)}",
                    where=file,
                )
    _check_streams(arch, file)


def _check_streams(arch: ArchSpec, file: str) -> None:
    """A tower has one stream at most, and its blocks' own writers and norms are not forgotten."""
    modalities = [stream.modality for stream in arch.streams]
    if len(set(modalities)) != len(modalities):
        raise ModelError("a tower has two residual streams", where=file)
    for stream in arch.streams:
        for tower in arch.towers:
            if tower.blocks is None or tower.modality is not stream.modality:
                continue
            writers = {site.path for site in tower.sites if site.role in _RESIDUAL_ROLES}
            norms = {edge.norm for edge in tower.edges if edge.norm is not None}
            for paths, listed in ((writers, stream.writers), (norms, stream.norms)):
                expected = {f"{tower.blocks}.*.{path}" for path in paths}
                if forgotten := sorted(expected - set(listed)):
                    raise ModelError(
                        f"the {stream.modality} tower's residual stream lacks {forgotten[0]!r}",
                        where=file,
                    )
