"""Calibration samples from a dataset as MQuant's functions take it (of VLMEvalKit).

It needs ``data.iloc[i]``, a row, and ``build_prompt(row)``, a list of items ``{"type": "image",
"value": path}`` and ``{"type": "text", "value": text}``. A wrapper that builds prompts itself, or
prepares their contents (sizes of pictures, rates of clips), is asked to, as there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from prismquant.data import Sample, samples_of_messages
from prismquant.errors import ArgumentError, DataError
from prismquant.memory import available_bytes

_MEDIA = ("image", "video")


def samples_of_prompts(
    dataset: Any, dataset_name: str | None, wrapper: Any, count: int
) -> tuple[Sample, ...]:
    """The first samples of a dataset, in its order.

    Args:
        dataset: As above.
        dataset_name: Its name.
        wrapper: Holds the model; may have ``use_custom_prompt``, ``build_prompt``,
            ``system_prompt``.
        count: So many, or all there are.

    Raises:
        ArgumentError: The dataset is none.
        DataError: It is empty, or a prompt cannot be used.
    """
    data = getattr(dataset, "data", None)
    rows, build = getattr(data, "iloc", None), getattr(dataset, "build_prompt", None)
    if rows is None or not callable(build):
        raise ArgumentError(
            f"a {type(dataset).__name__} is no dataset to calibrate on",
            where="dataset",
            remedy="it needs data.iloc[i], a row, and build_prompt(row), a list of items with type "
            "and value",
        )
    conversations: dict[str, list[dict[str, Any]]] = {}
    for index in range(count):
        try:
            row = rows[index]
        except (IndexError, KeyError):
            break
        prompt = _prompt(row, build, dataset_name, wrapper)
        name = f"{dataset_name or 'sample'}-{index}"
        conversations[name] = _messages(prompt, dataset_name, wrapper, name)
    source = f"dataset {dataset_name}" if dataset_name else "dataset"
    return samples_of_messages(conversations, source, most_bytes=available_bytes())


def _prompt(row: Any, build: Any, dataset_name: str | None, wrapper: Any) -> Any:
    custom = getattr(wrapper, "use_custom_prompt", None)
    if callable(custom) and custom(dataset_name):
        return wrapper.build_prompt(row, dataset=dataset_name)
    return build(row)


def _messages(
    prompt: Any, dataset_name: str | None, wrapper: Any, where: str
) -> list[dict[str, Any]]:
    """Messages of our grammar."""
    parts: Any = [prompt] if isinstance(prompt, str | Mapping) else prompt
    if not isinstance(parts, Sequence) or not parts:
        raise DataError(
            f"build_prompt gave a {type(prompt).__name__}, not a list of items with type and value",
            where=where,
        )
    system = getattr(wrapper, "system_prompt", None)
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    if all(isinstance(part, Mapping) and "content" in part for part in parts):
        turns = [
            {"role": part.get("role"), "content": _content(part["content"], dataset_name, wrapper)}
            for part in parts
        ]
        return first + turns
    grouped = itertools.groupby(parts, key=_role)
    return first + [
        {"role": role, "content": _content(list(own), dataset_name, wrapper)}
        for role, own in grouped
    ]


def _role(part: Any) -> str:
    return str(part.get("role", "user")) if isinstance(part, Mapping) else "user"


def _content(parts: Any, dataset_name: str | None, wrapper: Any) -> Any:
    if isinstance(parts, str):
        return parts
    items = [_typed(part) for part in parts]
    prepare = getattr(wrapper, "_prepare_content", None)
    if callable(prepare) and all("value" in item for item in items):
        # VLMEvalKit's own wrapper adds sizes of pictures and rates of clips.
        return [dict(item) for item in prepare(items, dataset=dataset_name)]
    return [_item(part) for part in items]


def _typed(part: Any) -> dict[str, Any]:
    """An item; a text that names a file is a picture, as VLMEvalKit has it."""
    if isinstance(part, Mapping):
        return {key: value for key, value in part.items() if key != "role"}
    return {"type": "image" if os.path.isfile(part) else "text", "value": part}


def _item(part: Mapping[str, Any]) -> dict[str, Any]:
    if "value" not in part:
        return dict(part)
    kind = part.get("type")
    key = kind if kind in _MEDIA else "text"
    rest = {name: value for name, value in part.items() if name != "value"}
    return {**rest, key: part["value"]}
