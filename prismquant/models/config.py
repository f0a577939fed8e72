"""From a checkpoint folder to its architecture and its configuration.

:func:`identify` says which architecture a folder holds, :func:`native_config` reads or converts its
configuration, and refuses one that describes no model or not this one. transformers is imported
here, and only when it is needed.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prismquant.errors import ModelError, StorageError, brief, suggest
from prismquant.headers import TensorInfo
from prismquant.models.arch import ArchSpec
from prismquant.models.arch_files import known_archs, load_arch
from prismquant.models.given_arch import own_arch_file
from prismquant.models.names import any_layout
from prismquant.opening import read_json
from prismquant.shards import ShardReader, read_index

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

# A configuration has some kilobytes.
_MAX_CONFIG_BYTES = 16 << 20
# What a config may count to: far above any real model, and built in seconds. Zero is none.
_MOST = {
    **dict.fromkeys(("depth", "num_hidden_layers"), 500),
    **dict.fromkeys(
        [
            *("hidden_size", "intermediate_size", "embed_dim", "out_hidden_size", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "num_heads", "num_channels"),
            *("in_channels", "in_chans", "patch_size", "spatial_patch_size", "image_size"),
            *("temporal_patch_size", "spatial_merge_size", "window_size"),
            "num_position_embeddings",
        ],
        1_000_000,
    ),
    "vocab_size": 10_000_000,
    "max_position_embeddings": 2**31,
}
_LONGEST_LIST = 1000
# What any config may say of itself.
_ANY_CONFIG = frozenset(
    [
        *("architectures", "auto_map", "model_type", "transformers_version", "_name_or_path"),
        *("dtype", "torch_dtype", "use_cache", "_attn_implementation", "attn_implementation"),
        "quantization_config",
    ]
)
# How near an unknown key is to the one that was probably meant.
_LIKE = 0.85
_IMPORTING = threading.Lock()


# ------------------------------------------------------------------------------------------ folder


def identify(folder: Path | str) -> ArchSpec:
    """Say which architecture a checkpoint folder holds.

    A file that a caller gives comes first, then one that lies in the folder, then the package's.

    Raises:
        ModelError: There is no folder or no config.json, a file is broken, or no architecture file
            describes its model type.
    """
    config = read_config(Path(folder))
    model_type = config.get("model_type")
    if (own := own_arch_file(Path(folder), model_type)) is not None:
        return load_arch(own)
    by_type = {kind: arch for arch in known_archs().values() for kind in arch.model_types}
    if isinstance(model_type, str) and model_type in by_type:
        return by_type[model_type]
    where = str(Path(folder) / "config.json")
    if not isinstance(model_type, str):
        raise ModelError(
            "config.json has no model_type"
            if model_type is None
            else f"config.json: model_type is {model_type!r}, not a name",
            where=where,
            remedy=f"use a checkpoint of one of: {', '.join(sorted(by_type))}",
        )
    raise ModelError(
        f"no architecture describes model_type {model_type!r}",
        where=where,
        remedy=f"{suggest(model_type, by_type)}; or describe it yourself: docs/families.md",
    )


def native_config(
    arch: ArchSpec, folder: Path | str, infos: Mapping[str, TensorInfo] | None = None
) -> Any:
    """The native transformers config of a folder; a remote-code config is converted.

    No code of the folder runs, whatever its ``auto_map`` says.

    Args:
        arch: The architecture.
        folder: The checkpoint.
        infos: What :func:`header_infos` says of it, where that is at hand.

    Raises:
        ModelError: The config has values that the native classes do not implement, lacks some,
            counts to more than any model has, or to another number of blocks than the shards hold.
        StorageError: A shard's header is broken.
    """
    folder = Path(folder)
    _check_counts(read_config(folder), folder)
    infos = header_infos(folder) if infos is None else infos
    if arch.config_map is not None:
        from prismquant.models.remote_config import converted_values  # of few checkpoints

        values = converted_values(arch.config_map, read_config(folder), folder, infos)
        try:
            config = getattr(import_transformers(), arch.config_map.hf_class)(**values)
        except Exception as error:
            raise _bad_config(arch, folder, error) from error
    else:
        transformers = import_transformers()
        try:
            config = transformers.AutoConfig.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            raise _bad_config(arch, folder, error) from error
        if arch.config_part is not None:
            # A checkpoint of that part alone has no such key.
            config = getattr(config, arch.config_part, config)
    _check_depth(arch, config, folder, infos)
    return config


def _check_counts(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse sizes and numbers that no model has, before anything is built by them."""
    findings: list[str] = []
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        path, section = waiting.pop()
        for key, value in section.items():
            if isinstance(value, list) and len(value) > _LONGEST_LIST:
                findings.append(f"{path}{key} lists {len(value)} values")
            if isinstance(value, dict) and key != "quantization_config":
                waiting.append((f"{path}{key}.", value))
            if key.endswith("_config") and not isinstance(value, dict | None):
                findings.append(f"{path}{key} holds a {type(value).__name__}, not an object")
            if key in _MOST and value is not None and not _is_count(value, _MOST[key]):
                said = textwrap.shorten(repr(value), 40)
                findings.append(f"{path}{key} is {said}, not a whole number from 1 to {_MOST[key]}")
    if findings:
        raise ModelError(
            "config.json describes no model: " + "; ".join(findings[:6]),
            where=str(folder / "config.json"),
            remedy="restore config.json from the original checkpoint",
        )


def _is_count(value: Any, most: int) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return all(type(item) is int and 1 <= item <= most for item in values)


