"""Configs of remote-code checkpoints, converted to those of the native classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prismquant.errors import ModelError, brief
from prismquant.headers import TensorInfo
from prismquant.models.remote_arch import ConfigMap, ConfigSection, Inference
from prismquant.opening import read_json


def converted_values(
    table: ConfigMap, raw: Mapping[str, Any], folder: Path, infos: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """Arguments of the native config class for a remote-code checkpoint.

    Args:
        table: Says what goes where.
        raw: The content of config.json.
        folder: The checkpoint, for the tokens that its tokenizer adds.
        infos: Its headers, from which absent values follow.

    Raises:
        ModelError: The config has values that the native class does not implement, or lacks some.
        StorageError: A tokenizer file cannot be read.
    """
    for key, expected in table.require.items():
        if str(raw.get(key, expected)) != expected:
            raise ModelError(
                f"{key} is {raw[key]!r}; only {expected!r} is supported",
                where=str(folder / "config.json"),
                remedy="use one of the released checkpoints of this architecture",
            )
    native: dict[str, Any] = {key: raw[key] for key in table.keys if key in raw}
    for section in table.sections:
        native[section.target] = _converted_section(raw, section, folder, infos)
    tokens = added_tokens(folder)
    return native | {key: tokens[text] for key, text in table.tokens.items() if text in tokens}


def _converted_section(
    raw: Mapping[str, Any],
    section: ConfigSection,
    folder: Path,
    infos: Mapping[str, TensorInfo],
) -> dict[str, Any]:
    source = raw.get(section.source) if section.source else raw
    result: dict[str, Any] = dict(section.values)
    if isinstance(source, dict) and source:
        named = {key: source[old] for key, old in section.renames.items() if old in source}
        return result | named | {key: source[key] for key in section.keys if key in source}
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
        shape = infos[rule.tensor].shape if rule.tensor in infos else ()
        return shape[rule.axis] if rule.axis < len(shape) else None
    if rule.count is not None:
        prefix = rule.count + "."
        members = {name[len(prefix) :].split(".")[0] for name in infos if name.startswith(prefix)}
        return len(members) or None
    value = known.get(rule.divide or "")
    return value // rule.by if value is not None and value % rule.by == 0 else None


def added_tokens(folder: Path) -> dict[str, int]:
    """Text -> id of the tokens that a tokenizer adds to its vocabulary.

    Raises:
        ModelError: A tokenizer file lists them in a way that no tokenizer does.
        StorageError: A tokenizer file cannot be read.
    """
    tokens: dict[str, int] = {}
    for file, key in (
        ("tokenizer_config.json", "added_tokens_decoder"),
        ("tokenizer.json", "added_tokens"),
    ):
        if not (folder / file).exists():
            continue
        try:
            added = read_json(folder / file).get(key) or []
            pairs = added.items() if isinstance(added, dict) else ((t["id"], t) for t in added)
            tokens |= {str(entry["content"]): int(number) for number, entry in pairs}
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(
                f"{file} lists its added tokens in an unknown way: {brief(error)}",
                where=str(folder / file),
                remedy="restore the file from the original checkpoint",
            ) from error
    return tokens
