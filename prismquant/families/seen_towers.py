"""Towers of a model, as one watched run shows them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from prismquant.families.seen_roles import block_sites, expert_sites, projector_sites
from prismquant.families.watched_run import WatchedRun
from prismquant.models.arch import Modality, Site, SiteKind, Tower
from prismquant.models.claims import CONVOLUTIONS
from prismquant.models.experts import DOWN, GATE_UP
from prismquant.models.norm_probe import NormProbe

__all__ = ["SeenModel", "seen_towers"]

_DEPTH = ("num_hidden_layers", "depth", "num_layers", "n_layers", "n_layer", "layers")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")


@dataclass(frozen=True)
class SeenModel:
    """A small model and one run of it.

    Attributes:
        model: With random weights.
        config: Its configuration.
        run: With pictures where the model sees any.
        embeddings, head: Module paths.
        decoder: Module path of the language model without its head.
        modules: By path.
    """

    model: nn.Module
    config: Any
    run: WatchedRun
    embeddings: str
    head: str
    decoder: str
    modules: Mapping[str, nn.Module]

    def layers(self, below: str) -> list[str]:
        """Linears below a module that were called, in the order of their first calls."""
        return sorted(
            (path for path in self.run.order if is_below(path, below) and self.is_layer(path)),
            key=self.run.order.__getitem__,
        )

    def is_layer(self, path: str) -> bool:
        """Whether a module is a linear that neither routes tokens nor makes one number of each."""
        module = self.modules[path]
        if not isinstance(module, nn.Linear) or module.out_features == 1:
            return False
        above = self.modules[path.rpartition(".")[0]]
        return module.out_features not in map(experts_of, above.children())

    def groups(self, parent: str) -> list[list[str]]:
        """Layers of a module by the tensor that they read, relative to it, in order."""
        found: dict[int, list[str]] = {}
        for path in self.layers(parent):
            relative = path[len(parent) + 1 :] if path != parent else ""
            found.setdefault(self.run.reads[path], []).append(relative)
        return list(found.values())


def experts_of(module: nn.Module) -> int | None:
    """Number of experts that a module holds in two parameters; None where it holds none."""
    held = [getattr(module, name, None) for name in (GATE_UP, DOWN)]
    counts = [one.shape[0] for one in held if isinstance(one, nn.Parameter) and one.dim() == 3]
    return int(counts[0]) if len(counts) == len(held) else None


def is_below(path: str, parent: str) -> bool:
    """Whether a module is another, or lies in it."""
    return path == parent or path.startswith(f"{parent}.") or not parent


def seen_towers(seen: SeenModel) -> tuple[Tower, ...]:
    """Vision tower, projectors and language model, as far as they were seen.

    Edges are left out. Blocks of a tower are the members of the outermost list of modules that ran
    one upon the other; what lies between them and the language model is a projector.
    """
    lists = _chains(seen)
    text = next((one for one in lists if is_below(one, seen.decoder)), None)
    if text is None:
        return ()
    vision = next((one for one in lists if one != text and not is_below(one, seen.decoder)), None)
    towers: list[Tower] = []
    if vision is not None:
        root = _root_of(vision, seen)
        entry, site = _entry(root, vision, seen)
        tower = Tower(Modality.VISION, root, entry, vision, entry_sites=(site,) if site else ())
        towers.append(_with_blocks(tower, seen))
        towers += _projectors(towers[0], seen)
    root = seen.decoder
    towers.append(_with_blocks(Tower(Modality.LLM, root, blocks=text), seen))
    return tuple(towers)


def _chains(seen: SeenModel) -> list[str]:
    """Outermost lists of modules with layers, of which each reads what the one before put out."""
    found: list[str] = []
    for path, module in seen.modules.items():
        if not isinstance(module, nn.ModuleList) or any(is_below(path, one) for one in found):
            continue
        members = [f"{path}.{index}" for index in range(len(module))]
        if not members or not all(member in seen.run.order for member in members):
            continue
        if any(seen.layers(member) for member in members) and _is_chain(members, path, seen):
            found.append(path)
    return sorted(found, key=lambda path: seen.run.order[f"{path}.0"])


def _is_chain(members: Sequence[str], path: str, seen: SeenModel) -> bool:
    """Whether members ran one upon the other; inside the language model, that they ran is enough.

    Features may be added to the language model's stream between its blocks.
    """
    if is_below(path, seen.decoder):
        return any("attn" in one or "attention" in one for one in seen.layers(path))
    pairs = itertools.pairwise(members)
    return all(seen.run.writes.get(a) == seen.run.reads.get(b) for a, b in pairs)


def _root_of(blocks: str, seen: SeenModel) -> str:
    """The largest module around blocks that does not hold the language model."""
    parts = blocks.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if not is_below(seen.decoder, path) and path in seen.run.order:
            return path
    return blocks


def _entry(root: str, blocks: str, seen: SeenModel) -> tuple[str | None, Site | None]:
    """The module that cuts pictures into patches, and its layer; None where it is no matrix."""
    run = seen.run
    first = min(
        (
            path
            for path in run.order
            if is_below(path, root) and isinstance(seen.modules[path], (nn.Linear, *CONVOLUTIONS))
        ),
        key=run.order.__getitem__,
    )
    if is_below(first, blocks):
        return None, None
    module, entry = seen.modules[first], first
    kind = SiteKind.LINEAR if isinstance(module, nn.Linear) else SiteKind.PATCH_CONV
    if isinstance(module, CONVOLUTIONS) and module.kernel_size != module.stride:
        return None, None
    while (above := entry.rpartition(".")[0]) != root and above in run.order:
        if is_below(blocks, above):
            break
        entry = above
    relative = first[len(entry) + 1 :]
    return entry, Site("patch_embed", relative, kind, 0, "pixels")


def _projectors(vision: Tower, seen: SeenModel) -> Iterator[Tower]:
    """Modules with layers outside the towers; members of a list, and alike modules, together."""
    apart = [vision.blocks, vision.entry, seen.decoder, seen.head]
    loose = [
        path
        for path in seen.layers("")
        if not any(is_below(path, one) for one in apart if one is not None)
    ]
    found: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for path in loose:
        parent = _outermost(path, vision, seen)
        key = tuple(tuple(group) for group in seen.groups(parent))
        if parent not in (mine := found.setdefault(key, [])):
            mine.append(parent)
    for groups, parents in found.items():
        joined = any(
            seen.run.writes.get(path) == seen.run.reads[_joined(parents[0], groups[0][0])]
            for path in _norms(parents[0], seen)
        )
        inside = all(is_below(parent, vision.root) for parent in parents)
        yield Tower(
            Modality.PROJECTOR,
            vision.root if inside else parents[0],
            modules=tuple(dict.fromkeys(_starred(parent, seen) for parent in parents)),
            sites=projector_sites(groups, joined),
        )


def _outermost(path: str, vision: Tower, seen: SeenModel) -> str:
    """The outermost module around a layer that ran, and holds no part of another tower."""
    parent = path
    while above := parent.rpartition(".")[0]:
        whole = [vision.root, vision.blocks or "", seen.decoder]
        held = any(is_below(one, above) for one in whole)
        if held or (
            above not in seen.run.order
            and not isinstance(seen.modules[above], nn.ModuleList | nn.Sequential)
        ):
            break
        parent = above
    while isinstance(seen.modules[parent], nn.ModuleList):  # never called itself
        parent = path[: path.find(".", len(parent) + 1)]
    return parent


def _starred(path: str, seen: SeenModel) -> str:
    """The path of a member of a list, as all members are named."""
    above = path.rpartition(".")[0]
    return f"{above}.*" if isinstance(seen.modules.get(above), nn.ModuleList) else path


def _norms(parent: str, seen: SeenModel) -> list[str]:
    probe = NormProbe()
    return [
        path
        for path in seen.run.order
        if is_below(path, parent) and probe.behaviour(seen.modules[path]) is not None
    ]


def _joined(parent: str, path: str) -> str:
    return f"{parent}.{path}" if path else parent


def _with_blocks(tower: Tower, seen: SeenModel) -> Tower:
    """A tower with the sites of its blocks, and the keys that say how many there are of what."""
    count = len(seen.modules[tower.blocks or ""])  # type: ignore[arg-type]
    blocks = [f"{tower.blocks}.{index}" for index in range(count)]
    owners: dict[str, list[str]] = {}
    experts: list[str] = []
    known: dict[str, Site] = {}
    for block in blocks:
        inside = [
            path[len(block) + 1 :]
            for path, module in seen.modules.items()
            if is_below(path, block) and experts_of(module)
        ]
        experts += [path for path in inside if path not in experts]
        sites_here = block_sites(seen.groups(block), tower.modality)
        for site in (*sites_here, *expert_sites(inside, 1 + max(s.stage for s in sites_here))):
            owners.setdefault(site.path, []).append(block)
            known.setdefault(site.path, site)
    sites = tuple(
        site if len(owners[site.path]) == count else _in_some(site, owners[site.path], blocks, seen)
        for site in sorted(known.values(), key=lambda site: site.stage)
    )
    text = seen.config.get_text_config()
    part = text if tower.modality is Modality.LLM else _vision_part(seen.config)
    section = _section_of(seen.config, part)
    keys = [_key(part, section, names, n) for names, n in ((_DEPTH, count), (_HEADS, None))]
    kv_heads = _key(part, section, _KV_HEADS, None)
    return replace(
        tower,
        sites=sites,
        experts=tuple(experts),
        depth=keys[0],
        heads=keys[1],
        kv_heads=kv_heads,
    )


def _in_some(site: Site, owners: Iterable[str], blocks: Iterable[str], seen: SeenModel) -> Site:
    """A site that only some blocks have, with the outermost module by which they are known."""
    others = [block for block in blocks if block not in owners]
    parts = site.path.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if "*" in path:
            break
        if not any(f"{block}.{path}" in seen.modules for block in others):
            return replace(site, in_blocks_with=path)
    return site


def _vision_part(config: Any) -> Any:
    """The part of a configuration that describes the vision tower; None where there is none."""
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and "vision" in name:
            return inner
        if inner is not None and (found := _vision_part(inner)) is not None:
            return found
    return None


def _section_of(config: Any, part: Any) -> str | None:
    """The dotted keys that lead to a part of a configuration; empty for itself."""
    if part is config:
        return ""
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and (path := _section_of(inner, part)) is not None:
            return f"{name}.{path}".rstrip(".")
    return None


def _key(part: Any, section: str | None, names: Iterable[str], value: int | None) -> str | None:
    """The key of a configuration that holds a number, or this number."""
    said = {} if part is None else part.to_dict()
    for name in names:
        held = said.get(name)
        if section is not None and type(held) is int and value in (None, held):
            return f"{section}.{name}".lstrip(".")
    return None
