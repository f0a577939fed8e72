"""Binding an architecture to a checkpoint: everything is checked before anything is computed.

:func:`bind` builds the model without memory for its weights, reads the headers of the shards, and
compares both with the architecture: every path exists, every linear and convolution is claimed by a
site or left alone for a stated reason, every tensor is where it should be and has the right shape.
All findings go into one error. It takes seconds for a model of any size and reads no weights.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import importlib
import json
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismquant.errors import ModelError, suggest
from prismquant.models.arch import (
    ArchSpec,
    ConfigMap,
    ConfigSection,
    Edge,
    EdgeKind,
    Inference,
    Modality,
    Site,
    SiteKind,
    Tower,
    known_archs,
)
from prismquant.models.names import NameMap, choose_layout
from prismquant.storage import INDEX_NAME, ShardReader, TensorInfo, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType

__all__ = [
    "BoundEdge",
    "BoundModel",
    "BoundSite",
    "BoundStep",
    "bind",
    "config_value",
    "empty_model",
    "identify",
    "import_transformers",
    "native_config",
]

# An error must fit a screen; the count of the rest is printed.
_MAX_FINDINGS = 30

# Keys that only a vision-language config has.
_VISION_KEYS = (
    "vision_config",
    "vision_encoder_config",
    "vision_encoder",
    "visual",
    "mm_vision_tower",
    "vision_tower",
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class BoundSite:
    """A site of one concrete layer.

    Attributes:
        name: Module path.
        disk_name: Prefix of its tensors on disk.
        role: Its role, e.g. ``mlp.down``.
        modality: Its tower's modality.
        kind: Linear layer or patch convolution.
        step: Index of its step.
        stage: Order inside the step.
        input_key: Equal for sites that read the same tensor; unique over the model.
        fuse_key: Equal for sites that servers fuse; unique over the model; None when not fused.
        out_features, in_features: Shape of its weight as a matrix.
        weight_shape: Shape of its weight; five-dimensional for a 3-D convolution.
        has_bias: Whether it has a bias.
        tied: Whether its weight is the token embedding.
    """

    name: str
    disk_name: str
    role: str
    modality: Modality
    kind: SiteKind
    step: int
    stage: int
    input_key: str
    fuse_key: str | None
    out_features: int
    in_features: int
    weight_shape: tuple[int, ...]
    has_bias: bool
    tied: bool = False


@dataclass(frozen=True)
class BoundStep:
    """One unit of calibration: a module that is run, and its sites.

    Attributes:
        index: Position in calibration order.
        modality: Its tower's modality.
        name: Module path.
        sites: Its sites, in stage order.
        kind: ``entry``, ``block``, ``projector`` or ``head``.
    """

    index: int
    modality: Modality
    name: str
    sites: tuple[BoundSite, ...]
    kind: str


@dataclass(frozen=True)
class BoundEdge:
    """An edge of one concrete block, with module paths.

    Attributes:
        kind: Which rescaling it allows.
        norm: Norm at the upper end, or None.
        producer: Linear at the upper end, or None.
        consumers: All readers of the upper end's output.
        size: Channels at the upper end that can be scaled: of the norm; output rows of the
            producer.
        first_row: First row of the producer's weight that counts: two thirds down a fused
            query-key-value.
        tile: Times that the channels repeat in a consumer's input: 4 behind a concatenating merger.
        heads, kv_heads: Attention heads, for kind ``value``; otherwise 0.
        step: Index of the step of the consumers.
    """

    kind: EdgeKind
    norm: str | None
    producer: str | None
    consumers: tuple[str, ...]
    size: int
    first_row: int
    tile: int
    heads: int
    kv_heads: int
    step: int

    @property
    def source(self) -> str:
        """The upper end: the norm or the producer."""
        return self.norm or self.producer or ""


@dataclass(frozen=True)
class BoundModel:
    """An architecture bound to a folder.

    Attributes:
        arch: The architecture.
        folder: The checkpoint.
        config: Native transformers config.
        names: Disk names and module paths.
        steps: In calibration order.
        sites: All sites, in calibration order.
        edges: All edges.
        left_alone: ``(module path, reason)`` of layers that are never quantized.
        dtype: Most frequent floating dtype on disk, or the config's.
        shapes: Module tensor name -> shape, for every parameter and stored buffer.
        tied: Whether the head's weight is the token embedding.
        has_weights: Whether the folder has readable shards.
    """

    arch: ArchSpec
    folder: Path
    config: Any
    names: NameMap
    steps: tuple[BoundStep, ...]
    sites: tuple[BoundSite, ...]
    edges: tuple[BoundEdge, ...]
    left_alone: tuple[tuple[str, str], ...]
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    tied: bool
    has_weights: bool
    _by_name: dict[str, BoundSite] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._by_name.update({site.name: site for site in self.sites})

    def site(self, name: str) -> BoundSite:
        """The site of a module path.

        Raises:
            ModelError: There is none.
        """
        if name not in self._by_name:
            raise ModelError(
                f"{name!r} is no quantizable layer of {self.arch.title}",
                remedy=suggest(name, self._by_name) if len(self._by_name) < 40 else None,
            )
        return self._by_name[name]

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for image and video features."""
        return tuple(int(config_value(self.config, key)) for key in self.arch.vision_token_ids)


