"""Attention layers with a quantized cache of keys and values, and what it costs on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prismquant.errors import PlanError
from prismquant.formats.kv_formats import KVCacheSpec
from prismquant.models.arch import Cached, Modality
from prismquant.models.bound import BoundModel, BoundSite
from prismquant.models.config import config_value
from prismquant.numerics.ranges import RangeRule
from prismquant.numerics.scales import SCALE_DTYPES
from prismquant.recipe.schema import Recipe


@dataclass(frozen=True)
class KVLayer:
    """One attention layer of the language model.

    Attributes:
        attention: Module path.
        step: Index of its step.
        key: The projection whose output becomes the keys.
        stage: The stage of its step after which keys and values are what they will be.
        kv_heads: Number of key-value heads.
    """

    attention: str
    step: int
    key: BoundSite
    stage: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        """Width of a key."""
        return self.key.out_features // self.kv_heads

    @property
    def tensors(self) -> tuple[str, str]:
        """Names of the scales of keys and values, as module tensor names."""
        return f"{self.attention}.k_scale", f"{self.attention}.v_scale"


@dataclass(frozen=True)
class KVPlan:
    """Numbers in which keys and values are cached, and the layers they are of.

    Attributes:
        spec: The numbers.
        range_rule: How the ranges are chosen.
        layers: Every attention layer of the language model.
        stored_bytes: Bytes of all scales on disk.
    """

    spec: KVCacheSpec
    range_rule: RangeRule
    layers: tuple[KVLayer, ...]
    stored_bytes: int

    def layer(self, step: int) -> KVLayer | None:
        """The attention layer of a step."""
        return next((layer for layer in self.layers if layer.step == step), None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            **self.spec.to_dict(),
            "range": asdict(self.range_rule),
            "layers": [layer.attention for layer in self.layers],
            "kv_heads": self.layers[0].kv_heads,
            "stored_bytes": self.stored_bytes,
        }

    def remarks(self) -> tuple[str, ...]:
        """Remarks on readers that cannot use the scales as they are."""
        found = []
        if self.spec.rotated:
            found.append(
                "the key-value cache has rotated keys: only prismquant.load rotates them, "
                "transformers takes their scales for plain ones, vLLM refuses integers"
            )
        elif self.spec.format != "fp8":
            found.append(
                f"the key-value cache is declared as {self.spec.format}: vLLM refuses it, for it "
                "knows fp8 only; prismquant.load simulates it, and so does transformers"
            )
        elif self.spec.per_head:
            found.append(
                "the key-value cache has a scale for every head: vLLM reads those with its "
                "FlashAttention backend only"
            )
        return tuple(found)


def plan_kv_cache(recipe: Recipe, bound: BoundModel) -> KVPlan | None:
    """Find the attention layers whose keys and values a recipe quantizes.

    Raises:
        PlanError: The model's language model has no separate key and value projections, or they are
            stored in a dtype that no scale can have.
    """
    if recipe.kv_cache is None:
        return None
    spec, range_rule = recipe.kv_cache_settings
    tower = bound.arch.tower(Modality.LLM)
    heads_key = tower.kv_heads or tower.heads
    keys = [site for site in bound.sites if site.cache is Cached.KEYS]
    if not keys or heads_key is None:
        raise PlanError(
            "kv_cache: the architecture file names no key projections, or no number of heads",
            remedy="leave kv_cache out",
        )
    if wide := [site for site in keys if site.dtype not in SCALE_DTYPES]:
        dtype = str(wide[0].dtype).removeprefix("torch.")
        raise PlanError(
            f"kv_cache: {wide[0].name} is stored as {dtype}, and scales cannot be",
            remedy="save the model in float32, bfloat16 or float16 first",
        )
    kv_heads = int(config_value(bound.config, heads_key))
    layers = tuple(_layer(bound, key, kv_heads) for key in keys)
    scales = 2 * (kv_heads if spec.per_head else 1)
    size = sum(scales * layer.key.dtype.itemsize for layer in layers)
    return KVPlan(spec, range_rule, layers, size)


def _layer(bound: BoundModel, key: BoundSite, kv_heads: int) -> KVLayer:
    attention = key.name.rpartition(".")[0]
    own = [
        site
        for site in bound.steps[key.step].sites
        if site.cache is not None and site.name.startswith(f"{attention}.")
    ]
    return KVLayer(attention, key.step, key, max(site.stage for site in own), kv_heads)
