"""A draft of an architecture file, made of one watched run of a small model.

The configuration of a model is shrunk and filled with random weights, as for a check. Hooks see
which layers run, in which order, on which tensors; scales and rotations tell which edges and
streams hold. What no run can show is left to a person, and marked so.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prismquant.arguments import as_path
from prismquant.data.batches import Batch
from prismquant.errors import ModelError
from prismquant.families.arch_text import arch_text
from prismquant.families.check_family import SMALL_FILES, in_the_words_of
from prismquant.families.provisional_arch import input_groups, write_provisional
from prismquant.families.seen_edges import outer_edges, seen_streams, with_edges
from prismquant.families.seen_names import seen_layouts
from prismquant.families.seen_towers import SeenModel, experts_of, seen_towers
from prismquant.families.small_batches import renumbered, small_batches, vocabulary_of
from prismquant.families.specimen import write_specimen
from prismquant.families.tried_draft import tried_draft
from prismquant.families.watched_run import WatchedRun, watch
from prismquant.memory import memory_error
from prismquant.models.arch import ArchSpec, Modality
from prismquant.models.arch_files import BESIDE, load_arch
from prismquant.models.claims import CONVOLUTIONS
from prismquant.models.config import import_transformers, native_config
from prismquant.models.experts import DOWN, GATE_UP
from prismquant.models.processor import load_processor
from prismquant.models.reader_names import FusedLayer

__all__ = ["draft_family"]

_FUSED = {
    "qkv": FusedLayer("qkv_proj", "QKVParallelLinear"),
    "gate_up": FusedLayer("gate_up_proj", "MergedColumnParallelLinear"),
}
_EXPERTS = (GATE_UP, DOWN)
_TOP = (
    "Drafted from a run of a small random model: towers, sites, their order and inputs were seen;",
    "edges and streams were tried with random scales and rotations. Roles follow from names.",
    "What is marked DRAFT is for a person to decide. Then: prismquant arch check MODEL --arch FILE",
)
_END = (
    "DRAFT: names in vLLM, llama.cpp and readers of GPTQ layers ([vllm], [gguf], [gptq]) are not",
    "seen in a run; without them, paths are taken to be those of transformers.",
)


def draft_family(model: Path | str) -> str:
    """The text of an architecture file for a model that transformers has a class for.

    Args:
        model: Folder with config.json and the files of the processor. Shards need not be there.

    Raises:
        ModelError: transformers has no class for the model, cannot build a small one, or its run
            shows no blocks.
        DataError: The processor cannot be loaded.
    """
    folder = as_path(model, "model")
    with tempfile.TemporaryDirectory() as place, in_the_words_of(folder, None, Path(place)):
        work = Path(place)
        described = _described(folder, work / "described")
        write_provisional(described)
        arch = load_arch(described / BESIDE)
        config = native_config(arch, described)
        batches = small_batches(arch, config, load_processor(described), work / "samples")
        ids = vocabulary_of(config, batches.values())
        specimen = write_specimen(config, arch, ids, work / "specimen")
        small = {kind: renumbered(batch, ids) for kind, batch in batches.items()}
        seen = _seen(specimen, arch, small)
        drafted, notes = _drafted(seen, arch, small, specimen)
        drafted, notes = tried_draft(drafted, notes, specimen, small)
        return arch_text(drafted, notes, seen.modules)


def _described(folder: Path, copy: Path) -> Path:
    """A copy of what is small in a model's folder, without a file that describes it."""
    if not folder.is_dir():
        raise ModelError("there is no such folder", where=str(folder))
    copy.mkdir()
    for item in folder.iterdir():
        if item.suffix in SMALL_FILES and item.is_file():
            shutil.copyfile(item, copy / item.name)
    return copy


def _seen(specimen: Path, arch: ArchSpec, batches: Mapping[str, Batch]) -> SeenModel:
    """The small model, having run a batch with pictures if it sees any.

    Raises:
        ModelError: It has no head, or runs no batch.
    """
    kind = getattr(import_transformers(), arch.hf_class)
    with contextlib.redirect_stderr(io.StringIO()):  # its bar of progress
        model: nn.Module = kind.from_pretrained(
            specimen, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        ).eval()
    modules = dict(model.named_modules())
    names = {id(module): path for path, module in modules.items()}
    head = names.get(id(model.get_output_embeddings()))  # type: ignore[operator]
    embeddings = names.get(id(model.get_input_embeddings()))  # type: ignore[operator]
    if not head or not embeddings:
        raise ModelError(
            f"{arch.hf_class} has no head over tokens: it is no model that writes text",
            where="config.json",
            remedy="only models that put out tokens are described",
        )
    decoder = embeddings.rpartition(".")[0]
    run: WatchedRun | None = None
    refusals: list[str] = []
    for name in ("image", "text"):
        if name in batches and run is None:
            run = _watched(model, batches[name], refusals)
    if run is None:
        raise ModelError(
            f"transformers' {arch.hf_class} does not run a small model: {'; '.join(refusals)}",
            where="config.json",
        )
    return SeenModel(model, model.config, run, embeddings, head, decoder, modules)


