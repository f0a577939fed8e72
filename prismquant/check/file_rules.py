"""Rules about files: shards, index, and what must lie beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prismquant.check.checkpoint import Checkpoint
from prismquant.check.findings import Problem
from prismquant.opening import read_json
from prismquant.shards import INDEX_NAME
from prismquant.storage import is_temporary

_COPY = "copy the file again from where the checkpoint was made"
_FROM_SOURCE = "copy it from the original checkpoint"
_TOKENIZER = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")


def broken_shards(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Shards that are missing or cut short, or no shard at all."""
    for name, why in checkpoint.unreadable.items():
        yield Problem(why, (name,), _COPY)
    if not checkpoint.headers and not checkpoint.unreadable:
        yield Problem("there is no *.safetensors file", (str(checkpoint.folder),), _COPY)


def index_and_headers(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Tensors that the index names and its shard does not hold."""
    if checkpoint.index is None:
        return
    lacking = tuple(
        name
        for name, shard in checkpoint.index["weight_map"].items()
        if shard in checkpoint.headers and name not in checkpoint.headers[shard]
    )
    if lacking:
        remedy = f"write {INDEX_NAME} again from the shards' headers"
        yield Problem("the index names tensors that their shard does not hold", lacking, remedy)


def unindexed(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Tensors that no reader finds: in shards, not in the index."""
    if checkpoint.index is None:
        return
    weight_map = checkpoint.index["weight_map"]
    forgotten = tuple(sorted(checkpoint.tensors.keys() - weight_map.keys()))
    if forgotten:
        remedy = f"add them to {INDEX_NAME}, or delete shards of an earlier export"
        yield Problem("the shards hold tensors that the index does not name", forgotten, remedy)


def doubled(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Tensors in more than one shard."""
    count = Counter(name for header in checkpoint.headers.values() for name in header)
    twice = tuple(sorted(name for name, number in count.items() if number > 1))
    if twice:
        yield Problem(
            "tensors lie in more than one shard: which one is read depends on the reader",
            twice,
            "delete the shards that do not belong to this checkpoint",
        )


def total_size(checkpoint: Checkpoint) -> Iterator[Problem]:
    """The index's sum of bytes."""
    if checkpoint.index is None or checkpoint.unreadable:
        return
    metadata = checkpoint.index.get("metadata") or {}
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    held = sum(info.nbytes for info in checkpoint.tensors.values())
    if claimed is not None and claimed != held:
        what = f"the index claims {claimed} bytes of tensors, the shards hold {held}"
        yield Problem(what, (INDEX_NAME,), f"set metadata.total_size to {held}")


def leftovers(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Files of a run that did not come to its end."""
    left = tuple(sorted(p.name for p in checkpoint.folder.rglob("*") if is_temporary(p)))
    if left:
        yield Problem("temporary files of a killed run lie in the folder", left, "delete them")
    record = checkpoint.folder / "prismquant" / "record.json"
    if record.is_file() and not _finished(checkpoint):
        yield Problem(
            "the run's record does not say that it finished",
            ("prismquant/record.json",),
            "run `prismquant quantize` again with --resume",
        )


def companions(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Tokenizer, and the image processor of a model that sees."""
    folder = checkpoint.folder
    if not any((folder / name).is_file() for name in _TOKENIZER):
        yield Problem("there is no tokenizer", _TOKENIZER[:1], _FROM_SOURCE)
    processors = ("preprocessor_config.json", "processor_config.json")
    sees = checkpoint.model is None or checkpoint.model.arch.sees
    if sees and not any((folder / name).is_file() for name in processors):
        yield Problem("there is no image processor", processors[:1], _FROM_SOURCE)


def unknown_model(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Reason that rules about layers were left out."""
    if checkpoint.model is None and not (checkpoint.unreadable or checkpoint.model_known):
        yield Problem(
            f"layers were not compared with the model: {checkpoint.model_fault.splitlines()[0]}",
            ("config.json",),
            "rules about files and the configuration's grammar were checked all the same",
        )


def broken_model(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A configuration that does not describe the model that it names."""
    if checkpoint.model is None and checkpoint.model_known and not checkpoint.unreadable:
        what, *more = checkpoint.model_fault.splitlines()
        remedy = "restore config.json from the original checkpoint"
        yield Problem(" ".join([what, *more[:1]]), ("config.json",), remedy)


def unread_gguf(checkpoint: Checkpoint) -> Iterator[Problem]:
    """GGUF files, which say all about themselves."""
    names = tuple(sorted(path.name for path in checkpoint.folder.glob("*.gguf")))
    yield Problem(
        "there are no rules for GGUF files: their writer follows llama.cpp's tables",
        names,
        "load them with llama.cpp once before relying on them",
    )


def _finished(checkpoint: Checkpoint) -> bool:
    content = read_json(checkpoint.folder / "prismquant" / "record.json")
    return isinstance(content, dict) and bool(content.get("finished"))
