"""An architecture file, tried on a small model of the family that it describes.

The file claims what the layers of a model are, in which order they run, between which of them scale
can move, and what can be rotated. A wrong claim is worse than an error: calibration would see other
activations than the model, or a transform would change the model before anything is rounded. So
each is tried: the model's own configuration is shrunk to two narrow blocks of each kind, filled
with random weights, and run. That takes seconds for a model of any size, and reads no weights.
"""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from prismquant.arguments import as_path
from prismquant.errors import DataError, ModelError
from prismquant.families.copy_arch import copy_arch
from prismquant.families.family_claims import FamilyCheck, FamilyClaim
from prismquant.families.small_batches import (
    renumbered,
    run_specimen,
    small_batches,
    vocabulary_of,
)
from prismquant.families.specimen import write_specimen
from prismquant.families.specimen_run import SpecimenRun
from prismquant.families.tried_experts import expert_claims
from prismquant.families.tried_replay import replay_claims
from prismquant.families.tried_rotations import rotation_claims
from prismquant.families.tried_scales import edge_claims
from prismquant.models.arch import ArchSpec
from prismquant.models.arch_files import BESIDE, load_arch
from prismquant.models.bind import bind
from prismquant.models.block_kinds import absent_sites, block_notes
from prismquant.models.bound import BoundModel
from prismquant.models.config import identify, native_config, read_config
from prismquant.models.processor import load_processor

__all__ = ["SMALL_FILES", "check_family", "in_the_words_of"]

# Of files that a model's configuration and its processor are made of.
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def check_family(model: Path | str, arch_file: Path | str | None = None) -> FamilyCheck:
    """Try every claim of an architecture file on a small model with a given configuration.

    Args:
        model: Folder of a checkpoint: its config.json, and the files of its processor. Shards need
            not be there.
        arch_file: An architecture file; None: the one that describes this ``model_type``.

    Raises:
        ModelError: No file describes the model, the file is malformed or does not fit the model, or
            transformers cannot build a small one.
        DataError: The processor cannot be loaded.
    """
    folder = as_path(model, "model")
    file = None if arch_file is None else as_path(arch_file, "arch")
    with tempfile.TemporaryDirectory() as work, in_the_words_of(folder, file, Path(work)):
        described = folder
        if file is not None:
            _require_type(load_arch(file), folder, file)
            described = _with_arch(folder, file, Path(work) / "described")
        arch = identify(described)
        config = native_config(arch, described)
        batches = small_batches(arch, config, load_processor(described), Path(work) / "samples")
        ids = vocabulary_of(config, batches.values())
        specimen = write_specimen(config, arch, ids, Path(work) / "specimen")
        notes = tuple(_bring_arch(described, specimen, arch))
        bound = _bound(specimen, file or Path(f"{arch.name}.toml"))
        run, refused = run_specimen(bound, {k: renumbered(b, ids) for k, b in batches.items()})
        claims = (
            *_parameter_claims(bound),
            *_pattern_claims(bound),
            *_block_claims(run),
            *expert_claims(run),
            *replay_claims(run, refused),
            *edge_claims(run),
            *rotation_claims(run),
        )
    blocks = Counter(str(step.modality) for step in bound.steps if step.kind == "block")
    name = arch.name if file is None else file.stem
    return FamilyCheck(name, arch.title, dict(blocks), claims, notes)


@contextlib.contextmanager
def in_the_words_of(folder: Path, file: Path | None, work: Path) -> Iterator[None]:
    """Let errors name what the user has given, not the copies that were looked at.

    Args:
        folder: Of the model.
        file: The architecture file that was given.
        work: Where the copies lie.
    """
    try:
        yield
    except (ModelError, DataError) as error:

        def given(text: str | None) -> str | None:
            if text is not None and file is not None:
                text = text.replace(str(work / "described" / BESIDE), str(file))
                text = text.replace(BESIDE, file.name)
            return None if text is None else text.replace(str(work / "described"), str(folder))

        raise type(error)(
            given(error.what) or "",
            where=given(error.where),
            remedy=given(error.remedy),
            findings=[given(line) or "" for line in error.findings],
        ) from error


