"""Roles of layers by their names and by what they read, and what follows from a role."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prismquant.models.arch import Cached, Modality, Parallel, Site, SiteKind

__all__ = ["block_sites", "expert_sites", "projector_sites"]

_INPUTS = {"attn.out": "attn_out", "mlp.down": "mlp_mid"}
_GATE_UP = {"mlp.gate", "mlp.up"}
# An MLP of these alone has nothing but functions of single numbers between its layers.
_PLAIN_MLP = {"mlp.gate", "mlp.up", "mlp.down"}
# The end of a layer's path -> its role, tried in order; within attention, and elsewhere.
_IN_ATTENTION = (
    (r"qkv(_proj)?|query_key_value|c_attn|Wqkv", "attn.qkv"),
    (r"q(_proj|_lin)?|query|wq", "attn.qkv.q"),
    (r"k(_proj|_lin)?|key|wk", "attn.qkv.k"),
    (r"v(_proj|_lin)?|value|wv", "attn.qkv.v"),
    (r"o_proj|out_proj|proj|projection_layer|dense|c_proj|o|out|wo|out_lin", "attn.out"),
)
_ELSEWHERE = (
    (r"gate_up_proj|gate_up|gate_and_up_proj|up_gate_proj", "mlp.gate_up"),
    (r"gate_proj|gate|w1", "mlp.gate"),
    (r"up_proj|up|fc1|linear_fc1|linear_?1|c_fc|w3|dense_h_to_4h|fc_in", "mlp.up"),
    (r"down_proj|down|fc2|linear_fc2|linear_?2|c_proj|w2|dense_4h_to_h|fc_out", "mlp.down"),
)
_ATTENTION = re.compile(r"att", re.IGNORECASE)
_OTHER_MIXER = re.compile(r"linear_att|mamba|ssm|conv|recurrent|delta", re.IGNORECASE)


def block_sites(groups: Sequence[Sequence[str]], modality: Modality) -> tuple[Site, ...]:
    """Sites of a block.

    Args:
        groups: Paths of its layers in the order of their calls, those that read one tensor
            together.
        modality: Of the tower.
    """
    roles = {path: _role(path) for group in groups for path in group}
    mlp = {role for role in roles.values() if role.startswith("mlp.")}
    plain = mlp <= _PLAIN_MLP and len(mlp) == sum(role in mlp for role in roles.values())
    labels = _labels(groups, roles)
    sites = []
    for stage, group in enumerate(groups):
        together = {roles[path] for path in group}
        for path in group:
            role = roles[path]
            sites.append(
                Site(
                    role=role,
                    path=path,
                    kind=SiteKind.LINEAR,
                    stage=stage,
                    input=labels[stage],
                    fuse=_fuse(role, together),
                    parallel=_parallel(role),
                    closes_stream=role in _INPUTS,
                    elementwise=plain and role in mlp,
                    online_rotation=plain and role == "mlp.down",
                    cache=_cache(role) if modality is Modality.LLM else None,
                )
            )
    return tuple(sites)


def expert_sites(modules: Sequence[str], stage: int) -> tuple[Site, ...]:
    """Sites of a block's experts, whose matrices become layers.

    Args:
        modules: That hold experts, relative to the block.
        stage: Of their first layers.
    """
    sides = ("gate", Parallel.COLUMN), ("up", Parallel.COLUMN), ("down", Parallel.ROW)
    return tuple(
        Site(
            role=f"mlp.experts.{name}",
            path=f"{path}.*.{name}_proj",
            kind=SiteKind.LINEAR,
            stage=stage + (name == "down"),
            input="expert_mid" if name == "down" else "expert_in",
            fuse=None if name == "down" else "gate_up",
            parallel=side,
            closes_stream=name == "down",
        )
        for path in modules
        for name, side in sides
    )


def projector_sites(groups: Sequence[Sequence[str]], joined: bool) -> tuple[Site, ...]:
    """Sites of a projector, numbered where each reads a tensor of its own.

    Args:
        groups: As for :func:`block_sites`.
        joined: Whether a norm's output is what its first layer reads.
    """
    sites = []
    for stage, group in enumerate(groups):
        first, last = stage == 0, stage == len(groups) - 1
        label = ("merged" if joined else "features") if first else "hidden"
        if len(groups) > 2 and not first:
            label = f"hidden_{stage}"
        for path in group:
            kind = _role(path).removeprefix("mlp.").removeprefix("attn.")
            role = f"fc{stage + 1}" if len(group) == 1 else kind
            side = Parallel.ROW if last else Parallel.COLUMN
            side_or_none = side if len(groups) > 1 else None
            roles = {_role(other) for other in group}
            fuse = "gate_up" if roles == _GATE_UP else None
            sites.append(
                Site(f"projector.{role}", path, SiteKind.LINEAR, stage, label, fuse, side_or_none)
            )
    return tuple(sites)


def _role(path: str) -> str:
    """The role of a layer of a block; its own name where the name is no known one."""
    parts = path.split(".")
    leaf = parts[-1] if len(parts) == 1 or parts[-1] != "linear" else parts[-2]
    above = ".".join(parts[:-1])
    if _OTHER_MIXER.search(above):
        return f"{parts[0].replace('_', '-')}.{leaf}".replace("-", "_")
    inside = bool(_ATTENTION.search(above)) or leaf in ("qkv", "qkv_proj", "Wqkv")
    for pattern, role in _IN_ATTENTION if inside else _ELSEWHERE:
        if re.fullmatch(pattern, leaf):
            return role
    return f"{'attn' if inside else 'mlp'}.{leaf}"


def _labels(groups: Sequence[Sequence[str]], roles: dict[str, str]) -> list[str]:
    """A label for the input of each group; no two are equal."""
    labels: list[str] = []
    for group in groups:
        role = roles[group[0]]
        label = _INPUTS.get(role) or f"{role.partition('.')[0]}_in"
        if label in labels:
            label = f"{label}_{group[0].replace('.', '_')}"
        labels.append(label)
    return labels


def _fuse(role: str, together: set[str]) -> str | None:
    """The label of what servers make of layers that read one tensor."""
    if role.startswith("attn.qkv."):
        return "qkv" if together >= {"attn.qkv.q", "attn.qkv.k", "attn.qkv.v"} else None
    return "gate_up" if role in _GATE_UP and together >= _GATE_UP else None


def _parallel(role: str) -> Parallel | None:
    if role in _INPUTS:
        return Parallel.ROW
    cut = role in ("attn.qkv", "attn.qkv.q", "mlp.gate_up", *_GATE_UP)
    return Parallel.COLUMN if cut else None


def _cache(role: str) -> Cached | None:
    return {"attn.qkv.k": Cached.KEYS, "attn.qkv.v": Cached.VALUES}.get(role)
