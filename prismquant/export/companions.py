"""Files beside a checkpoint's tensors that are copied with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prismquant.sources.recognize import SECTION_FILES

# What config.json says of quantization, other writers say in files of their own as well.
_ABOUT_WEIGHTS = {"config.json", *SECTION_FILES}
_COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".toml", ".py"}


def files_to_copy(folder: Path) -> Iterator[Path]:
    """Tokenizer, processor, template and code files; some templates lie one level down.

    Links that lead out of the folder are none of them: see :func:`links_outside`.
    """
    return (path for path in _candidates(folder) if not _leads_outside(path, folder))


def links_outside(folder: Path) -> list[str]:
    """Links to files outside a checkpoint: what is there is not the checkpoint's, and stays."""
    return [
        str(path.relative_to(folder))
        for path in _candidates(folder)
        if _leads_outside(path, folder)
    ]


def links_remark(folder: Path) -> list[str]:
    """A line for the user on such links; none where there are no links."""
    left = links_outside(folder)
    return [f"links to files outside the folder were not copied: {', '.join(left)}"] * bool(left)


def own_file(folder: Path, name: str) -> Path | None:
    """A file of a checkpoint; None where there is none of its own."""
    path = folder / name
    return path if path.is_file() and not _leads_outside(path, folder) else None


def _candidates(folder: Path) -> Iterator[Path]:
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        about_weights = path.name in _ABOUT_WEIGHTS or path.name.endswith(".index.json")
        hidden = path.name.startswith(".")
        if path.is_file() and path.suffix in _COPIED and not about_weights and not hidden:
            yield path


def _leads_outside(path: Path, folder: Path) -> bool:
    """True if the file itself lies elsewhere, but for the hub's cache: a snapshot there is a folder
    of links to the blobs beside it.
    """
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    return not target.is_relative_to(home) and target.parent != blobs
