"""A model's configuration with the same structure, and few words and narrow blocks.

Two blocks of each kind stay, a few attention heads of their own size, and the tokens that are
needed, numbered anew. The sizes of patches and all that says how the model computes stay as they
are. A key that holds the width of the language model, such as what a vision tower puts out for it,
follows that width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["shrunk_config", "special_ids"]

_Section = dict[str, Any]

# Blocks of each kind that stay.
_BLOCKS = 2
# Key-value heads, query heads that share one, and width of an MLP in widths of the stream. Few
# whole widths stay as many: they may be those of neighbours whose features are joined.
_KV_HEADS, _GROUP, _EXPANSION, _MOST_WIDTHS = 2, 2, 2, 4
_EXPERTS, _ACTIVE = 4, 2
# Fewer tokens than the shortest sample has, so that windows matter.
_WINDOW = 8

# The first of these that a section has is meant.
_WIDTH = ("embed_dim", "hidden_size", "d_model")
_HEADS = ("num_attention_heads", "num_heads")
_DEPTH = ("num_hidden_layers", "depth", "num_layers")
# All of these follow the section's own width.
_INNER = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    "intermediate_size_mlp",
)
# All of these may hold the width of the language model.
_OUTER = ("out_hidden_size", "hidden_size", "projection_dim", "text_hidden_size")
_TOKEN_KEYS = ("token_id", "token_index", "token_ids")
_MOST = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_selected_experts"), _ACTIVE),
    # Of the experts, two groups, in one of which a token chooses.
    "n_group": 2,
    "topk_group": 1,
    "sliding_window": _WINDOW,
}
# How many blocks at the beginning are of another kind than those behind.
_FIRST_BLOCKS = ("first_k_dense_replace",)


def shrunk_config(config: Any, token_ids: Sequence[int]) -> Any:
    """A configuration of the same class, of a model of two narrow blocks of each kind.

    Args:
        config: Native configuration; it is not changed.
        token_ids: All tokens that stay, :func:`special_ids` among them; each becomes its place in
            this list.
    """
    body = config.to_dict()
    sections = list(_sections(body, config))
    language = _section_of(body, config)
    key = _first(language, _WIDTH)
    old = language.get(key) if key else None
    for section in sections:
        _narrow(section)
        _shorten(section)
        _renumber(section, token_ids)
    for section in sections:
        own = _first(section, _WIDTH)
        for outer in _OUTER:
            if outer != own and old is not None and section.get(outer) == old:
                section[outer] = language[key]
    return type(config).from_dict(body)


def special_ids(config: Any) -> set[int]:
    """Ids of tokens that a configuration names."""
    found: set[int] = set()
    for section in _sections(config.to_dict(), config):
        for key, value in section.items():
            if key.endswith(_TOKEN_KEYS):
                found |= {one for one in (value if isinstance(value, list) else [value]) if one}
    return {one for one in found if type(one) is int and one >= 0} | {0}


def _sections(body: _Section, config: Any) -> Iterator[_Section]:
    """The parts of a configuration, and their parts."""
    yield body
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and isinstance(body.get(name), dict):
            yield from _sections(body[name], part)


def _section_of(body: _Section, config: Any) -> _Section:
    """The part of the language model."""
    text = config.get_text_config()
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and (part is text or part.get_text_config() is text):
            return _section_of(body[name], part)
    return body


def _first(section: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The first of the keys that a section has a number for; empty where there is none."""
    return next((key for key in keys if isinstance(section.get(key), int)), "")


def _narrow(section: _Section) -> None:
    """Leave a part few heads of its own size, few experts and short windows."""
    for key, most in _MOST.items():
        if isinstance(section.get(key), int):
            section[key] = min(section[key], most)
    width, heads = _first(section, _WIDTH), _first(section, _HEADS)
    if not width or not heads:
        return
    size = section.get("head_dim") or section[width] // section[heads]
    groups = section.get("num_key_value_heads") or section[heads]
    shared = min(_GROUP, max(1, section[heads] // groups))
    groups, old = min(_KV_HEADS, groups), section[width]
    if isinstance(section.get("num_key_value_heads"), int):
        section["num_key_value_heads"] = groups
    section[heads] = groups * shared
    section[width] = section[heads] * size
    for key in _INNER:
        if isinstance(section.get(key), int):
            times, rest = divmod(section[key], old)
            kept = not rest and 0 < times <= _MOST_WIDTHS
            section[key] = (times if kept else _EXPANSION) * section[width]


def _renumber(section: _Section, token_ids: Sequence[int]) -> None:
    """Leave a part the vocabulary of some tokens."""
    places = {token: place for place, token in enumerate(token_ids)}
    if isinstance(section.get("vocab_size"), int):
        section["vocab_size"] = len(token_ids)
    for key, value in section.items():
        if key.endswith(_TOKEN_KEYS) and isinstance(value, list):
            section[key] = [places[one] for one in value if one in places]
        elif key.endswith(_TOKEN_KEYS) and value in places:
            section[key] = places[value]


def _shorten(section: _Section) -> None:
    """Leave a part two blocks of each kind, and what it says of single blocks."""
    depth = _first(section, _DEPTH)
    if not depth:
        return
    count = section[depth]
    each = {
        key: value
        for key, value in section.items()
        if isinstance(value, list) and len(value) == count and value != list(range(count))
    }
    named = {
        key: value
        for key, value in section.items()
        if key not in each and _names_blocks(key, value, count)
    }
    first = {key: section[key] for key in _FIRST_BLOCKS if isinstance(section.get(key), int)}
    kinds = [
        (
            *(repr(v[i]) for v in each.values()),
            *(i in v for v in named.values()),
            *(i < v for v in first.values()),
        )
        for i in range(count)
    ]
    kept = [i for i in range(count) if kinds[:i].count(kinds[i]) < _BLOCKS]
    section[depth] = len(kept)
    section.update({key: [value[i] for i in kept] for key, value in each.items()})
    section.update({k: [kept.index(i) for i in v if i in kept] for k, v in named.items()})
    section.update({k: sum(i < v for i in kept) for k, v in first.items()})


def _names_blocks(key: str, value: Any, count: int) -> bool:
    """Whether a key lists numbers of blocks."""
    said = key.endswith(("indexes", "indices", "_layers"))
    return said and isinstance(value, list) and all(type(i) is int and i < count for i in value)