# ------------------------------------------------------------------------------------------ folder


def identify(folder: Path | str) -> ArchSpec:
    """Say which architecture a checkpoint folder holds.

    Raises:
        ModelError: There is no folder or no config.json, the file is broken, the model is
            text-only, or no architecture file describes its model type.
    """
    config = _read_config(Path(folder))
    model_type = config.get("model_type")
    by_type = {kind: arch for arch in known_archs().values() for kind in arch.model_types}
    if isinstance(model_type, str) and model_type in by_type:
        return by_type[model_type]
    where = str(Path(folder) / "config.json")
    if not isinstance(model_type, str):
        raise ModelError(
            "config.json has no model_type",
            where=where,
            remedy=f"use a checkpoint of one of: {', '.join(sorted(by_type))}",
        )
    if not any(config.get(key) for key in _VISION_KEYS):
        raise ModelError(
            f"model_type {model_type!r} is a text-only model: config.json has no vision part",
            where=where,
            remedy=f"use a vision-language checkpoint; {suggest(model_type, by_type)}",
        )
    raise ModelError(
        f"no architecture describes model_type {model_type!r}",
        where=where,
        remedy=suggest(model_type, by_type),
    )


def native_config(arch: ArchSpec, folder: Path | str) -> Any:
    """The native transformers config of a folder; a remote-code config is converted.

    Raises:
        ModelError: The config has values that the native classes do not implement, or lacks some.
    """
    folder = Path(folder)
    if arch.config_map is not None:
        return _converted(arch, arch.config_map, folder)
    _read_config(folder)
    transformers = import_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise _bad_config(arch, folder, error) from error


def config_value(config: Any, key: str) -> Any:
    """A value by dotted key, e.g. ``text_config.hidden_size``.

    Raises:
        ModelError: The config has no such key.
    """
    value = config
    for part in key.split("."):
        if not hasattr(value, part):
            raise ModelError(f"the config has no {key!r}")
        value = getattr(value, part)
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(
            f"there is no model folder {str(folder)!r}",
            remedy="give a folder with config.json and *.safetensors; download hub models first",
        )
    path = folder / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(item.name for item in folder.iterdir())[:6]) or "nothing"
        raise ModelError(
            f"the model folder has no config.json; it holds {found}",
            where=str(folder),
            remedy="give the folder of a Hugging Face checkpoint",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"config.json is not valid JSON: {error}",
            where=str(path),
            remedy="restore the file from the original checkpoint",
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"config.json holds a {type(config).__name__}, not an object",
            where=str(path),
            remedy="restore the file from the original checkpoint",
        )
    return config


def _bad_config(arch: ArchSpec, folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"transformers refuses the config of this {arch.title}: {error}",
        where=str(folder / "config.json"),
        remedy="restore config.json from the original checkpoint",
    )


# ------------------------------------------------------------------------------- config conversion


def _converted(arch: ArchSpec, table: ConfigMap, folder: Path) -> Any:
    raw = _read_config(folder)
    where = str(folder / "config.json")
    for key, expected in table.require.items():
        if raw.get(key, expected) != expected:
            raise ModelError(
                f"{key} is {raw[key]!r}; only {expected!r} is supported",
                where=where,
                remedy="use one of the released checkpoints of this architecture",
            )
    native: dict[str, Any] = {key: raw[key] for key in table.keys if key in raw}
    for section in table.sections:
        native[section.target] = _converted_section(raw, section, folder)
    tokens = _added_tokens(folder)
    native |= {key: tokens[text] for key, text in table.tokens.items() if text in tokens}
    transformers = import_transformers()
    try:
        return getattr(transformers, table.hf_class)(**native)
    except Exception as error:
        raise _bad_config(arch, folder, error) from error


