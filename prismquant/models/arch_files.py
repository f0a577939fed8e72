"""Architecture files: TOML in ``archs/``, one a model family, read into :class:`ArchSpec`.

Reading is strict. An unknown key, a missing key or a reference to a site that does not exist is a
:class:`~prismquant.errors.ModelError` that names the file and the key.
"""

from __future__ import annotations

import fnmatch
import functools
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prismquant.errors import ModelError, suggest
from prismquant.models.arch import (
    ArchSpec,
    Cached,
    Edge,
    EdgeKind,
    Layout,
    Modality,
    Parallel,
    Site,
    SiteKind,
    Stream,
    Tower,
)
from prismquant.models.arch_parts import with_parts
from prismquant.models.reader_names import fused_layers, gguf_names, gptq_names, vllm_names
from prismquant.models.remote_arch import read_config_map, read_processor_map
from prismquant.models.strict_table import StrictTable
from prismquant.opening import read_bounded

if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGED = Path(__file__).parent / "archs"
# An architecture file in a checkpoint's folder: a family that the package does not know.
BESIDE = "prismquant_arch.toml"
_MAX_BYTES = 1 << 20
_E = TypeVar("_E", bound=StrEnum)


@functools.cache
def known_archs() -> Mapping[str, ArchSpec]:
    """All architectures by name, from the package's TOML files.

    Raises:
        ModelError: A file is malformed.
    """
    return {path.stem: load_arch(path) for path in sorted(PACKAGED.glob("*.toml"))}


def load_arch(path: Path) -> ArchSpec:
    """Read one architecture file.

    Args:
        path: A TOML file; its stem is the architecture's name. ``extends`` names a sibling file, or
            one of the package's, whose keys, and those of the file that it extends, hold where this
            one does not set them. A tower may be ``like`` one of the package's parts.

    Raises:
        ModelError: The file is not TOML, has unknown, missing or mistyped keys, or contradicts
            itself.
    """
    data = with_parts(_with_parents(path), str(path), read_toml)
    top = StrictTable(data, str(path), "")
    arch = ArchSpec(
        name=path.stem,
        title=top.text("title"),
        model_types=top.texts("model_types"),
        hf_class=top.text("hf_class"),
        config_part=top.maybe_text("config_part"),
        towers=tuple(_tower(table) for table in top.tables("towers")),
        head=top.text("head"),
        embeddings=top.text("embeddings"),
        input_groups=top.groups("input_groups"),
        vision_token_ids=top.texts("vision_token_ids"),
        audio_inputs=top.texts("audio_inputs", ()),
        one_kind=top.flag("one_kind"),
        layouts=tuple(_layout(table) for table in top.tables("layouts")),
        edges=tuple(_edge(table) for table in top.tables("edges")),
        streams=tuple(_stream(table) for table in top.tables("streams")),
        left_alone=top.strings("left_alone"),
        tables=top.texts("tables", ()),
        in_some_models=top.texts("in_some_models", ()),
        fused=fused_layers(top.table("fused")),
        vllm=vllm_names(top.table("vllm")),
        gguf=gguf_names(top.table("gguf")),
        gptq=gptq_names(top.table("gptq")),
        ignored_tensors=top.texts("ignored_tensors", ()),
        experts_stay_stacked=top.flag("experts_stay_stacked"),
        forgotten_outputs=top.lists("forgotten_outputs"),
        config_map=read_config_map(table) if (table := top.table("config")) else None,
        processor_map=read_processor_map(table) if (table := top.table("processor")) else None,
    )
    top.finish()
    _check(arch, str(path))
    return arch