def _check_depth(
    arch: ArchSpec, config: Any, folder: Path, infos: Mapping[str, TensorInfo]
) -> None:
    """Refuse a number of blocks that the shards do not hold: they are the truth."""
    names = any_layout(arch.layouts)
    stored = [
        names.to_module(name)
        for name in infos.keys() or read_index(folder) or {}
        if names.knows(name) and not is_ignored(arch, name)
    ]
    findings: list[str] = []
    for tower in arch.towers:
        if tower.blocks is None or tower.depth is None:
            continue
        prefix = f"{tower.blocks}."
        numbers = {name[len(prefix) :].split(".")[0] for name in stored if name.startswith(prefix)}
        held = max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
        said = config_value(config, tower.depth)
        if held and held != said:
            findings.append(f"{tower.depth} is {said}, but the shards hold {held} blocks")
    if findings:
        raise ModelError(
            f"config.json and the shards are not of one model: {'; '.join(findings)}",
            where=str(folder / "config.json"),
            remedy="restore config.json, or the shards, from the original checkpoint",
        )


def unused_keys(arch: ArchSpec, folder: Path, config: Any) -> list[str]:
    """Keys of config.json that nobody reads, although they seem to be meant for somebody.

    Args:
        arch: The architecture.
        folder: The checkpoint.
        config: Its native config.

    Returns:
        Of a config that was converted, all that have no place in it; else those that look like a
        misspelt one. A few words each.
    """
    raw, table = read_config(folder), arch.config_map
    if table is not None:
        known = {*vars(config), *table.keys, *table.require, *table.unused, *_ANY_CONFIG}
        for section in table.sections:
            known |= {section.source} if section.source else set(section.keys)
        return sorted(raw.keys() - known)
    parts = {"": config} | {name: getattr(config, name, None) for name in config.sub_configs}
    found = []
    for name, part in parts.items():
        given = (raw.get(name) or {}) if name else raw
        fields = vars(type(part)()).keys() if part is not None else set()
        for key in sorted(given.keys() - fields - _ANY_CONFIG):
            near = difflib.get_close_matches(key, fields - given.keys(), n=1, cutoff=_LIKE)
            if near:
                found.append(f"{name}.{key}".lstrip(".") + f" (did you mean {near[0]!r}?)")
    return found


def is_ignored(arch: ArchSpec, disk_name: str) -> bool:
    """Whether a tensor on disk is known not to be needed."""
    return any(fnmatch.fnmatchcase(disk_name, pattern) for pattern in arch.ignored_tensors)


def config_value(config: Any, key: str) -> Any:
    """A value by dotted key, e.g. ``text_config.hidden_size``.

    Raises:
        ModelError: The config has no such key, or one for each block.
    """
    value = config
    for part in key.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            raise ModelError(f"the config has no {key!r}") from error
        except Exception as error:  # transformers' own kind, which not all of its versions have
            raise ModelError(f"{key!r} differs from block to block") from error
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Raises:
        ModelError: There is no such folder, it cannot be read, or has no config.json that is one.
    """
    found = _listed(folder)
    path = folder / "config.json"
    if path.name not in found:
        from prismquant.models.other_folders import no_config  # of no model

        raise no_config(folder, found)
    try:
        config = read_json(path, _MAX_CONFIG_BYTES)
    except StorageError as error:
        raise ModelError(error.what, where=error.where, remedy=error.remedy) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"config.json holds a {type(config).__name__}, not an object",
            where=str(path),
            remedy="restore the file from the original checkpoint",
        )
    return config


def _listed(folder: Path) -> list[str]:
    """Names of what a model folder holds, sorted."""
    try:
        return sorted(item.name for item in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ModelError(
            f"there is no model folder {str(folder)!r}",
            remedy="give a folder with config.json and *.safetensors; download hub models first",
        ) from error
    except OSError as error:
        raise ModelError(
            f"the model folder cannot be read: {error.strerror or error}",
            where=str(folder),
            remedy="check its name and who may read it",
        ) from error


def _bad_config(arch: ArchSpec, folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"transformers refuses the config of this {arch.title}: {brief(error)}",
        where=str(folder / "config.json"),
        remedy="restore config.json from the original checkpoint",
    )


# ------------------------------------------------------------------------------- config conversion


# ---------------------------------------------------------------------------------- transformers


@functools.cache
def import_transformers() -> ModuleType:
    """Import transformers, also where torchvision lacks its compiled operators.

    transformers imports torchvision whenever it is installed. A torchvision built for another torch
    loads none of its operators, and then its own import fails because it describes two of them,
    ``nms`` and ``qnms``. Only detection models call these; declaring their schemas lets the import
    succeed.

    Raises:
        ModelError: transformers is not installed.
    """
    # One thread at a time: another would find half of a module.
    with _IMPORTING:
        _import_torchvision()
        try:
            return importlib.import_module("transformers")
        except ImportError as error:
            raise ModelError("transformers is missing", remedy="pip install prismquant") from error


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_torchvision_operators()
        importlib.import_module("torchvision")


@functools.cache
def _declare_torchvision_operators() -> torch.library.Library:
    # The library object must stay alive, or its definitions vanish: hence the cache.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def header_infos(folder: Path) -> dict[str, TensorInfo]:
    """Headers of a folder's shards; nothing without shards.

    Raises:
        StorageError: A shard or the index is broken.
    """
    if not any(folder.glob("*.safetensors")):
        return {}
    reader = ShardReader(folder)
    return {name: reader.info(name) for name in reader.names}
