"""From a checkpoint folder to a configuration, and to a model without weights.

:func:`identify` says which architecture a folder holds, :func:`native_config` reads or converts its
configuration, :func:`empty_model` builds the model that it describes with parameters that take no
memory. transformers is imported here, and only when it is needed.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismquant.errors import ModelError, StorageError, suggest
from prismquant.headers import TensorInfo
from prismquant.models.arch import (
    ArchSpec,
    ConfigMap,
    ConfigSection,
    Inference,
    known_archs,
)
from prismquant.storage import INDEX_NAME, ShardReader, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

# Keys that only a vision-language config has.
_VISION_KEYS = (
    "vision_config",
    "vision_encoder_config",
    "vision_encoder",
    "visual",
    "mm_vision_tower",
    "vision_tower",
)


# ------------------------------------------------------------------------------------------ folder


def identify(folder: Path | str) -> ArchSpec:
    """Say which architecture a checkpoint folder holds.

    Raises:
        ModelError: There is no folder or no config.json, the file is broken, the model is
            text-only, or no architecture file describes its model type.
    """
    config = read_config(Path(folder))
    model_type = config.get("model_type")
    by_type = {kind: arch for arch in known_archs().values() for kind in arch.model_types}
    if isinstance(model_type, str) and model_type in by_type:
        return by_type[model_type]
    where = str(Path(folder) / "config.json")
    if not isinstance(model_type, str):
        raise ModelError(
            "config.json has no model_type",
            where=where,
            remedy=f"use a checkpoint of one of: {', '.join(sorted(by_type))}",
        )
    if not any(config.get(key) for key in _VISION_KEYS):
        raise ModelError(
            f"model_type {model_type!r} is a text-only model: config.json has no vision part",
            where=where,
            remedy=f"use a vision-language checkpoint; {suggest(model_type, by_type)}",
        )
    raise ModelError(
        f"no architecture describes model_type {model_type!r}",
        where=where,
        remedy=suggest(model_type, by_type),
    )


def native_config(arch: ArchSpec, folder: Path | str) -> Any:
    """The native transformers config of a folder; a remote-code config is converted.

    Raises:
        ModelError: The config has values that the native classes do not implement, or lacks some.
    """
    folder = Path(folder)
    if arch.config_map is not None:
        return _converted(arch, arch.config_map, folder)
    read_config(folder)
    transformers = import_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise _bad_config(arch, folder, error) from error


def config_value(config: Any, key: str) -> Any:
    """A value by dotted key, e.g. ``text_config.hidden_size``.

    Raises:
        ModelError: The config has no such key.
    """
    value = config
    for part in key.split("."):
        if not hasattr(value, part):
            raise ModelError(f"the config has no {key!r}")
        value = getattr(value, part)
    return value


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(
            f"there is no model folder {str(folder)!r}",
            remedy="give a folder with config.json and *.safetensors; download hub models first",
        )
    path = folder / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(item.name for item in folder.iterdir())[:6]) or "nothing"
        raise ModelError(
            f"the model folder has no config.json; it holds {found}",
            where=str(folder),
            remedy="give the folder of a Hugging Face checkpoint",
        )
    try:
        config = read_json(path)
    except StorageError as error:
        raise ModelError(error.what, where=error.where, remedy=error.remedy) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"config.json holds a {type(config).__name__}, not an object",
            where=str(path),
            remedy="restore the file from the original checkpoint",
        )
    return config


def _bad_config(arch: ArchSpec, folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"transformers refuses the config of this {arch.title}: {error}",
        where=str(folder / "config.json"),
        remedy="restore config.json from the original checkpoint",
    )


# ------------------------------------------------------------------------------- config conversion


def _converted(arch: ArchSpec, table: ConfigMap, folder: Path) -> Any:
    raw = read_config(folder)
    where = str(folder / "config.json")
    for key, expected in table.require.items():
        if raw.get(key, expected) != expected:
            raise ModelError(
                f"{key} is {raw[key]!r}; only {expected!r} is supported",
                where=where,
                remedy="use one of the released checkpoints of this architecture",
            )
    native: dict[str, Any] = {key: raw[key] for key in table.keys if key in raw}
    for section in table.sections:
        native[section.target] = _converted_section(raw, section, folder)
    tokens = _added_tokens(folder)
    native |= {key: tokens[text] for key, text in table.tokens.items() if text in tokens}
    transformers = import_transformers()
    try:
        return getattr(transformers, table.hf_class)(**native)
    except Exception as error:
        raise _bad_config(arch, folder, error) from error


def _converted_section(
    raw: Mapping[str, Any], section: ConfigSection, folder: Path
) -> dict[str, Any]:
    source = raw.get(section.source) if section.source else raw
    result: dict[str, Any] = dict(section.values)
    if isinstance(source, dict) and source:
        return result | {key: source[key] for key in section.keys if key in source}
    infos = header_infos(folder)
    for key, rule in section.infer.items():
        value = _inferred(rule, infos, result)
        if value is None:
            raise ModelError(
                f"config.json has no {section.source!r}, and the tensors do not show {key}",
                where=str(folder / "config.json"),
                remedy=f"add {section.source!r} with the vision encoder's own config",
            )
        result[key] = value
    return result


def _inferred(
    rule: Inference, infos: Mapping[str, TensorInfo], known: Mapping[str, Any]
) -> int | None:
    if rule.tensor is not None:
        return infos[rule.tensor].shape[rule.axis] if rule.tensor in infos else None
    if rule.count is not None:
        prefix = rule.count + "."
        members = {name[len(prefix) :].split(".")[0] for name in infos if name.startswith(prefix)}
        return len(members) or None
    value = known.get(rule.divide or "")
    return value // rule.by if value is not None and value % rule.by == 0 else None


def _added_tokens(folder: Path) -> dict[str, int]:
    """Text -> id of the tokens that a tokenizer adds to its vocabulary."""
    tokens: dict[str, int] = {}
    if (folder / "tokenizer_config.json").is_file():
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        tokens |= {entry["content"]: int(number) for number, entry in added.items()}
    if (folder / "tokenizer.json").is_file():
        added = read_json(folder / "tokenizer.json").get("added_tokens", [])
        tokens |= {entry["content"]: int(entry["id"]) for entry in added}
    return tokens


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
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError("transformers is missing", remedy="pip install prismquant") from error


@functools.cache
def _declare_torchvision_operators() -> torch.library.Library:
    # The library object must stay alive, or its definitions vanish: hence the cache.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def empty_model(config: Any, arch: ArchSpec) -> nn.Module:
    """Build the model with parameters on the meta device and real buffers.

    Args:
        config: Native config, as :func:`native_config` returns it; it is not changed.
        arch: The architecture.

    Returns:
        The model in eval mode, without gradients or cache.

    Raises:
        ModelError: The config contradicts itself.
    """
    transformers = import_transformers()
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    # transformers warns of each unusual token id; the binding reports what matters.
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = getattr(transformers, arch.hf_class)(config)
    except Exception as error:
        raise ModelError(
            f"transformers cannot build this {arch.title}: {error}",
            remedy="restore config.json from the original checkpoint",
        ) from error
    finally:
        logger.setLevel(level)
    model.eval()
    model.requires_grad_(False)
    for part in model.modules():
        inner = getattr(part, "config", None)
        if inner is not None and hasattr(inner, "use_cache"):
            inner.use_cache = False
    return model


def header_infos(folder: Path) -> dict[str, TensorInfo]:
    if not any(folder.glob("*.safetensors")):
        return {}
    reader = ShardReader(folder)
    return {name: reader.info(name) for name in reader.names}


def index_names(folder: Path) -> frozenset[str]:
    """Tensor names of an index whose shards are not there: enough to see the layout."""
    path = folder / INDEX_NAME
    content = read_json(path) if path.is_file() else None
    return frozenset(content.get("weight_map", {})) if isinstance(content, dict) else frozenset()
