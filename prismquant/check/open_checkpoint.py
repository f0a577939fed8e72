"""Opening a checkpoint for the rules, leniently: what cannot be read is told, the rest checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prismquant.check import vllm_view as vllm
from prismquant.check.checkpoint import GGUF, MODELOPT_FILE, CheckedLayer, Checkpoint
from prismquant.check.target_reader import TargetReader
from prismquant.errors import ModelError, PrismQuantError, StorageError
from prismquant.export.compressed_tensors.stored import other_names
from prismquant.formats.section import (
    CONFIG_KEY,
    Fault,
    Section,
    group_in_prismquant,
    group_in_transformers,
)
from prismquant.formats.section_grammar import read_section
from prismquant.headers import TensorInfo, read_header
from prismquant.models.arch import SiteKind
from prismquant.models.arch_files import known_archs
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.opening import read_json
from prismquant.shards import INDEX_NAME, read_index

# Far more shards than any real checkpoint has.
_MOST_SHARDS = 10_000


def open_checkpoint(folder: Path, target: TargetReader | None) -> Checkpoint:
    """Read what the rules look at.

    Raises:
        ModelError: There is no folder, or no readable ``config.json`` in it.
    """
    config = _config(folder)
    modelopt_file = _modelopt_file(folder)
    read, section = read_section(config), config.get(CONFIG_KEY)
    section = section if isinstance(section, Mapping) else {}
    if not section and modelopt_file and not read.faults:
        # Older exports of ModelOpt say how they are quantized in a file of their own only.
        read, section = Section("modelopt"), {"quant_method": "modelopt"}
    if not config:
        read, section = Section(GGUF), {"quant_method": GGUF}
    headers: dict[str, Mapping[str, TensorInfo]] = {}
    unreadable: dict[str, str] = {}
    index = _index(folder, unreadable)
    for name in _shards(folder, index, unreadable):
        try:
            headers[name] = read_header(folder / name)
        except StorageError as error:
            unreadable[name] = error.what
    model, fault = _model(folder)
    checkpoint = Checkpoint(
        folder=folder,
        target=target,
        config=config,
        section=section,
        read=read,
        headers=headers,
        unreadable=unreadable,
        index=index,
        modelopt_file=modelopt_file,
        model=model,
        model_fault=fault,
        model_known=_is_known(config),
    )
    if model is None:
        return checkpoint
    try:
        return replace(checkpoint, layers=tuple(checked_layers(checkpoint, model)))
    except PrismQuantError as error:
        # Its patterns take too long: the grammar is told, and nothing about layers.
        faults = (*read.faults, Fault("config.pattern", error.what, CONFIG_KEY, error.remedy or ""))
        return replace(
            checkpoint,
            read=replace(read, faults=faults),
            model=None,
            model_fault=error.what,
            model_known=False,
        )


def _config(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"there is no folder {str(folder)!r}")
    if not (folder / "config.json").exists() and any(folder.glob("*.gguf")):
        return {}
    try:
        config = read_json(folder / "config.json")
    except StorageError as error:
        raise ModelError(
            error.what,
            where=str(folder),
            remedy="config.json is written last: without it the run is unfinished, run it "
            "again with --resume; or restore it from the original checkpoint",
        ) from error
    if not isinstance(config, Mapping) or not config:
        raise ModelError(
            "config.json is not an object with keys", where=str(folder / "config.json")
        )
    return config


def _modelopt_file(folder: Path) -> Mapping[str, Any] | None:
    if not (folder / MODELOPT_FILE).is_file():
        return None
    try:
        content = read_json(folder / MODELOPT_FILE)
    except StorageError:
        return {}
    return content if isinstance(content, Mapping) else {}


def _index(folder: Path, unreadable: dict[str, str]) -> Mapping[str, Any] | None:
    try:
        if (weight_map := read_index(folder)) is None:
            return None
        metadata = read_json(folder / INDEX_NAME).get("metadata")
    except StorageError as error:
        unreadable[INDEX_NAME] = error.what
        return None
    return {"weight_map": weight_map, "metadata": metadata}


def _shards(folder: Path, index: Mapping[str, Any] | None, unreadable: dict[str, str]) -> list[str]:
    """Names of shards: those of the index, and those that lie there besides."""
    named = set(index["weight_map"].values()) if index else set()
    if len(named) > _MOST_SHARDS:
        unreadable[INDEX_NAME] = f"the index names {len(named)} shards"
        named = set()
    lying = {path.name for path in folder.glob("*.safetensors") if not path.name.startswith(".")}
    return sorted(named | lying)


def _model(folder: Path) -> tuple[BoundModel | None, str]:
    try:
        return bind(folder, headers_required=False, quantized=True), ""
    except PrismQuantError as error:
        return None, error.what


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether the folder claims to be a model that PrismQuant knows, or claims nothing."""
    kind = config.get("model_type")
    return not isinstance(kind, str) or any(
        kind in arch.model_types for arch in known_archs().values()
    )


def checked_layers(checkpoint: Checkpoint, model: BoundModel) -> Iterator[CheckedLayer]:
    """The linear layers of a model, each with the groups that readers find for it.

    Raises:
        PrismQuantError: The patterns of the configuration take too long.
    """
    sites = {site.name: site for site in model.sites if site.kind is SiteKind.LINEAR}
    spare = [item.name for item in model.left_alone if item.is_linear]
    found = _found_in_vllm(checkpoint, model, [*sites, *spare])
    for name in [*sites, *spare]:
        disk = _disk(model, name)
        called = model.names.in_config(name)
        out_features, in_features = model.shapes[f"{name}.weight"]
        in_transformers = group_in_transformers(called, checkpoint.read)
        in_vllm, group = found.get(name), in_transformers
        if checkpoint.target in (TargetReader.VLLM, TargetReader.SGLANG) and in_vllm is not None:
            group = in_vllm.group
        elif checkpoint.target is TargetReader.PRISMQUANT:
            (names,) = other_names({called: name}, model.arch).values()
            group = group_in_prismquant((called, *names), checkpoint.read)
        yield CheckedLayer(
            name=name,
            called=called,
            disk=disk,
            out_features=out_features,
            in_features=in_features,
            site=sites.get(name),
            is_head=name == model.arch.head,
            group=group,
            in_vllm=in_vllm,
            in_transformers=in_transformers,
        )


def _found_in_vllm(
    checkpoint: Checkpoint, model: BoundModel, names: list[str]
) -> dict[str, vllm.Found]:
    own_names = model.arch.vllm
    if own_names is None or model.arch.config_map is not None:
        return {}
    keys = {site.name: site.fuse_key for site in model.sites}
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(keys.get(name) or name, []).append(name)
    found: dict[str, vllm.Found] = {}
    section = vllm.renamed(checkpoint.read, own_names)
    for key, members in parts.items():
        label = key.rpartition(":")[2] if keys.get(members[0]) else None
        one = vllm.find_group(
            [model.names.in_config(name) for name in members],
            model.arch.fused.get(label or ""),
            section,
            own_names,
            head=members[0] == model.arch.head,
        )
        found |= dict.fromkeys(members, one)
    return found


def _disk(model: BoundModel, name: str) -> str:
    return model.names.to_disk(f"{name}.weight").removesuffix(".weight")