def _converted_section(
    raw: Mapping[str, Any], section: ConfigSection, folder: Path
) -> dict[str, Any]:
    source = raw.get(section.source) if section.source else raw
    result: dict[str, Any] = dict(section.values)
    if isinstance(source, dict) and source:
        return result | {key: source[key] for key in section.keys if key in source}
    infos = _header_infos(folder)
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
        return infos[rule.tensor].shape[rule.axis] if rule.tensor in infos else None
    if rule.count is not None:
        prefix = rule.count + "."
        members = {name[len(prefix) :].split(".")[0] for name in infos if name.startswith(prefix)}
        return len(members) or None
    value = known.get(rule.divide or "")
    return value // rule.by if value is not None and value % rule.by == 0 else None


def _added_tokens(folder: Path) -> dict[str, int]:
    """Text -> id of the tokens that a tokenizer adds to its vocabulary."""
    tokens: dict[str, int] = {}
    if (folder / "tokenizer_config.json").is_file():
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        tokens |= {entry["content"]: int(number) for number, entry in added.items()}
    if (folder / "tokenizer.json").is_file():
        added = read_json(folder / "tokenizer.json").get("added_tokens", [])
        tokens |= {entry["content"]: int(entry["id"]) for entry in added}
    return tokens


# ---------------------------------------------------------------------------------- transformers


