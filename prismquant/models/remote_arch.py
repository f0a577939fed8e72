"""Maps from a remote-code checkpoint to native classes, and how an architecture file says them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prismquant.models.strict_table import StrictTable


@dataclass(frozen=True)
class Inference:
    """Rule by which a missing config value follows from headers or from another value.

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
        renames: Native key -> the key whose value it takes, when that is present.
        infer: Native key -> how to find it when the source dictionary does not have it.
    """

    target: str
    source: str
    values: Mapping[str, str]
    keys: tuple[str, ...]
    renames: Mapping[str, str]
    infer: Mapping[str, Inference]


@dataclass(frozen=True)
class ConfigMap:
    """Map from the config.json of a remote-code checkpoint to a native config.

    Attributes:
        hf_class: Native config class.
        keys: Top-level keys that are copied when present.
        require: Top-level key -> the only value that the native class implements, as text.
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
    """Recipe of a native processor for a checkpoint whose own processor is remote code.

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


def read_config_map(table: StrictTable) -> ConfigMap:
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


def _section(table: StrictTable) -> ConfigSection:
    section = ConfigSection(
        target=table.text("target"),
        source=table.maybe_text("source") or "",
        values=table.strings("values"),
        keys=table.texts("keys"),
        renames=table.strings("renames"),
        infer=_inferences(table.table("infer")),
    )
    table.finish()
    return section


def _inferences(table: StrictTable | None) -> dict[str, Inference]:
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


def read_processor_map(table: StrictTable) -> ProcessorMap:
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