def _require_type(arch: ArchSpec, folder: Path, file: Path) -> None:
    model_type = read_config(folder).get("model_type")
    if model_type not in arch.model_types:
        raise ModelError(
            f"{file.name} describes {', '.join(arch.model_types)}, but the checkpoint's model_type "
            f"is {model_type!r}",
            where=str(file),
            remedy="add it to model_types, or give another file",
        )


def _bound(specimen: Path, file: Path) -> BoundModel:
    """The small model, bound to the architecture file.

    Raises:
        ModelError: The file does not fit it, whose author can correct that.
    """
    try:
        return bind(specimen)
    except ModelError as error:
        raise ModelError(
            str(error.what).replace("the checkpoint does not fit", "the file does not fit"),
            where=str(file),
            remedy="correct the file: every path, site and edge must be as the model has it",
            findings=error.findings,
        ) from error


def _with_arch(folder: Path, file: Path, copy: Path) -> Path:
    """A copy of what is small in a model's folder, with an architecture file beside it."""
    copy.mkdir()
    for item in folder.iterdir():
        if item.suffix in SMALL_FILES and item.is_file():
            shutil.copyfile(item, copy / item.name)
    copy_arch(file, copy)
    return copy


def _bring_arch(described: Path, specimen: Path, arch: ArchSpec) -> Iterator[str]:
    """Put the architecture file beside the small model too; notes on what is not tried of it."""
    if (described / BESIDE).is_file():
        copy_arch(described / BESIDE, specimen)
    written = identify(specimen)
    if written.name != arch.name:
        yield (
            f"the small model is a {written.title} as transformers writes it: what {arch.name} "
            "calls tensors and settings is not tried"
        )
    elif len(arch.layouts) > 1:
        yield "names of tensors are tried as transformers writes them, no other layout"


def _parameter_claims(bound: BoundModel) -> Iterator[FamilyClaim]:
    """That every matrix has a place, which binding has seen."""
    roles = Counter(f"{site.modality} {site.role}" for site in bound.sites)
    said = ", ".join(f"{role} ({count})" for role, count in roles.items())
    yield FamilyClaim("every matrix is a layer or left alone", True, f"layers: {said}")
    reasons = dict.fromkeys(one.reason for one in bound.left_alone)
    for reason in reasons:
        names = [one.name for one in bound.left_alone if one.reason == reason]
        yield FamilyClaim("left alone", True, f"{', '.join(names)}: {reason}")


def _pattern_claims(bound: BoundModel) -> Iterator[FamilyClaim]:
    """That every pattern of the file means something."""
    owners = {name.rpartition(".")[0] for name in bound.shapes}
    gguf = bound.arch.gguf
    patterns = {"left_alone": list(bound.arch.left_alone)} if bound.arch.left_alone else {}
    patterns |= {} if gguf is None else {"gguf.tensors": list(gguf.tensors)}
    for table, names in patterns.items():
        idle = [name for name in names if not _matched(name, (*owners, *bound.shapes))]
        lacking = [name for name in idle if name in bound.arch.in_some_models]
        idle = [name for name in idle if name not in lacking]
        said = f"these match nothing: {', '.join(idle)}" if idle else f"{len(names)} patterns"
        sound = bool(names) and not idle
        yield FamilyClaim(f"patterns of {table} match something", sound, said)
        if lacking:
            said = f"of other models of the family, not of this one: {', '.join(lacking)}"
            yield FamilyClaim(f"further patterns of {table} match something", None, said)


def _block_claims(run: SpecimenRun) -> Iterator[FamilyClaim]:
    """Claims on what only some blocks have: it is there; and which blocks have it."""
    paths, arch, steps = dict(run.model.named_modules()), run.bound.arch, run.bound.steps
    for said in absent_sites(arch, steps, paths):
        yield FamilyClaim("every layer is in some block", None, said)
    for said in block_notes(arch, steps, paths):
        yield FamilyClaim("blocks differ", True, said)


def _matched(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
