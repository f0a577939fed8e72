"""A checkpoint's tokenizer, image and video processor, checked against its model.

Code of the checkpoint runs only where the caller allows it, and nobody is ever asked. What does not
fit the model is refused here, before any sample is made: an id without an embedding, placeholders
that the model does not know, patches of another size.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prismquant.errors import DataError, PrismQuantError, brief
from prismquant.models.config import (
    config_value,
    identify,
    import_transformers,
    native_config,
)
from prismquant.opening import MAX_JSON_BYTES, read_json, require_regular

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismquant.models.arch import ArchSpec
    from prismquant.models.remote_arch import ProcessorMap

__all__ = ["load_processor"]

_SETTINGS = ("processor_config.json", "preprocessor_config.json")
# A plain picture and a plain clip, on which a processor is tried.
_SIDE = 224
_FRAMES = 4
# The only folder that transformers looks into.
_TEMPLATES = "additional_chat_templates"
# What a processor says of itself -> what the vision part of the config calls it.
_SIZES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}


def load_processor(folder: Path | str, *, trust_remote_code: bool = False) -> Any:
    """Load tokenizer, image and video processor of a checkpoint; of a text model the tokenizer.

    Where the checkpoint's own processor is remote code, the native one is built from its settings,
    with a chat template that writes one placeholder for each image or video.

    Args:
        folder: The checkpoint.
        trust_remote_code: Let transformers run Python files of the folder.

    Raises:
        DataError: Files are missing or broken, do not fit the model, or torchvision is missing,
            which video processors need.
        ModelError: The folder is not a checkpoint of a known architecture.
    """
    folder = Path(folder)
    arch = identify(folder)
    if arch.sees and importlib.util.find_spec("torchvision") is None:
        raise DataError(
            "the video processors of transformers need torchvision, which is not installed",
            where=str(folder),
            remedy="pip install 'prismquant[vision]'",
        )
    _check_files(folder, _SETTINGS if arch.sees else ())
    config = native_config(arch, folder)
    try:
        processor = _load(arch, folder, config, trust_remote_code)
        if broken := _trial_findings(arch, processor) if arch.sees else ():
            raise DataError(
                f"the checkpoint's processor is broken: {'; '.join(broken)}",
                where=" and ".join(str(folder / n) for n in _SETTINGS if (folder / n).exists()),
                remedy="restore these files from the original checkpoint: no data are at fault",
            )
        findings = [*_strange_ids(processor, config), *_other_sizes(arch, processor, config)]
    except PrismQuantError:
        raise
    except Exception as error:
        from prismquant.memory import memory_error

        if memory_error(error) is not None:
            raise
        raise _no_processor(folder, error) from error
    if findings:
        raise DataError(
            "the checkpoint's processor is not of this model: " + "; ".join(findings),
            where=str(folder),
            remedy="copy tokenizer, processor and config.json of the original checkpoint into the "
            "folder",
        )
    return processor


def _load(arch: ArchSpec, folder: Path, config: Any, trust_remote_code: bool) -> Any:
    transformers = import_transformers()
    if not arch.sees:
        from prismquant.models.text_processor import TextProcessor  # of models of text alone

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
        return TextProcessor(tokenizer)
    if arch.processor_map is not None and not trust_remote_code:
        return _native_processor(arch.processor_map, folder, config, transformers)
    return transformers.AutoProcessor.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, local_files_only=True
    )


def _native_processor(table: ProcessorMap, folder: Path, config: Any, transformers: Any) -> Any:
    settings = read_json(folder / "preprocessor_config.json")
    common = {key: settings[key] for key in table.keys if key in settings}
    patch = int(config_value(config, "vision_config.patch_size"))
    # With the native config: the folder's own may be described by code only.
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(folder), config=config, trust_remote_code=False, local_files_only=True
    )

    def build(name: str) -> Any:
        kind = getattr(transformers, name)
        # Sizes are given in visual tokens; the native processors count pixels.
        pixels = (patch * int(kind.merge_size)) ** 2
        size = {
            edge: int(settings[key]) * pixels
            for edge, key in (
                ("shortest_edge", table.min_tokens),
                ("longest_edge", table.max_tokens),
            )
            if key in settings
        }
        return kind(**common, **({"size": size} if len(size) == 2 else {}))

    return getattr(transformers, table.hf_class)(
        image_processor=build(table.image_class),
        tokenizer=tokenizer,
        video_processor=build(table.video_class),
        chat_template=table.chat_template,
    )


# ----------------------------------------------------------------------------------------- checks


def _check_files(folder: Path, settings: Sequence[str]) -> None:
    """Refuse a folder that lacks a file, or has something that must not be opened as one.

    transformers opens files by their names, whatever they are.

    Args:
        folder: The checkpoint.
        settings: Files of an image processor, of which one must be there; none of a text model.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise _missing(folder, "it has neither tokenizer.json nor vocab.json")
    if settings and not any((folder / name).exists() for name in settings):
        raise _missing(folder, f"it has neither {' nor '.join(settings)}")
    for path in sorted((*folder.iterdir(), *(folder / _TEMPLATES).glob("*"))):
        try:
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                continue
            require_regular(status, path)
        except FileNotFoundError:
            continue  # a link to nothing
        except OSError as error:
            raise DataError(
                f"{path.name} cannot be read: {error.strerror or error}",
                where=str(path),
                remedy="remove it from the folder",
            ) from error
        if path.suffix in (".json", ".txt", ".jinja") and status.st_size > MAX_JSON_BYTES:
            raise DataError(
                f"{path.name} has {status.st_size} bytes; at most {MAX_JSON_BYTES} are read",
                where=str(path),
                remedy="restore the file from the original checkpoint",
            )


