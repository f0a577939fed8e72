"""Rules about the KV cache: its scheme, and whether its scales were found by calibration."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismquant.check.checkpoint import COMPRESSED_TENSORS, Checkpoint
from prismquant.check.findings import Problem, gathered
from prismquant.errors import ModelError
from prismquant.formats.quantization_args import Args, read_args
from prismquant.models.config import config_value

_KEY = "kv_cache_scheme"
_SIDES = ("k_scale", "v_scale")
_CALIBRATE = "quantize with kv_cache and calibration data, or serve with a 16-bit cache"


@dataclass(frozen=True)
class TriedReaders:
    """Tried releases of transformers and compressed-tensors, and what became of the cache.

    Attributes:
        transformers: First and last release that was tried.
        compressed_tensors: Likewise.
        rounded: Whether keys and values are rounded as declared; else they stay in floating point.
    """

    transformers: tuple[str, str]
    compressed_tensors: tuple[str, str]
    rounded: bool

    def describe(self) -> str:
        """The releases in words."""
        ends = [
            first if first == last else f"{first} to {last}"
            for first, last in (self.transformers, self.compressed_tensors)
        ]
        return f"transformers {ends[0]} with compressed-tensors {ends[1]}"


def tried_readers() -> list[TriedReaders]:
    """Tried releases, from ``transformers.toml``."""
    text = (Path(__file__).parent / "transformers.toml").read_text(encoding="utf-8")
    return [
        TriedReaders(tuple(one["transformers"]), tuple(one["compressed-tensors"]), one["rounded"])
        for one in tomllib.loads(text)["kv_cache"]
    ]


def passed_over(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A cache that some releases of transformers leave in floating point without a word."""
    if _raw(checkpoint) is None or checkpoint.method != COMPRESSED_TENSORS:
        return
    known = {
        rounded: " and ".join(one.describe() for one in tried_readers() if one.rounded is rounded)
        for rounded in (True, False)
    }
    yield Problem(
        f"{known[False]} leaves keys and values in floating point",
        (_KEY,),
        f"use {known[True]}, prismquant.load, or vLLM: they round them",
    )


def kind(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Caches that vLLM does not take: it has symmetric FP8 with a scale a tensor or a head."""
    args = _args(checkpoint)
    if args is None:
        return
    fits = (args.type, args.bits, args.symmetric) == ("float", 8, True)
    if not fits or args.strategy not in ("tensor", "attn_head"):
        yield Problem(
            f"vLLM has no KV cache of {args.describe()}",
            (_KEY,),
            "use fp8 with a scale a tensor or a head; prismquant.load reads the others",
        )


def missing(checkpoint: Checkpoint) -> list[Problem]:
    """Scales that are not there, on models whose keys need none to work."""
    return [] if _biased(checkpoint) else _missing(checkpoint)


def missing_with_bias(checkpoint: Checkpoint) -> list[Problem]:
    """The same where a bias makes keys large."""
    return _missing(checkpoint) if _biased(checkpoint) else []


def ones(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Scales that are all 1, on models whose keys need none to work."""
    return iter(()) if _biased(checkpoint) else _ones(checkpoint)


def ones_with_bias(checkpoint: Checkpoint) -> Iterator[Problem]:
    """The same where a bias makes keys large."""
    return _ones(checkpoint) if _biased(checkpoint) else iter(())


def shapes(checkpoint: Checkpoint) -> list[Problem]:
    """Scales of another shape than the strategy gives them."""
    args = _args(checkpoint)
    heads = _heads(checkpoint)
    if args is None or not _static(checkpoint) or heads is None:
        return []
    wanted: tuple[tuple[int, ...], ...] = ((1,), ())
    if args.strategy == "attn_head":
        wanted = ((heads, 1, 1), (heads,))
    return gathered(
        (
            f"{side} is {list(info.shape)}, strategy {args.strategy} makes it {list(wanted[0])}",
            prefix,
            "correct the strategy, or export again",
        )
        for prefix in checkpoint.attentions()
        for side in _SIDES
        if (info := checkpoint.tensors.get(_name(checkpoint, prefix, side))) is not None
        and info.shape not in wanted
    )


def values(checkpoint: Checkpoint) -> list[Problem]:
    """Scales that are no positive numbers."""
    return gathered(
        (f"{side} is not a positive number", prefix, _CALIBRATE)
        for prefix in checkpoint.attentions()
        for side in _SIDES
        if any(
            not math.isfinite(value) or value <= 0
            for value in checkpoint.scalar(_name(checkpoint, prefix, side)) or ()
        )
    )


def unused(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Scales without a scheme."""
    names = tuple(p for p in checkpoint.attentions() if f"{p}.k_scale" in checkpoint.tensors)
    if names and _raw(checkpoint) is None and checkpoint.method != "modelopt":
        yield Problem(
            "scales of the KV cache are stored, but the configuration has no kv_cache_scheme",
            names,
            "add kv_cache_scheme; until then vLLM uses them with --kv-cache-dtype fp8 only",
        )


def _missing(checkpoint: Checkpoint) -> list[Problem]:
    if not _static(checkpoint):
        return []
    why = (
        "; keys carry the bias of k_proj and leave FP8's range at scale 1"
        if _biased(checkpoint)
        else "; servers take 1"
    )
    return gathered(
        (f"the KV cache has no {side}{why}", prefix, _CALIBRATE)
        for prefix in checkpoint.attentions()
        for side in _SIDES
        if _name(checkpoint, prefix, side) not in checkpoint.tensors
    )


def _ones(checkpoint: Checkpoint) -> Iterator[Problem]:
    if not _static(checkpoint):
        return
    known = {
        prefix: checkpoint.scalar(_name(checkpoint, prefix, "k_scale"))
        for prefix in checkpoint.attentions()
    }
    given = [value for values in known.values() if values for value in values]
    if given and all(value == 1 for value in given):
        yield Problem(
            "every k_scale is exactly 1: the KV cache was never calibrated",
            tuple(prefix for prefix, values in known.items() if values),
            _CALIBRATE,
        )


def _name(checkpoint: Checkpoint, prefix: str, side: str) -> str:
    """A scale's tensor: of the attention, in ModelOpt's checkpoints of the projection."""
    inside = f"{side[0]}_proj." if checkpoint.method.startswith("modelopt") else ""
    return f"{prefix}.{inside}{side}"


def _raw(checkpoint: Checkpoint) -> Any:
    return checkpoint.section.get(_KEY)


def _args(checkpoint: Checkpoint) -> Args | None:
    raw = _raw(checkpoint)
    if checkpoint.method == COMPRESSED_TENSORS:
        return checkpoint.read.cache
    return read_args(raw, "output_activations") if isinstance(raw, Mapping) else None


def _static(checkpoint: Checkpoint) -> bool:
    raw = _raw(checkpoint)
    if isinstance(raw, Mapping) and checkpoint.method == "modelopt":
        return not raw.get("dynamic")
    args = _args(checkpoint)
    return args is not None and not args.dynamic


def _biased(checkpoint: Checkpoint) -> bool:
    """Whether key projections have a bias, as in the Qwen2 family."""
    return any(
        layer.site is not None and layer.site.has_bias for layer in checkpoint.attentions().values()
    )


def _heads(checkpoint: Checkpoint) -> int | None:
    model = checkpoint.model
    if model is None:
        return None
    text = getattr(model.config, "text_config", model.config)
    try:
        return int(config_value(text, "num_key_value_heads"))
    except ModelError:
        return None
