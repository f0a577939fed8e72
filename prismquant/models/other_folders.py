"""Folders that are no checkpoint of a model that can be read: what they are, and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prismquant.errors import ModelError
from prismquant.headers import TensorInfo

__all__ = ["no_config", "no_shards"]

_ADAPTER = "adapter_config.json"


def no_config(folder: Path, found: list[str]) -> ModelError:
    """The error for a folder without config.json.

    Args:
        folder: The folder.
        found: Names of what it holds.
    """
    if _ADAPTER in found:
        return _adapter(folder)
    if gguf := [name for name in found if name.endswith(".gguf")]:
        return ModelError(
            f"the folder holds a GGUF file, {gguf[0]}, and no Hugging Face checkpoint",
            where=str(folder),
            remedy="use the checkpoint that the file was made from: its model card names it",
        )
    return ModelError(
        f"the model folder has no config.json; it holds {', '.join(found[:6]) or 'nothing'}",
        where=str(folder),
        remedy="give the folder of a Hugging Face checkpoint",
    )


def no_shards(folder: Path) -> ModelError:
    """The error for a folder with config.json and no safetensors shard."""
    found = sorted(path.name for path in folder.iterdir())
    if _ADAPTER in found:
        return _adapter(folder)
    pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
    gguf = [name for name in found if name.endswith(".gguf")]
    if pickles:
        remedy = (
            "use a revision of the checkpoint that has *.safetensors; or, if you trust the files, "
            "load them in transformers and write them with save_pretrained. Pickle files, which "
            "may run code, are never read"
        )
        what = f"the weights are pickle files, {pickles[0]} among them"
    elif gguf:
        remedy = "use the checkpoint that the file was made from: its model card names it"
        what = f"the weights are a GGUF file, {gguf[0]}"
    else:
        remedy = "complete the download; pickle files are never read"
        what = "the model folder has no readable *.safetensors shard"
    return ModelError(what, where=str(folder), remedy=remedy)


def refuse_adapter(folder: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse a folder with tensors of an adapter.

    Args:
        folder: The folder.
        infos: Headers of all its shards.

    Raises:
        ModelError: There are such.
    """
    if any(info.file.startswith("adapter_model") for info in infos.values()):
        raise _adapter(folder)


def _adapter(folder: Path) -> ModelError:
    """The error for an adapter (LoRA), which is no model by itself."""
    return ModelError(
        f"the folder holds an adapter ({_ADAPTER}), which is no model without the one below it",
        where=str(folder),
        remedy="merge it first: `peft.AutoPeftModel.from_pretrained(folder).merge_and_unload()"
        ".save_pretrained(out)`, copy the base model's processor files to out, and give that",
    )
