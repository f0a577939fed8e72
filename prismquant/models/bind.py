"""Binding an architecture to a checkpoint: everything is checked before anything is computed.

:func:`bind` builds the model without memory for its weights, reads the headers of the shards, and
compares both with the architecture: every path exists, every parameter of two or more dimensions is
claimed by a site or left alone for a stated reason, every tensor is where it should be and has the
right shape. All findings go into one error. It takes seconds for a model of any size and reads no
weights.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismquant.errors import ModelError
from prismquant.headers import TensorInfo
from prismquant.models.arch import (
    ArchSpec,
    Site,
    SiteKind,
    Tower,
)
from prismquant.models.bind_edges import bind_edges
from prismquant.models.bind_experts import shown_tensors, sites_of_experts
from prismquant.models.bind_streams import bind_streams
from prismquant.models.block_kinds import absent_sites, block_notes
from prismquant.models.bound import BoundModel, BoundSite, BoundStep, ExpertPlace
from prismquant.models.claims import CONVOLUTIONS, claim_parameters
from prismquant.models.config import (
    header_infos,
    identify,
    is_ignored,
    native_config,
    read_config,
    unused_keys,
)
from prismquant.models.config_findings import config_findings
from prismquant.models.dry_forward import forward_findings
from prismquant.models.given_arch import own_arch_file
from prismquant.models.index_notes import carried_notes, index_notes
from prismquant.models.load import empty_model
from prismquant.models.misfits import Misfits, kind_of
from prismquant.models.names import NameMap, choose_layout
from prismquant.models.norm_probe import NormProbe
from prismquant.models.open_source import source_of
from prismquant.models.other_folders import no_shards, refuse_adapter
from prismquant.shards import read_index

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Their sections may also say how inputs or the key-value cache are quantized.
_SAY_MORE_THAN_WEIGHTS = ("compressed-tensors", "modelopt")


def bind(
    folder: Path | str, *, headers_required: bool = True, quantized: bool = False
) -> BoundModel:
    """Bind a checkpoint folder to its architecture.

    Args:
        folder: Holds config.json and safetensors shards.
        headers_required: Whether shards must be there. Without them shapes come from the config.
        quantized: Accept a checkpoint that is quantized already: only its layout is taken from the
            headers, its tensors are not compared.

    Raises:
        ModelError: The folder is not a checkpoint of a known architecture, or does not fit it; the
            message lists every finding.
        StorageError: A shard is broken.
    """
    folder = Path(folder)
    arch = identify(folder)
    stored = _headers(folder, required=headers_required)
    source = None if quantized else source_of(folder, arch, stored)
    infos: Mapping[str, TensorInfo] = stored if source is None else source.shown(stored)
    config = native_config(arch, folder, infos)
    model = empty_model(config, arch)
    modules = dict(model.named_modules(remove_duplicate=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    disk_names = infos.keys() or (read_index(folder) or {}).keys()
    names = choose_layout(arch.layouts, disk_names, modules.keys())
    views, infos = shown_tensors(arch, model, names, infos)
    head_weight = f"{arch.head}.weight"
    says_tied = bool(getattr(config, "tie_word_embeddings", False))
    tied = says_tied and names.to_disk(head_weight) not in disk_names
    misfits, probe = Misfits(), NormProbe()
    dtypes = _Dtypes(names, infos, _dtype(config, infos))
    steps = _bind_steps(arch, names, modules, dtypes, tied, misfits)
    sites = tuple(site for step in steps for site in step.sites)
    left_alone = claim_parameters(arch, model, {site.name for site in sites}, misfits)
    edges = bind_edges(arch, config, modules, steps, left_alone, probe, misfits)
    streams = bind_streams(arch, modules, steps, edges, probe, misfits)
    misfits.add_all(config_findings(config.get_text_config(), modules))
    unused = [f"config.json: {key} is not used" for key in unused_keys(arch, folder, config)]
    carried = {name: stored[name].shape for name in sorted(stored) if is_ignored(arch, name)}
    notes = [*_description_notes(folder, arch, steps, modules), *unused, *carried_notes(carried)]
    notes += [*index_notes(folder, stored), *([] if source is None else source.notes())]
    notes += [_not_tied(names.to_disk(head_weight))] * (says_tied and not tied)
    if not quantized:
        strange = _compare(arch, names, shapes, infos, head_weight if tied else None)
        section = read_config(folder).get("quantization_config")
        if section and source is None:
            notes.append(_leftover(section, folder, is_float=bool(infos) and not strange))
        misfits.add_all(strange if infos else [])
    if not misfits:
        misfits.add_all(forward_findings(model, arch, config, steps))
    if misfits:
        # What is not used may be why the rest does not fit.
        raise misfits.error(arch, folder, unused)
    return BoundModel(
        arch=arch,
        folder=folder,
        config=config,
        names=names,
        steps=steps,
        sites=sites,
        edges=edges,
        streams=streams,
        left_alone=left_alone,
        dtype=dtypes.usual,
        shapes=shapes,
        tied=tied,
        has_weights=bool(infos),
        source=source,
        views=views,
        notes=tuple(notes),
        carried=carried,
    )


def _headers(folder: Path, *, required: bool) -> dict[str, TensorInfo]:
    """Headers of all shards, which are those of a model."""
    stored = header_infos(folder)
    refuse_adapter(folder, stored)
    if required and not stored:
        raise no_shards(folder)
    return stored


def _description_notes(
    folder: Path,
    arch: ArchSpec,
    steps: tuple[BoundStep, ...],
    modules: Mapping[str, nn.Module],
) -> list[str]:
    """Lines for the user where no file of the package describes the model, or blocks differ."""
    own = own_arch_file(folder, read_config(folder).get("model_type"))
    where = " in the model's folder" if own is not None and own.parent == folder else ""
    told = [] if own is None else [f"{own.name}{where} describes it"]
    return [*told, *block_notes(arch, steps, modules), *absent_sites(arch, steps, modules)]


def _not_tied(head: str) -> str:
    """A line on a head that is stored although the configuration calls it the embedding."""
    return (
        f"config.json ties the head to the embeddings, but {head} is stored: it counts, and the "
        "result's config.json says so"
    )


def _bind_steps(
    arch: ArchSpec,
    names: NameMap,
    modules: Mapping[str, nn.Module],
    dtypes: _Dtypes,
    tied: bool,
    misfits: Misfits,
) -> tuple[BoundStep, ...]:
    steps: list[BoundStep] = []
    for tower in arch.towers:
        for path, kind, sites in _tower_steps(tower, modules, misfits):
            index = len(steps)
            bound = [
                _bind_site(one, tower, path, index, names, modules, dtypes, misfits, expert)
                for site in sites
                if site.is_in(path, modules)
                for one, expert in sites_of_experts(site, path, modules, misfits)
            ]
            kept = sorted((site for site in bound if site is not None), key=_in_order)
            steps.append(BoundStep(index, tower.modality, path, tuple(kept), kind))
    head = Site("lm_head", "", SiteKind.LINEAR, 0, "final")
    llm = arch.towers[-1]
    bound_head = _bind_site(head, llm, arch.head, len(steps), names, modules, dtypes, misfits)
    if bound_head is not None:
        if tied:
            dtype = dtypes.of(f"{arch.embeddings}.weight")
            bound_head = dataclasses.replace(bound_head, dtype=dtype, tied=True)
        steps.append(BoundStep(len(steps), llm.modality, arch.head, (bound_head,), "head"))
    return tuple(steps)


def _in_order(site: BoundSite) -> tuple[int, int]:
    """By stage, then expert by expert."""
    return site.stage, -1 if site.expert is None else site.expert.number


def _tower_steps(
    tower: Tower, modules: Mapping[str, nn.Module], misfits: Misfits
) -> Iterator[tuple[str, str, tuple[Site, ...]]]:
    if tower.root not in modules:
        misfits.add(f"{tower.root}: the {tower.modality} tower's root does not exist")
    if tower.entry is not None:
        yield tower.entry, "entry", tower.entry_sites
    if tower.blocks is not None:
        for path in _members(tower.blocks, modules, misfits):
            yield path, "block", tower.sites
    for pattern in tower.modules:
        paths = _members(pattern[:-2], modules, misfits) if pattern.endswith(".*") else [pattern]
        for path in paths:
            yield path, "projector", tower.sites


def _members(path: str, modules: Mapping[str, nn.Module], misfits: Misfits) -> list[str]:
    container = modules.get(path)
    if not isinstance(container, nn.ModuleList):
        misfits.add(f"{path}: expected a list of modules, found {kind_of(container)}")
        return []
    return [f"{path}.{index}" for index in range(len(container))]


def _bind_site(
    site: Site,
    tower: Tower,
    parent: str,
    step: int,
    names: NameMap,
    modules: Mapping[str, nn.Module],
    dtypes: _Dtypes,
    misfits: Misfits,
    expert: ExpertPlace | None = None,
) -> BoundSite | None:
    name = f"{parent}.{site.path}" if site.path else parent
    module = modules.get(name)
    if site.kind is SiteKind.LINEAR and isinstance(module, nn.Linear):
        matrix = (module.out_features, module.in_features)
    elif site.kind is SiteKind.PATCH_CONV and isinstance(module, CONVOLUTIONS):
        if problem := _not_a_patch_conv(module):
            misfits.add(f"{name}: {problem}")
            return None
        weight = module.weight
        matrix = (weight.shape[0], weight[0].numel())
    else:
        misfits.add(f"{name}: expected a {site.kind} ({site.role}), found {kind_of(module)}")
        return None
    return BoundSite(
        name=name,
        disk_name=names.to_disk(name),
        role=site.role,
        modality=tower.modality,
        kind=site.kind,
        step=step,
        stage=site.stage,
        input_key=f"{parent}:{site.input}",
        fuse_key=f"{parent}:{site.fuse}" if site.fuse else None,
        out_features=matrix[0],
        in_features=matrix[1],
        weight_shape=tuple(module.weight.shape),
        has_bias=module.bias is not None,
        dtype=dtypes.of(f"{name}.weight"),
        parallel=site.parallel,
        elementwise=site.elementwise,
        online_rotation=site.online_rotation,
        cache=site.cache,
        expert=expert,
    )


def _not_a_patch_conv(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    if tuple(conv.kernel_size) != tuple(conv.stride):
        return f"kernel {conv.kernel_size} differs from stride {conv.stride}: not a reshape"
    padded = conv.padding != "valid" if isinstance(conv.padding, str) else any(conv.padding)
    if padded or conv.groups != 1 or any(d != 1 for d in conv.dilation):
        return "padding, groups or dilation: not a reshape"
    return None


# ---------------------------------------------------------------------------------------- headers


def _compare(
    arch: ArchSpec,
    names: NameMap,
    shapes: Mapping[str, tuple[int, ...]],
    infos: Mapping[str, TensorInfo],
    tied_weight: str | None,
) -> list[str]:
    """Findings on tensors that are missing, too many, or of another shape."""
    findings: list[str] = []
    expected: set[str] = set()
    for name, shape in shapes.items():
        if name == tied_weight:
            continue
        disk = names.to_disk(name)
        expected.add(disk)
        if disk not in infos:
            findings.append(f"{disk}: missing on disk")
        elif infos[disk].shape != shape:
            findings.append(f"{disk}: shape {infos[disk].shape} on disk, the config says {shape}")
        elif not _is_float(infos[disk].dtype):
            findings.append(f"{disk}: dtype {infos[disk].dtype} on disk, expected floating point")
    findings.extend(
        f"{disk}: not a tensor of this model"
        for disk in sorted(infos.keys() - expected)
        if not is_ignored(arch, disk)
    )
    return findings


def _is_float(dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype stand for themselves; eight bits need a scale."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _leftover(section: Any, folder: Path, *, is_float: bool) -> str:
    """Note on a ``quantization_config`` beside weights in floating point.

    Raises:
        ModelError: The weights are quantized, or the section may say how inputs are.
    """
    method = section.get("quant_method") if isinstance(section, dict) else None
    if is_float and method not in _SAY_MORE_THAN_WEIGHTS:
        return (
            f"the quantization_config of config.json ({method or 'of no method'}) is passed over: "
            "all weights are stored in floating point"
        )
    raise ModelError(
        f"config.json has a quantization_config ({method or 'of no method'}): the checkpoint is "
        "quantized already",
        where=str(folder / "config.json"),
        remedy="use the unquantized checkpoint; if this one is in floating point and only kept the "
        "section, delete quantization_config from config.json",
    )


@dataclass(frozen=True)
class _Dtypes:
    """Dtypes in which tensors are stored.

    Attributes:
        names: Of the checkpoint.
        infos: Its headers.
        usual: That of most, or the config's.
    """

    names: NameMap
    infos: Mapping[str, TensorInfo]
    usual: torch.dtype

    def of(self, name: str) -> torch.dtype:
        """Dtype of one tensor of the model; the usual one where it is not stored as a float."""
        info = self.infos.get(self.names.to_disk(name))
        return info.dtype if info is not None and _is_float(info.dtype) else self.usual


def _dtype(config: Any, infos: Mapping[str, TensorInfo]) -> torch.dtype:
    counts = Counter(info.dtype for info in infos.values() if info.dtype.is_floating_point)
    if counts:
        return counts.most_common(1)[0][0]
    for part in (config, getattr(config, "text_config", None)):
        dtype = getattr(part, "dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
        if isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype):
            return getattr(torch, dtype)  # type: ignore[no-any-return]
    return torch.float32