def _strange_ids(processor: Any, config: Any) -> list[str]:
    """Findings on tokens that the model has no embedding for."""
    size = int(config.get_text_config().vocab_size)
    tokenizer = getattr(processor, "tokenizer", processor)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    # What is put around a text has ids of its own in some tokenizers.
    around = max(tokenizer("a")["input_ids"], default=0)
    if around > largest:
        token, largest = "put around each text", around
    if largest < size:
        return []
    return [f"token {token!r} has the id {largest}, but vocab_size is {size}"]


def _other_sizes(arch: ArchSpec, processor: Any, config: Any) -> list[str]:
    """Findings on what processor and model call differently, or cut into other pieces."""
    findings = [
        f"it marks media by the id {said}, but {key} is {config_value(config, key)}"
        for key in arch.vision_token_ids
        if (said := getattr(processor, key, None)) not in (None, config_value(config, key))
        # Some are given one token in a text, and put others in its place.
        and config_value(config, key) not in (getattr(processor, f"{key}s", None) or ())
    ]
    for part in ("image_processor", "video_processor"):
        for name, key in _SIZES.items():
            ours = getattr(getattr(processor, part, None), name, None)
            theirs = getattr(getattr(config, "vision_config", None), key, None)
            if ours is not None and theirs is not None and ours != theirs:
                findings.append(f"{part}.{name} is {ours}, but vision_config.{key} is {theirs}")
    return findings


def _takes_clips(arch: ArchSpec, processor: Any) -> bool:
    """Whether a family, or its processor's class, has inputs of clips."""
    parts = getattr(type(processor), "get_attributes", list[str])()
    keys = [key for group in arch.input_groups for key in group]
    return any("video" in name for name in (*parts, *keys))


def _trial_findings(arch: ArchSpec, processor: Any) -> list[str]:
    """Findings on a processor that can process nothing, or lacks a part.

    Args:
        arch: Says what the model is given.
        processor: As transformers has loaded it.
    """
    clips = _takes_clips(arch, processor)
    parts = ("image_processor", *["video_processor"] * clips, "tokenizer")
    missing = [part for part in parts if getattr(processor, part, None) is None]
    if missing:
        return [
            f"it is a {type(processor).__name__} without {' and '.join(missing)}: processor_class "
            "is not known, or the files of these parts are missing"
        ]
    clip = torch.full((_FRAMES, 3, _SIDE, _SIDE), 128, dtype=torch.uint8)
    trials: dict[str, tuple[Any, dict[str, Any]]] = {
        "picture": (processor.image_processor, {"images": [clip[0]]}),
    }
    if clips:
        given = {"videos": [clip], "do_sample_frames": False}
        trials["clip"] = (processor.video_processor, given)
    return [
        f"it cannot process any {kind}: {said}"
        for kind, (part, media) in trials.items()
        if (said := _refusal(part, media)) is not None
    ]


def _refusal(part: Any, media: dict[str, Any]) -> str | None:
    """Refusal of plain media by a part of a processor; None where it takes them."""
    try:
        part(**media, return_tensors="pt")
    # Third-party code over settings of a stranger.
    except Exception as error:
        from prismquant.memory import memory_error

        if memory_error(error) is not None:
            raise
        return brief(error)
    return None


# ----------------------------------------------------------------------------------------- errors


def _missing(folder: Path, why: str) -> DataError:
    return DataError(
        f"the checkpoint's processor cannot be loaded: {why}",
        where=str(folder),
        remedy="copy the tokenizer and processor files of the original checkpoint into the folder",
    )


def _no_processor(folder: Path, error: Exception) -> DataError:
    """Error to raise when transformers could not build the processor."""
    if "trust_remote_code" in str(error):
        return DataError(
            "the checkpoint's processor is Python code in its folder, which is not run",
            where=str(folder),
            remedy="read the code; if you trust it, allow it with --trust-remote-code",
        )
    if (said := _unreadable_tokenizer(folder)) is not None:
        return DataError(
            f"tokenizer.json is not what tokenizers {_version('tokenizers')} reads: {said}",
            where=str(folder / "tokenizer.json"),
            remedy="install the release of tokenizers that wrote it, or restore the original file",
        )
    if isinstance(error, ImportError):
        return DataError(
            f"the checkpoint's processor needs a package that is not installed: {brief(error)}",
            where=str(folder),
            remedy="install that package",
        )
    return _missing(folder, brief(error))


def _unreadable_tokenizer(folder: Path) -> str | None:
    """Reason for which the tokenizers library cannot read tokenizer.json; None: it can."""
    if not (folder / "tokenizer.json").exists():
        return None
    try:
        importlib.import_module("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        return brief(error)
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
