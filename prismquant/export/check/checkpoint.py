"""A checkpoint as the rules see it: configuration, headers, and the model's layers by both names.

Everything is read once and leniently: a shard that is cut short, an index that lies or an
architecture that is not known is remembered for the rules to tell, and what can be checked without
it still is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prismquant.errors import ModelError, PrismQuantError, StorageError
from prismquant.export.check import vllm
from prismquant.export.check.findings import Reader
from prismquant.export.check.scheme import Group, group_in_transformers, read_groups
from prismquant.headers import TensorInfo, read_header
from prismquant.models.arch import Modality, SiteKind
from prismquant.models.bind import BoundModel, BoundSite, bind
from prismquant.storage import INDEX_NAME, read_json

CONFIG_KEY = "quantization_config"
COMPRESSED_TENSORS = "compressed-tensors"
GGUF = "gguf"
MODELOPT_FILE = "hf_quant_config.json"
# Larger tensors are never read.
_SCALAR_BYTES = 1024


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    Attributes:
        name: Its module path.
        called: What a configuration calls it.
        disk: Prefix of its tensors.
        out_features, in_features: Shape of its weight.
        site: Its site; None for a linear that is never quantized.
        group: The group that it belongs to, as the reader in question finds it.
        in_vllm: What vLLM finds; None where vLLM does not know the architecture.
        in_transformers: The group that transformers finds.
    """

    name: str
    called: str
    disk: str
    out_features: int
    in_features: int
    site: BoundSite | None
    group: Group | None
    in_vllm: vllm.Found | None
    in_transformers: Group | None

    @property
    def fuse_key(self) -> str | None:
        """Equal for layers that servers fuse."""
        return self.site.fuse_key if self.site else None

    @property
    def role(self) -> str:
        """Its role; empty for a linear without one."""
        return self.site.role if self.site else ""

    @property
    def row_parallel(self) -> bool:
        """Whether servers split its input, rather than its output, over GPUs."""
        return self.role in ("attn.out", "mlp.down", "projector.fc2")


@dataclass(frozen=True)
class Checkpoint:
    """What the rules look at.

    Attributes:
        folder: Where it is.
        target: The reader in question.
        config: ``config.json``; empty for GGUF files, which have none.
        section: Its ``quantization_config``; empty where there is none.
        headers: Shard -> what its header says.
        unreadable: Shard -> why its header cannot be read.
        index: The index file's content; None where there is none.
        modelopt_file: ModelOpt's own file; None where there is none.
        groups: The groups of a compressed-tensors configuration.
        model: The model as its architecture describes it; None where it is not known.
        model_fault: Why not.
        layers: Its linear layers.
    """

    folder: Path
    target: Reader | None
    config: Mapping[str, Any]
    section: Mapping[str, Any]
    headers: Mapping[str, Mapping[str, TensorInfo]]
    unreadable: Mapping[str, str]
    index: Mapping[str, Any] | None
    modelopt_file: Mapping[str, Any] | None
    groups: tuple[Group, ...]
    model: BoundModel | None
    model_fault: str
    layers: tuple[Layer, ...] = ()
    _values: dict[str, tuple[float, ...] | None] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def method(self) -> str:
        """The quantization method in lower case; empty where there is none."""
        if not self.section:
            return ""
        return str(self.section.get("quant_method") or COMPRESSED_TENSORS).lower()

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        return {name: info for header in self.headers.values() for name, info in header.items()}

    @property
    def ignore(self) -> tuple[str, ...]:
        """What a compressed-tensors configuration leaves alone."""
        listed = self.section.get("ignore") or []
        return tuple(str(item) for item in listed) if isinstance(listed, list) else ()

    @property
    def quantized(self) -> tuple[Layer, ...]:
        """Layers that belong to a group."""
        return tuple(layer for layer in self.layers if layer.group is not None)

    def of_group(self) -> Iterator[tuple[Group, tuple[Layer, ...]]]:
        """Well-formed groups that have layers, with them."""
        for group in self.groups:
            members = tuple(layer for layer in self.layers if layer.group is group)
            if members and group.well_formed:
                yield group, members

    def fused(self) -> Iterator[tuple[Layer, ...]]:
        """Sets of layers that servers fuse."""
        sets: dict[str, list[Layer]] = {}
        for layer in self.layers:
            if layer.fuse_key is not None:
                sets.setdefault(layer.fuse_key, []).append(layer)
        return (tuple(members) for members in sets.values())

    def attentions(self) -> dict[str, Layer]:
        """Prefix on disk of each attention module of the language model -> its key projection."""
        return {
            layer.disk.rpartition(".")[0]: layer
            for layer in self.layers
            if layer.site is not None
            and layer.site.modality is Modality.LLM
            and layer.role == "attn.qkv.k"
        }

    def scalar(self, name: str) -> tuple[float, ...] | None:
        """The values of a small tensor; None where it is missing, large or not readable."""
        if name not in self._values:
            self._values[name] = self._read(name)
        return self._values[name]

    def _read(self, name: str) -> tuple[float, ...] | None:
        info = self.tensors.get(name)
        if info is None or info.nbytes > _SCALAR_BYTES:
            return None
        try:
            with safe_open(self.folder / info.file, framework="pt") as shard:
                tensor = shard.get_tensor(name)
        except (OSError, SafetensorError):
            return None
        return tuple(tensor.to(torch.float64).flatten().tolist())