def _with_parents(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file, and those of the files that it extends where it does not set them."""
    if path in below:
        raise ModelError("an architecture file extends itself", where=str(path))
    data = read_toml(path)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    return {**_with_parents(extended_file(path, parent), (*below, path)), **data}


def extended_file(path: Path, parent: Any) -> Path:
    """The file that another extends: its sibling, or one of the package's.

    Raises:
        ModelError: No file can be called so.
    """
    if not isinstance(parent, str) or Path(parent).name != parent:
        raise ModelError(
            f"extends is {parent!r}, not the name of an architecture file",
            where=str(path),
            remedy="e.g. extends = 'llama'",
        )
    sibling = path.with_name(f"{parent}.toml")
    return sibling if sibling.is_file() else PACKAGED / sibling.name


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of an architecture file alone.

    Raises:
        ModelError: It cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(read_bounded(path, _MAX_BYTES).decode("utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(sorted(item.stem for item in PACKAGED.glob("*.toml")))
        raise ModelError(
            f"there is no architecture file {path.name}",
            where=str(path),
            remedy=f"the package has {known}",
        ) from error
    except OSError as error:
        said = error.strerror or error
        raise ModelError(f"it cannot be read: {said}", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"not a TOML file: {error}", where=str(path)) from error


def _member(table: StrictTable, kind: type[_E], text: str) -> _E:
    try:
        return kind(text)
    except ValueError as error:
        raise table.wrong(f"{text!r} is none of {', '.join(kind)}") from error


def _maybe_member(table: StrictTable, kind: type[_E], key: str) -> _E | None:
    text = table.maybe_text(key)
    return None if text is None else _member(table, kind, text)


def _tower(table: StrictTable) -> Tower:
    if (part := table.maybe_text("like")) is not None:
        table = table.called(f"like {part!r}")
    tower = Tower(
        modality=_member(table, Modality, table.text("modality")),
        root=table.text("root"),
        entry=table.maybe_text("entry"),
        blocks=table.maybe_text("blocks"),
        modules=table.texts("modules", ()),
        experts=table.texts("experts", ()),
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
    if tower.experts and tower.blocks is None:
        raise table.wrong("experts are paths within blocks")
    starred = {site.path.split(".*.")[0] for site in tower.sites if "*" in site.path}
    if strange := sorted(starred ^ set(tower.experts)):
        raise table.wrong(f"experts and sites with `*` in their paths differ: {strange[0]!r}")
    if (tower.blocks is None) != (tower.depth is None):
        raise table.wrong("blocks and depth come together")
    if (tower.entry is None) != (not tower.entry_sites):
        raise table.wrong("entry and entry_sites come together")
    somewhere = [site.path for site in tower.sites if site.in_blocks_with is not None]
    if somewhere and tower.blocks is None:
        raise table.wrong(f"in_blocks_with of {somewhere[0]!r}: a tower of modules has no blocks")
    return tower


def _site(table: StrictTable) -> Site:
    site = Site(
        role=table.text("role"),
        path=table.text("path"),
        stage=table.number("stage", 0),
        input=table.text("input"),
        kind=_member(table, SiteKind, table.maybe_text("kind") or "linear"),
        fuse=table.maybe_text("fuse"),
        parallel=_maybe_member(table, Parallel, "parallel"),
        closes_stream=table.flag("closes_stream"),
        elementwise=table.flag("elementwise"),
        online_rotation=table.flag("online_rotation"),
        cache=_maybe_member(table, Cached, "cache"),
        in_blocks_with=table.maybe_text("in_blocks_with"),
    )
    table.finish()
    return site


def _edge(table: StrictTable) -> Edge:
    edge = Edge(
        kind=_member(table, EdgeKind, table.text("kind")),
        norm=table.maybe_text("norm"),
        producer=table.maybe_text("producer"),
        consumers=table.texts("consumers"),
        part=table.maybe_text("part"),
        inner=table.flag("inner"),
        gated=table.flag("gated"),
    )
    table.finish()
    if edge.inner and edge.kind is not EdgeKind.NORM:
        raise table.wrong("inner is said of norms")
    if edge.gated and edge.kind is not EdgeKind.VALUE:
        raise table.wrong("gated is said of values")
    if (edge.kind is EdgeKind.NORM) != (edge.norm is not None) or (edge.norm and edge.producer):
        raise table.wrong("kind 'norm' has a norm, the other kinds have a producer")
    if not edge.source or not edge.consumers:
        raise table.wrong("an edge needs two ends")
    if edge.part not in (None, "v", "up"):
        raise table.wrong(f"part can only be 'v' or 'up', not {edge.part!r}")
    return edge


def _stream(table: StrictTable) -> Stream:
    stream = Stream(
        modality=_member(table, Modality, table.text("modality")),
        writers=table.texts("writers"),
        norms=table.texts("norms"),
    )
    table.finish()
    if not stream.writers or not stream.norms:
        raise table.wrong("a stream has writers and norms")
    return stream


def _layout(table: StrictTable) -> Layout:
    name, pairs = table.text("name"), table.strings("rewrites")
    config_names_on_disk = table.flag("config_names_on_disk")
    joined = table.lists("joined")
    table.finish()
    if len(set(pairs.values())) != len(pairs):
        raise table.wrong("two disk prefixes map to one module prefix")
    return Layout(name, tuple(pairs.items()), config_names_on_disk, tuple(joined.items()))


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
            beside = {one for one in edge.consumers if _left_alone(arch, tower, one)}
            ends = set(edge.consumers) - beside
            if edge.kind is not EdgeKind.NORM:
                ends.add(edge.source)
            if strange := sorted(ends - inputs.keys()):
                raise ModelError(
                    f"an edge of the {tower.modality} tower names {strange[0]!r}, which is no site",
                    where=file,
                    remedy=suggest(strange[0], paths),
                )
            # A consumer list that leaves out a reader of the same tensor would change the function.
            labels = {inputs[path] for path in edge.consumers if path not in beside}
            readers = {site.path for site in tower.sites if site.input in labels}
            if readers != set(edge.consumers) - beside:
                raise ModelError(
                    f"the edge from {edge.source!r} must list all readers: {sorted(readers)}",
                    where=file,
                )
    _check_streams(arch, file)


def _left_alone(arch: ArchSpec, tower: Tower, path: str) -> bool:
    """Whether a layer of a block is left alone in some blocks."""
    name = f"{tower.blocks}.0.{path}"
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in arch.left_alone)


def _check_streams(arch: ArchSpec, file: str) -> None:
    """A tower has one stream at most, and its blocks' own writers and norms are not forgotten."""
    modalities = [stream.modality for stream in arch.streams]
    if len(set(modalities)) != len(modalities):
        raise ModelError("a tower has two residual streams", where=file)
    for stream in arch.streams:
        for tower in arch.towers:
            if tower.blocks is None or tower.modality is not stream.modality:
                continue
            writers = {site.path for site in tower.sites if site.closes_stream}
            norms = {e.norm for e in tower.edges if e.norm is not None and not e.inner}
            for paths, listed in ((writers, stream.writers), (norms, stream.norms)):
                expected = {f"{tower.blocks}.*.{path}" for path in paths}
                if forgotten := sorted(expected - set(listed)):
                    raise ModelError(
                        f"the {stream.modality} tower's residual stream lacks {forgotten[0]!r}",
                        where=file,
                    )