@functools.cache
def import_transformers() -> ModuleType:
    """Import transformers, also where torchvision lacks its compiled operators.

    transformers imports torchvision whenever it is installed. A torchvision built for another torch
    loads none of its operators, and then its own import fails because it describes two of them,
    ``nms`` and ``qnms``. Only detection models call these; declaring their schemas lets the import
    succeed.

    Raises:
        ModelError: transformers is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_torchvision_operators()
        importlib.import_module("torchvision")
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError("transformers is missing", remedy="pip install prismquant") from error


@functools.cache
def _declare_torchvision_operators() -> torch.library.Library:
    # The library object must stay alive, or its definitions vanish: hence the cache.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def empty_model(config: Any, arch: ArchSpec) -> nn.Module:
    """Build the model with parameters on the meta device and real buffers.

    Args:
        config: Native config, as :func:`native_config` returns it; it is not changed.
        arch: The architecture.

    Returns:
        The model in eval mode, without gradients or cache.

    Raises:
        ModelError: The config contradicts itself.
    """
    transformers = import_transformers()
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    # transformers warns of each unusual token id; the binding reports what matters.
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = getattr(transformers, arch.hf_class)(config)
    except Exception as error:
        raise ModelError(
            f"transformers cannot build this {arch.title}: {error}",
            remedy="restore config.json from the original checkpoint",
        ) from error
    finally:
        logger.setLevel(level)
    model.eval()
    model.requires_grad_(False)
    for part in model.modules():
        inner = getattr(part, "config", None)
        if inner is not None and hasattr(inner, "use_cache"):
            inner.use_cache = False
    return model


# ------------------------------------------------------------------------------------------- bind


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
    infos = _header_infos(folder)
    if headers_required and not infos:
        raise ModelError(
            "the model folder has no readable *.safetensors shard",
            where=str(folder),
            remedy="complete the download; pickle files are never read",
        )
    config = native_config(arch, folder)
    model = empty_model(config, arch)
    modules = dict(model.named_modules(remove_duplicate=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    disk_names = infos.keys() or _index_names(folder)
    names = choose_layout(arch.layouts, disk_names, modules.keys())
    head_weight = f"{arch.head}.weight"
    tied = (
        bool(getattr(config, "tie_word_embeddings", False))
        and names.to_disk(head_weight) not in disk_names
    )
    findings: list[str] = []
    steps = _bind_steps(arch, names, modules, tied, findings)
    sites = tuple(site for step in steps for site in step.sites)
    left_alone = _bind_left_alone(arch, modules, {site.name for site in sites}, findings)
    edges = _bind_edges(arch, config, modules, steps, findings)
    if not quantized:
        if _read_config(folder).get("quantization_config"):
            findings.append(
                "config.json has a quantization_config: the checkpoint is quantized already"
            )
        elif infos:
            findings.extend(_compare(arch, names, shapes, infos, head_weight if tied else None))
    if findings:
        raise _report(arch, folder, findings)
    return BoundModel(
        arch=arch,
        folder=folder,
        config=config,
        names=names,
        steps=steps,
        sites=sites,
        edges=edges,
        left_alone=left_alone,
        dtype=_dtype(config, infos),
        shapes=shapes,
        tied=tied,
        has_weights=bool(infos),
    )


def _header_infos(folder: Path) -> dict[str, TensorInfo]:
    if not any(folder.glob("*.safetensors")):
        return {}
    reader = ShardReader(folder)
    return {name: reader.info(name) for name in reader.names}


def _index_names(folder: Path) -> frozenset[str]:
    """Tensor names of an index whose shards are not there: enough to see the layout."""
    path = folder / INDEX_NAME
    content = read_json(path) if path.is_file() else None
    return frozenset(content.get("weight_map", {})) if isinstance(content, dict) else frozenset()


def _bind_steps(
    arch: ArchSpec,
    names: NameMap,
    modules: Mapping[str, nn.Module],
    tied: bool,
    findings: list[str],
) -> tuple[BoundStep, ...]:
    steps: list[BoundStep] = []
    for tower in arch.towers:
        for path, kind, sites in _tower_steps(tower, modules, findings):
            index = len(steps)
            bound = [
                _bind_site(site, tower, path, index, names, modules, findings) for site in sites
            ]
            kept = sorted((site for site in bound if site is not None), key=lambda site: site.stage)
            steps.append(BoundStep(index, tower.modality, path, tuple(kept), kind))
    head = Site("lm_head", "", SiteKind.LINEAR, 0, "final")
    llm = arch.towers[-1]
    bound_head = _bind_site(head, llm, arch.head, len(steps), names, modules, findings, tied=tied)
    if bound_head is not None:
        steps.append(BoundStep(len(steps), llm.modality, arch.head, (bound_head,), "head"))
    return tuple(steps)


def _tower_steps(
    tower: Tower, modules: Mapping[str, nn.Module], findings: list[str]
) -> Iterator[tuple[str, str, tuple[Site, ...]]]:
    if tower.root not in modules:
        findings.append(f"{tower.root}: the {tower.modality} tower's root does not exist")
    if tower.entry is not None:
        yield tower.entry, "entry", tower.entry_sites
    if tower.blocks is not None:
        for path in _members(tower.blocks, modules, findings):
            yield path, "block", tower.sites
    for pattern in tower.modules:
        paths = _members(pattern[:-2], modules, findings) if pattern.endswith(".*") else [pattern]
        for path in paths:
            yield path, "projector", tower.sites


def _members(path: str, modules: Mapping[str, nn.Module], findings: list[str]) -> list[str]:
    container = modules.get(path)
    if not isinstance(container, nn.ModuleList):
        findings.append(f"{path}: expected a list of modules, found {_kind(container)}")
        return []
    return [f"{path}.{index}" for index in range(len(container))]


def _bind_site(
    site: Site,
    tower: Tower,
    parent: str,
    step: int,
    names: NameMap,
    modules: Mapping[str, nn.Module],
    findings: list[str],
    *,
    tied: bool = False,
) -> BoundSite | None:
    name = f"{parent}.{site.path}" if site.path else parent
    module = modules.get(name)
    if site.kind is SiteKind.LINEAR and isinstance(module, nn.Linear):
        matrix = (module.out_features, module.in_features)
    elif site.kind is SiteKind.PATCH_CONV and isinstance(module, _CONVOLUTIONS):
        if problem := _not_a_patch_conv(module):
            findings.append(f"{name}: {problem}")
            return None
        weight = module.weight
        matrix = (weight.shape[0], weight[0].numel())
    else:
        findings.append(f"{name}: expected a {site.kind} ({site.role}), found {_kind(module)}")
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
        tied=tied,
    )


def _not_a_patch_conv(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    if tuple(conv.kernel_size) != tuple(conv.stride):
        return f"kernel {conv.kernel_size} differs from stride {conv.stride}: not a reshape"
    padded = conv.padding != "valid" if isinstance(conv.padding, str) else any(conv.padding)
    if padded or conv.groups != 1 or any(d != 1 for d in conv.dilation):
        return "padding, groups or dilation: not a reshape"
    return None


def _bind_left_alone(
    arch: ArchSpec, modules: Mapping[str, nn.Module], claimed: set[str], findings: list[str]
) -> tuple[tuple[str, str], ...]:
    result: list[tuple[str, str]] = []
    for name, module in modules.items():
        if isinstance(module, nn.Embedding):
            result.append((name, "embedding: a look-up, not a matrix product"))
        if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or name in claimed:
            continue
        reason = next((r for p, r in arch.left_alone.items() if fnmatch.fnmatch(name, p)), None)
        if reason is None and not any(finding.startswith(f"{name}:") for finding in findings):
            findings.append(f"{name}: {_kind(module)} that no site of {arch.name}.toml claims")
        elif reason is not None:
            result.append((name, reason))
    return tuple(result)


def _kind(module: nn.Module | None) -> str:
    return "nothing" if module is None else type(module).__name__


# ------------------------------------------------------------------------------------------ edges


def _bind_edges(
    arch: ArchSpec,
    config: Any,
    modules: Mapping[str, nn.Module],
    steps: tuple[BoundStep, ...],
    findings: list[str],
) -> tuple[BoundEdge, ...]:
    result: list[BoundEdge] = []
    owner = {site.name: step.index for step in steps for site in step.sites}
    for tower in arch.towers:
        try:
            heads = int(config_value(config, tower.heads)) if tower.heads else 0
            kv_heads = int(config_value(config, tower.kv_heads)) if tower.kv_heads else heads
        except ModelError as error:
            findings.append(error.what)
            continue
        for step in steps:
            if step.modality is tower.modality and step.kind in ("block", "projector"):
                for edge in tower.edges:
                    bound = _bind_edge(edge, step.name, heads, kv_heads, modules, owner, findings)
                    result.extend(bound)
    for edge in arch.edges:
        result.extend(_bind_edge(edge, "", 0, 0, modules, owner, findings))
    return tuple(result)


def _bind_edge(
    edge: Edge,
    parent: str,
    heads: int,
    kv_heads: int,
    modules: Mapping[str, nn.Module],
    owner: Mapping[str, int],
    findings: list[str],
) -> list[BoundEdge]:
    prefix = f"{parent}." if parent else ""
    source = modules.get(prefix + edge.source)
    consumers = tuple(prefix + path for path in edge.consumers)
    weight = getattr(source, "weight", None)
    if not isinstance(weight, torch.Tensor):
        findings.append(f"{prefix + edge.source}: an edge starts here, found {_kind(source)}")
        return []
    linears = [module for path in consumers if isinstance(module := modules.get(path), nn.Linear)]
    if len(linears) != len(consumers) or any(path not in owner for path in consumers):
        findings.append(f"{prefix + edge.source}: an edge ends in something that is no site")
        return []
    rows = weight.shape[0]
    size = rows // 3 if edge.part == "v" else rows
    is_value = edge.kind is EdgeKind.VALUE
    # Grouped heads: a value channel is read by several heads, so the input is wider by their ratio.
    width = size if not is_value else size * heads // max(kv_heads, 1)
    if any(linear.in_features % width for linear in linears):
        findings.append(
            f"{prefix + edge.source}: {size} channels do not divide the inputs of {list(consumers)}"
        )
        return []
    return [
        BoundEdge(
            kind=edge.kind,
            norm=prefix + edge.norm if edge.norm else None,
            producer=prefix + edge.producer if edge.producer else None,
            consumers=consumers,
            size=size,
            first_row=rows - size,
            tile=linears[0].in_features // width,
            heads=heads if is_value else 0,
            kv_heads=kv_heads if is_value else 0,
            step=owner[consumers[0]],
        )
    ]


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
        elif not infos[disk].dtype.is_floating_point:
            findings.append(f"{disk}: dtype {infos[disk].dtype} on disk, expected floating point")
    findings.extend(
        f"{disk}: not a tensor of this model"
        for disk in sorted(infos.keys() - expected)
        if not any(fnmatch.fnmatch(disk, pattern) for pattern in arch.ignored_tensors)
    )
    return findings


def _report(arch: ArchSpec, folder: Path, findings: list[str]) -> ModelError:
    count = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
    shown = [f"  - {finding}" for finding in findings[:_MAX_FINDINGS]]
    if len(findings) > _MAX_FINDINGS:
        shown.append(f"  - and {len(findings) - _MAX_FINDINGS} more")
    return ModelError(
        "\n".join([f"the checkpoint does not fit {arch.title}: {count}", *shown]),
        where=str(folder),
        remedy="use an unmodified, complete, unquantized checkpoint of this architecture",
    )


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