def open_checkpoint(folder: Path, target: Reader | None) -> Checkpoint:
    """Read what the rules look at.

    Raises:
        ModelError: There is no folder, or no readable ``config.json`` in it.
    """
    config = _config(folder)
    section = config.get(CONFIG_KEY)
    modelopt_file = _modelopt_file(folder)
    if not isinstance(section, Mapping):
        # Older exports of ModelOpt say how they are quantized in a file of their own only.
        section = {"quant_method": "modelopt"} if modelopt_file else {}
    if not config:
        section = {"quant_method": GGUF}
    headers: dict[str, Mapping[str, TensorInfo]] = {}
    unreadable: dict[str, str] = {}
    index = _index(folder, unreadable)
    for name in _shards(folder, index):
        try:
            headers[name] = read_header(folder / name)
        except StorageError as error:
            unreadable[name] = error.what
    model, fault = _model(folder)
    checkpoint = Checkpoint(
        folder=folder,
        target=target,
        config=config,
        section=section,
        headers=headers,
        unreadable=unreadable,
        index=index,
        modelopt_file=modelopt_file,
        groups=read_groups(section),
        model=model,
        model_fault=fault,
    )
    return replace(checkpoint, layers=tuple(_layers(checkpoint, model))) if model else checkpoint


def _config(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"there is no folder {str(folder)!r}")
    if not (folder / "config.json").exists() and any(folder.glob("*.gguf")):
        return {}
    try:
        config = read_json(folder / "config.json")
    except StorageError as error:
        raise ModelError(
            error.what,
            where=str(folder),
            remedy="config.json is written last: without it the run is unfinished, run it "
            "again with --resume; or restore it from the original checkpoint",
        ) from error
    if not isinstance(config, Mapping) or not config:
        raise ModelError(
            "config.json is not an object with keys", where=str(folder / "config.json")
        )
    return config


def _modelopt_file(folder: Path) -> Mapping[str, Any] | None:
    if not (folder / MODELOPT_FILE).is_file():
        return None
    try:
        content = read_json(folder / MODELOPT_FILE)
    except StorageError:
        return {}
    return content if isinstance(content, Mapping) else {}


def _index(folder: Path, unreadable: dict[str, str]) -> Mapping[str, Any] | None:
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except StorageError as error:
        unreadable[INDEX_NAME] = error.what
        return None
    if isinstance(content, Mapping) and isinstance(content.get("weight_map"), Mapping):
        return content
    unreadable[INDEX_NAME] = "the index has no weight_map"
    return None


def _shards(folder: Path, index: Mapping[str, Any] | None) -> list[str]:
    named = set(map(str, index["weight_map"].values())) if index else set()
    lying = {path.name for path in folder.glob("*.safetensors") if not path.name.startswith(".")}
    return sorted(named | lying)


def _model(folder: Path) -> tuple[BoundModel | None, str]:
    try:
        return bind(folder, headers_required=False, quantized=True), ""
    except PrismQuantError as error:
        return None, error.what


def _layers(checkpoint: Checkpoint, model: BoundModel) -> Iterator[Layer]:
    naming = vllm.naming(model.arch.name)
    sites = {site.name: site for site in model.sites if site.kind is SiteKind.LINEAR}
    spare = [name for name, _ in model.left_alone if _is_matrix(model, name)]
    found = _found_in_vllm(checkpoint, model, [*sites, *spare], naming)
    for name in [*sites, *spare]:
        disk = _disk(model, name)
        called = disk if model.arch.config_map is not None else name
        out_features, in_features = model.shapes[f"{name}.weight"]
        in_transformers = group_in_transformers(called, checkpoint.groups, checkpoint.ignore)
        in_vllm = found.get(name)
        serves = checkpoint.target in (Reader.VLLM, Reader.SGLANG) and in_vllm is not None
        group = in_vllm.group if serves and in_vllm is not None else in_transformers
        yield Layer(
            name=name,
            called=called,
            disk=disk,
            out_features=out_features,
            in_features=in_features,
            site=sites.get(name),
            group=group,
            in_vllm=in_vllm,
            in_transformers=in_transformers,
        )


def _found_in_vllm(
    checkpoint: Checkpoint, model: BoundModel, names: list[str], naming: vllm.Naming | None
) -> dict[str, vllm.Found]:
    if naming is None or model.arch.config_map is not None:
        return {}
    keys = {site.name: site.fuse_key for site in model.sites}
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(keys.get(name) or name, []).append(name)
    found: dict[str, vllm.Found] = {}
    for key, members in parts.items():
        label = key.rpartition(":")[2] if keys.get(members[0]) else None
        one = vllm.find_group(
            members,
            label,
            checkpoint.groups,
            checkpoint.ignore,
            naming,
            head=members[0] == model.arch.head,
        )
        found |= dict.fromkeys(members, one)
    return found


def _is_matrix(model: BoundModel, name: str) -> bool:
    """Whether a layer that is left alone is a linear: embeddings are look-ups."""
    reasons = dict(model.left_alone)
    shape = model.shapes.get(f"{name}.weight", ())
    return len(shape) == 2 and not reasons[name].startswith("embedding")


def _disk(model: BoundModel, name: str) -> str:
    return model.names.to_disk(f"{name}.weight").removesuffix(".weight")