def _watched(model: nn.Module, batch: Batch, refusals: list[str]) -> WatchedRun | None:
    try:
        return watch(model, batch.inputs)
    # Third-party code over a configuration that nobody has released.
    except Exception as error:
        if memory_error(error) is not None:
            raise
        refusals.append(f"{type(error).__name__}: {error}")
        return None


def _drafted(
    seen: SeenModel, arch: ArchSpec, batches: Mapping[str, Batch], specimen: Path
) -> tuple[ArchSpec, dict[str, list[str]]]:
    """All that one run shows, and comments on what it does not.

    Raises:
        ModelError: It shows no blocks of a language model.
    """
    towers = tuple(with_edges(tower, seen) for tower in seen_towers(seen))
    if not towers or (arch.sees and towers[0].modality is not Modality.VISION):
        raise ModelError(
            f"no list of blocks that run one upon the other was seen in {arch.hf_class}",
            where="config.json",
            remedy="write the file by hand: docs/families.md",
        )
    outer = tuple(outer_edges(towers, seen))
    layouts, odd = seen_layouts(seen.model, seen.head, specimen)
    notes: dict[str, list[str]] = {"top": [*_TOP], "end": [*_END], "layouts": [], "streams": []}
    experts = [path for tower in towers for path in tower.experts]
    odd = tuple(name for name in odd if not any(f".{path}." in name for path in experts))
    if odd:
        notes["layouts"] = [f"DRAFT: written as other tensors than the model has: {_few(odd)}"]
    groups, idle = input_groups(batches, seen.model)
    if idle:
        notes["top"].append(f"The processor also gives {', '.join(idle)}: not the vision tower's.")
    # Experts are fused by classes of their own.
    labels = {site.fuse for tower in towers for site in tower.sites if "*" not in site.path}
    drafted = ArchSpec(
        name="draft",
        title=arch.title,
        model_types=arch.model_types,
        hf_class=arch.hf_class,
        towers=towers,
        head=seen.head,
        embeddings=seen.embeddings,
        input_groups=groups,
        vision_token_ids=arch.vision_token_ids,
        layouts=layouts,
        edges=outer,
        streams=tuple(seen_streams(towers, outer, seen)),
        left_alone=_left_alone(seen, towers),
        fused={label: layer for label, layer in _FUSED.items() if label in labels},
    )
    return drafted, notes


def _left_alone(seen: SeenModel, towers: Sequence[Any]) -> dict[str, str]:
    """Patterns of parameters that no site of the draft claims."""
    claimed = {seen.head}
    for tower in towers:
        claimed |= {
            f"{tower.blocks}.*.{path}.{name}" for path in tower.experts for name in _EXPERTS
        }
        entry = [(tower.entry, site.path) for site in tower.entry_sites]
        blocks = f"{tower.blocks}.*"
        members = [blocks] if tower.blocks else tower.modules
        for parent, path in (*entry, *((m, site.path) for m in members for site in tower.sites)):
            claimed.add(f"{parent}.{path}" if path else parent)
    found: dict[str, str] = {}
    for name, parameter in seen.model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = seen.modules[owner]
        called = owner if leaf == "weight" else name
        pattern = _starred(called, seen.modules)
        if parameter.dim() < 2 or isinstance(module, nn.Embedding):
            continue
        if pattern in claimed or called in claimed:
            continue
        above = seen.modules.get(owner.rpartition(".")[0])
        found[pattern] = _reason(parameter, module, leaf, above, ran=owner in seen.run.order)
    return found


def _reason(
    parameter: Tensor, module: nn.Module, leaf: str, above: nn.Module | None, *, ran: bool
) -> str:
    """Reason for which a parameter has no place, as far as it can be seen."""
    if isinstance(module, nn.Linear) and ran and module.out_features == 1:
        return "one number for each token"
    beside = [] if above is None else [experts_of(child) for child in above.children()]
    if leaf == "weight" and parameter.shape[0] in beside:
        return "router: rounding it sends tokens to other experts"
    if leaf != "weight" or not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return f"DRAFT: a parameter of {type(module).__name__}, not the weight of a layer"
    if not ran:
        return "DRAFT: it was not called: say why, or make it a site"
    return "DRAFT: it lies outside of blocks and projectors: say why it stays, or make it a site"


def _starred(path: str, modules: Mapping[str, nn.Module]) -> str:
    """A path with ``*`` for the numbers of members of lists."""
    parts = path.split(".")
    lists = {
        i for i in range(len(parts)) if isinstance(modules.get(".".join(parts[:i])), nn.ModuleList)
    }
    return ".".join("*" if i in lists else part for i, part in enumerate(parts))


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
